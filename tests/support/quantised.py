"""Quantised checkpoints of tiny models, made once for every test that reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import unirank
from tests.support.tiny import build
from unirank import CompressedModel
from unirank.models.low_rank import count_parameters

IDS = torch.arange(2, 22)[None]
# name: architecture, scheme, form and dtype
CASES: dict[str, tuple[str, str, Any, torch.dtype]] = {
    "llama": ("llama", "whiten", "factors", torch.float32),
    "afm": ("llama", "afm", "pivoted", torch.bfloat16),
    "bias": ("llama-bias", "afm", "factors", torch.float16),
    "conv1d": ("gpt2", "whiten", "pivoted", torch.float32),
}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def ranks_of(model: nn.Module) -> dict[str, Any]:
    """Ranks that are hard to quantise: 1, odd ones, some that groups divide; the last linear of a layer stays dense."""
    loaded_linears = [name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")]
    inside = [name for name in loaded_linears if "lm_head" not in name]
    cycle: list[Any] = [1, 7, 16, "dense", 5]
    return {name: cycle[index % len(cycle)] for index, name in enumerate(inside)}


@pytest.fixture(scope="session")
def quantised_checkpoints(tmp_path_factory, tokenizer, text_file: Path) -> tuple[Path, dict[str, CompressedModel]]:
    """Checkpoints NAME, and what is made of them with 8 and 4 bits, in memory and saved as NAME-8 and NAME-4."""
    root = tmp_path_factory.mktemp("quantised")
    models = {}
    for name, (architecture, scheme, form, dtype) in CASES.items():
        model = build(architecture, intermediate_size=64).to(dtype)
        wide = 2 if architecture == "gpt2" else 1  # 128 inputs, and as many tokens
        calibration = unirank.Calibration(text=str(text_file), windows=4 * wide, window=16, batch=2)
        asked: dict[str, Any] = {"tokenizer": tokenizer, "scheme": scheme, "calibration": calibration, "form": form}
        unirank.compress(model, ranks=ranks_of(model), **asked).save(root / name)
        for bits in (8, 4):
            models[f"{name}-{bits}"] = unirank.quantize(root / name, bits, device="cpu")
            models[f"{name}-{bits}"].save(root / f"{name}-{bits}")
    return root, models


def truncated(loaded: unirank.LoadedModel, ranks: dict[str, Any]) -> CompressedModel:
    """The model with the truncated SVD of its weights in the place of those that have a rank."""
    from unirank.models.low_rank import make_low_rank
    from unirank.models.structure import weight_of

    before = count_parameters(loaded.model)
    for name, rank in ranks.items():
        if rank != "dense":
            left, sigma, right = torch.linalg.svd(
                weight_of(loaded.model.get_submodule(name)).detach(), full_matrices=False
            )
            make_low_rank(loaded.model, name, rank).set_product(left[:, :rank] * sigma[:rank], right[:rank])
    used = sum(spec.rank_cost(ranks[spec.name]) for spec in loaded.linears)
    total = sum(spec.params for spec in loaded.linears)
    shapes = {spec.name: (spec.m, spec.n) for spec in loaded.linears}
    plan = unirank.RankPlan(ranks, shapes, 1 - used / total, used, used, None, "none", "svd")
    low = sum(rank != "dense" for rank in ranks.values())
    report = unirank.TruncateReport(total, used, before, count_parameters(loaded.model), low, len(ranks) - low)
    return CompressedModel(loaded.model, loaded.tokenizer, plan, report, None, loaded.source)
