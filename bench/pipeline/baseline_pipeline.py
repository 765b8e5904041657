"""The baseline of bench_compress: SVD-LLM's published procedure (arXiv 2403.07378) in plain PyTorch.

The whole model runs, `lm_head` included, one window at a time; a hook on every linear adds `XᵀX` to a float32 Gram of
its own. Then, matrix by matrix: Cholesky in float64 (damped by the smallest eigenvalue when it fails), the explicit
inverse, a full SVD of `W S`, and factors that share the root of the singular values. Ranks are uniform.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bench.support.timing import synchronise
from unirank.models.low_rank import LowRankLinear
from unirank.models.structure import weight_of
from unirank.types import LinearSpec, LoadedModel


@dataclass(frozen=True)
class Plain:
    """`W ≈ left @ right` at full rank, and how long each stage took."""

    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    calibrate_seconds: float
    decompose_seconds: float


def uniform_rank(spec: LinearSpec, remove: float) -> int:
    """SVD-LLM's rule."""
    return int(spec.params * (1 - remove) / spec.cost)


@torch.no_grad()
def run(loaded: LoadedModel, windows: torch.Tensor) -> Plain:
    """The analysis: Gram matrices over `windows` [W, T], then factors of every linear."""
    start = time.perf_counter()
    grams = _grams(loaded, windows)
    synchronise(loaded.device)
    middle = time.perf_counter()
    factors = {}
    for spec in loaded.linears:
        weight = weight_of(loaded.model.get_submodule(spec.name)).float()
        factors[spec.name] = _whiten(weight, grams.pop(spec.name))
    synchronise(loaded.device)
    return Plain(factors, middle - start, time.perf_counter() - middle)


def _grams(loaded: LoadedModel, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    grams: dict[str, torch.Tensor] = {}

    def hook(name: str):
        def add(_module: torch.nn.Module, args: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
            x = args[0].detach().float()
            grams[name] = grams.get(name, 0) + torch.matmul(x.transpose(1, 2), x).sum(0)

        return add

    handles = [loaded.model.get_submodule(spec.name).register_forward_hook(hook(spec.name)) for spec in loaded.linears]
    try:
        for window in windows:
            loaded.model(input_ids=window[None].to(loaded.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return grams


def _whiten(weight: torch.Tensor, gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    moment = gram.double()
    try:
        scale = torch.linalg.cholesky(moment)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        shift = 1e-6 - torch.linalg.eigvalsh(moment)[0]
        scale = torch.linalg.cholesky(moment + shift * torch.eye(len(moment)).to(moment))
    inverse = torch.linalg.inv(scale).float()
    u, s, vh = torch.linalg.svd(weight @ scale.float(), full_matrices=False)
    root = s.sqrt()
    return u * root, root[:, None] * (vh @ inverse)


@torch.no_grad()
def truncate(loaded: LoadedModel, plain: Plain, remove: float) -> dict[str, int]:
    """Put the factors at uniform ranks into the model, in place; returns the ranks."""
    ranks = {}
    for spec in loaded.linears:
        rank = ranks[spec.name] = uniform_rank(spec, remove)
        left, right = plain.factors[spec.name]
        low = LowRankLinear(spec.n, spec.m, rank).to(left.device)
        low.left.weight.copy_(left[:, :rank])
        low.right.weight.copy_(right[:rank])
        loaded.model.set_submodule(spec.name, low)
    return ranks
