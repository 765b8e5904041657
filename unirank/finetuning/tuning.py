"""Rank-preserving fine-tuning: LoRA on both factors of every low-rank layer, merged exactly (method 6)."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, set_seed

from unirank import costs
from unirank.compression.checkpoint import CompressedModel, open_compressed
from unirank.disk.files import locked, write_json
from unirank.disk.hashing import sha256_tensors
from unirank.disk.tensorfile import read_tensors, write_tensors
from unirank.display import shows_progress, told
from unirank.errors import InputError, UnirankError, warn
from unirank.finetuning.adapters import (
    Factor,
    adapted,
    attach,
    get_state,
    largest_difference,
    merge,
    set_state,
    train_only,
)
from unirank.finetuning.loop import Loop, run
from unirank.finetuning.losses import mean_nll
from unirank.finetuning.settings import Finetune
from unirank.finetuning.work import check_work, claim
from unirank.models.loading import load_pretrained
from unirank.models.low_rank import align_weights, count_target
from unirank.models.targets import refuse_expert_targets
from unirank.models.wrappers import require_in_memory, unwrapped
from unirank.progress import Progress, expect
from unirank.provenance import device_name, versions
from unirank.text.training_windows import Corpus, pack, read_corpus
from unirank.text.windows import check_window
from unirank.types import DENSE

# How often a text may be read before that is worth a warning: up to 4 times it is nearly as good as new text
# (Muennighoff and others 2023, arXiv 2305.16264).
MOST_PASSES = 4
_RECIPE = "finetune.json"
_LOG, _ADAPTER = "log.json", "adapters.safetensors"  # of a finished phase; the second is written last


def loop_of(settings: Finetune, steps: int, device: torch.device) -> Loop:
    """The settings of one phase of `steps` optimizer steps."""
    bf16 = settings.precision == "bfloat16"
    if settings.precision == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    every = settings.evaluate_every or max(1, settings.steps // 10)
    return Loop(
        steps,
        settings.batch,
        settings.micro_batch or settings.batch,
        settings.lr,
        settings.warmup,
        settings.weight_decay,
        min(every, steps),
        settings.patience,
        settings.distill,
        settings.temperature,
        settings.gradient_checkpointing,
        bf16,
        settings.seed,
    )


@shows_progress
def finetune(
    compressed: CompressedModel | str | Path,
    data: str,
    settings: Finetune | None = None,
    *,
    work: str | Path,
    against: PreTrainedModel | str | None = None,
    split: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = None,
    teacher: PreTrainedModel | str | None = None,
) -> CompressedModel:
    """Fine-tune a compressed model with LoRA on its factors; ranks and parameter count stay exactly as they are.

    Args:
        compressed: a checkpoint of ours, or such a model in memory, which is changed in place.
        data: the training text, see `unirank.text.training_windows.read_corpus`.
        work: directory of the Trainer's checkpoints. A run that was interrupted resumes there when everything else is
            the same, and ends with the same weights. It may be deleted when the result is saved.
        against: the dense model, the teacher of `settings.distill`; None takes the one that the checkpoint names as its
            source.
        split: of a dataset; None is "train".
        device: where to load a checkpoint; None takes the GPU when there is one.
        trust_remote_code: run modelling code that the checkpoint or the dense model brings, where one is loaded here.
        teacher: what `against` was called until 0.1; for one release.

    Returns the model with `training`: settings, hashes, the log of losses, held-out loss (nats a token) before and
    after, and `merge_difference`, the largest difference that merging made to a logit of the first held-out window,
    over the largest logit.

    Raises:
        InputError: the model is not compressed, the data is unusable or too short, `work` belongs to another run.
        NonFiniteError: a loss or gradient is NaN or infinity; names the step, and where the last good adapters are.
    """
    settings = settings or Finetune()
    work = Path(work)
    if isinstance(compressed, str | Path):
        compressed = open_compressed(compressed, device=device, trust_remote_code=trust_remote_code)
    model = compressed.model
    refuse_expert_targets(model, compressed.plan.ranks, "Fine-tuning")
    dense = [name for name, rank in compressed.plan.ranks.items() if rank == DENSE] if settings.adapt_dense else []
    names = adapted(model, dense=dense)
    corpus = read_corpus(data, compressed.tokenizer, split=split)
    train, held_out = split_windows(pack(corpus, compressed.tokenizer, model, window=settings.window), settings, corpus)
    passes = settings.steps * settings.batch / len(train)
    if passes > MOST_PASSES:
        warn(
            f"The training text {corpus.name} gives {len(train)} windows of {settings.window} tokens to train on, and "
            f"{settings.steps} steps of {settings.batch} read them {passes:.3g} times; beyond {MOST_PASSES} times a "
            "text teaches little more. Give more text, or fewer Finetune.steps."
        )
    if teacher is not None:
        warnings.warn("finetune(teacher=) is called against now.", DeprecationWarning, stacklevel=2)
        against = teacher
    guide = _teacher(compressed, against, settings, trust_remote_code)
    recipe = _identity(compressed, corpus, settings, train, held_out, guide)
    check_work(work, _RECIPE)
    with locked(work):
        claim(work, _RECIPE, recipe, "fine-tuning")
        set_seed(settings.seed)
        before = mean_nll(model, held_out)
        peft = attach(model, names, rank=settings.rank, alpha=settings.alpha or 2 * settings.rank)
        trainable = train_only(peft, names)
        log: list[dict[str, float]] = []
        phases = _phases(names, settings)
        sizes = costs.Sizes.of_shapes(compressed.plan.shapes.values(), model.config)
        each = settings.batch * settings.window
        stages = [costs.training(sizes, f"fine-tune, {stage}", steps, each) for stage, _, steps in phases]
        expect(told(progress), stages)
        for phase, (stage, chosen, steps) in enumerate(phases, start=1):
            train_only(peft, chosen)
            folder = work / f"{phase}-{stage}"
            if not (folder / _ADAPTER).is_file():
                loop = loop_of(settings, steps, model.device)
                asked: dict[str, Any] = {"stage": f"fine-tune, {stage}", "progress": told(progress)}
                entries = run(peft, train, held_out, folder, loop, teacher=guide, **asked)
                write_json(folder / _LOG, {"log": [{"phase": phase, **entry} for entry in entries]})
                write_tensors(folder / _ADAPTER, get_state(peft), {"phase": stage})
            log += json.loads((folder / _LOG).read_text())["log"]
            set_state(peft, read_tensors(folder / _ADAPTER))
    with torch.no_grad():
        probe = held_out[:1].to(model.device)
        logits = peft.eval()(input_ids=probe, use_cache=False).logits.float()
        merged = merge(peft)
        difference = largest_difference(logits, merged(input_ids=probe, use_cache=False).logits.float())
    targets = sum(count_target(merged.get_submodule(name)) for name in compressed.plan.ranks)
    if targets != compressed.plan.used:
        raise UnirankError(f"The modules hold {targets} target parameters, the plan says {compressed.plan.used}.")
    align_weights(merged)
    after = mean_nll(merged, held_out)
    if compressed.training is not None:
        recipe["before_that"] = compressed.training
    training = recipe | {"trainable": trainable, "held_out_before": before, "held_out_after": after}
    training |= {"merge_difference": difference, "log": log}
    return dataclasses.replace(compressed, model=merged, training=training, evaluations=())


def split_windows(windows: torch.Tensor, settings: Finetune, corpus: Corpus) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows to train on, and the last ones, which are held out."""
    if len(windows) < 2:
        raise InputError(
            f"The training text {corpus.name} fills {len(windows)} window of {settings.window} tokens; "
            "at least 2 are needed, one of them held out."
        )
    count = min(len(windows) - 1, max(1, round(settings.held_out * len(windows))))
    return windows[:-count], windows[-count:]


def _teacher(
    compressed: CompressedModel, teacher: PreTrainedModel | str | None, settings: Finetune, trust_remote_code: bool
) -> PreTrainedModel | None:
    if settings.distill == 0:
        if teacher is not None:
            raise InputError(
                "With distill = 0 the model of against= would not be used; set distill above 0, for example to 0.5."
            )
        return None
    if teacher is None or isinstance(teacher, str | Path):
        name = compressed.dense_name() if teacher is None else teacher
        dtype, device = str(compressed.model.dtype).removeprefix("torch."), str(compressed.model.device)
        try:
            teacher, _ = load_pretrained(name, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        except InputError as error:
            raise InputError(f"The teacher cannot be loaded; name the dense model with against=: {error}") from error
    teacher = unwrapped(teacher)
    require_in_memory(teacher, "Give against= a model that is in memory as a whole")
    sizes = [model.config.get_text_config().vocab_size for model in (teacher, compressed.model)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"The teacher has {sizes[0]} tokens and the compressed model {sizes[1]}; they must be the same."
        )
    check_window(teacher, settings.window, "Finetune.window")
    return teacher.eval().requires_grad_(False)


def _phases(names: Mapping[str, Factor], settings: Finetune) -> list[tuple[str, list[str], int]]:
    """Name, adapted linears and steps of each phase. Linears that stayed dense are trained in all."""
    if settings.schedule == "joint":
        return [("joint", list(names), settings.steps)]
    sides = {side: [name for name, factor in names.items() if factor in (side, "dense")] for side in ("left", "right")}
    first = -(-settings.steps // 2)
    return [("left", sides["left"], first), ("right", sides["right"], settings.steps - first)]


def _identity(
    compressed: CompressedModel,
    corpus: Corpus,
    settings: Finetune,
    train: torch.Tensor,
    held_out: torch.Tensor,
    teacher: PreTrainedModel | None,
) -> dict[str, Any]:
    """Everything that the result depends on."""
    windows = {"train": train, "held_out": held_out}
    data = {"text": corpus.name, "text_sha256": corpus.sha256}
    data |= {f"{name}_windows": len(tensor) for name, tensor in windows.items()}
    return {
        "settings": asdict(settings),
        "data": data | {"windows_sha256": sha256_tensors(sorted(windows.items()))},
        "model_sha256": sha256_tensors(compressed.model.state_dict().items()),
        "teacher_sha256": None if teacher is None else sha256_tensors(teacher.state_dict().items()),
        "device": device_name(compressed.model.device),
        "versions": versions(),
    }
