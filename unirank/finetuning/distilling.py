"""The last part of healing: all factors of the whole model at once, on the divergence from the dense model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from unirank.disk.hashing import sha256_tensors
from unirank.disk.strictjson import Damaged
from unirank.disk.tensorfile import open_tensors, write_tensors
from unirank.finetuning.loop import Loop, run
from unirank.finetuning.losses import mean_divergence
from unirank.finetuning.settings import Heal
from unirank.models.low_rank import LowRankLinear
from unirank.progress import OnProgress

_FILE, _FOLDER = "distilled.safetensors", "distill"
_LR, _FAR = 1e-4, 0.4  # peak learning rate, and from which divergence on it is that (**choice**, docs/experiments.md)


def distill(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    train: Callable[[Path], torch.Tensor],
    held_out: torch.Tensor,
    settings: Heal,
    work: Path,
    *,
    seed: int,
    bf16: bool,
    progress: OnProgress,
) -> dict[str, Any]:
    """Train the factors (with their biases) of `model` in place by `settings.distill_steps`; resumes in `work`.

    They train in float32, and go back into the model's dtype. Where the divergence on held-out windows is then no less
    than before, the model stays as it was.

    Args:
        train: gives windows, int64 `[W, T]`; may keep files in that folder until the steps are made.
        held_out: windows, int64 `[W, T]`.

    Returns `windows_sha256`, `lr` (the peak), `held_out_before` and `held_out_after` (the divergence, nats a token, of
    the model as it was and as it is) and the `log` of the loop. Raises like `unirank.finetuning.loop.run` and
    `mean_divergence`.
    """
    factors = _factors(model)
    file = work / _FILE
    try:
        with open_tensors(file) as whole:
            for name, parameter in factors.items():
                parameter.data.copy_(whole[name])
            return whole.header
    except Damaged:
        pass  # not there yet
    windows = train(work / _FOLDER)
    before = mean_divergence(model, teacher, held_out)
    kept = {name: parameter.detach().clone() for name, parameter in factors.items()}
    with _in_float32(model), _trained(model, factors), _tied_weights_known(model):
        lr = settings.distill_lr or _LR * min(1.0, max(0.0, before) / _FAR)  # rounding may leave 0 a little below it
        loop = _loop(settings, lr, seed, bf16)
        log = run(model, windows, held_out, work / _FOLDER, loop, teacher=teacher, stage="distill", progress=progress)
    after = mean_divergence(model, teacher, held_out)
    if not after < before:
        after = before
        for name, parameter in factors.items():
            parameter.data.copy_(kept[name])
    record = {
        "windows_sha256": sha256_tensors([("windows", windows)]),
        "lr": loop.lr,
        "held_out_before": before,
        "held_out_after": after,
        "log": log,
    }
    write_tensors(file, {name: parameter.detach() for name, parameter in factors.items()}, record)
    shutil.rmtree(work / _FOLDER)
    return record


def _factors(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        if isinstance(module, LowRankLinear)
        for name, parameter in module.named_parameters()
    }


def _loop(settings: Heal, lr: float, seed: int, bf16: bool) -> Loop:
    return Loop(
        steps=settings.distill_steps,
        batch=settings.batch,
        micro_batch=settings.batch,
        lr=lr,
        warmup=settings.warmup,
        weight_decay=settings.weight_decay,
        evaluate_every=max(1, settings.distill_steps // 10),
        patience=settings.patience,
        distill=1.0,
        temperature=1.0,
        gradient_checkpointing=False,
        bf16=bf16,
        seed=seed,
        judged_by_teacher=True,
    )


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """The model's parameters are float32 inside: steps of 1e-4 would be rounded away in bfloat16."""
    before = {parameter: parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    for parameter in before:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in before.items():
            parameter.data = parameter.data.to(dtype)


@contextmanager
def _tied_weights_known(model: Any) -> Iterator[None]:
    """The Trainer does not warn that a checkpoint lacks tied weights, of which transformers writes one."""
    before = model._keys_to_ignore_on_save
    model._keys_to_ignore_on_save = list(getattr(model, "all_tied_weights_keys", None) or ()) or before
    try:
        yield
    finally:
        model._keys_to_ignore_on_save = before


@contextmanager
def _trained(model: nn.Module, factors: dict[str, nn.Parameter]) -> Iterator[None]:
    """Factors alone take gradients inside; before and after, nothing does."""
    for parameter in factors.values():
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in factors.values():
            parameter.requires_grad_(False)
            parameter.grad = None
        model.eval()
