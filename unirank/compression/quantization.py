"""Quantise a compressed model: both matrices of every low-rank linear, and the decoder's linears that stayed dense."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from unirank.compression.checkpoint import CompressedModel, open_compressed
from unirank.compression.quantize_report import QuantizeReport
from unirank.display import shows_progress, told
from unirank.errors import InputError
from unirank.models.bits import Bits, check_bits
from unirank.models.factoring import one_thread
from unirank.models.file_names import keep_apart
from unirank.models.low_rank import LowRankLinear
from unirank.models.quantizer import UniRankConfig
from unirank.models.quantizing import quantized_of, refuse_quantized, require_torchao
from unirank.models.targets import refuse_expert_targets
from unirank.models.wrappers import refuse_foreign
from unirank.progress import Progress
from unirank.types import DENSE, Form

_PIVOTED_GROUP = 32


def groups_of(bits: int, group_size: int | None, form: Form) -> tuple[Bits, int | None]:
    """Bits, and the most weights that share a scale (None: a row), of a model whose low-rank matrices have that form.

    Raises InputError unless they are legal.
    """
    checked, size = check_bits(bits, group_size)
    return checked, _PIVOTED_GROUP if size is None and form == "pivoted" else size


def check_quantizable(bits: int, group_size: int | None) -> tuple[Bits, int | None]:
    """Bits and the largest group, as they are taken. Raises InputError unless they are legal and torchao is there."""
    checked = check_bits(bits, group_size)
    require_torchao()
    return checked


@shows_progress
@torch.no_grad()
def quantize(
    compressed: CompressedModel | str | Path,
    bits: int = 8,
    *,
    group_size: int | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = None,
) -> CompressedModel:
    """Store the decoder's weights as whole numbers of `bits` bits with scales, by torchao (the extra `quantize`).

    It is the last step: what is quantised is neither trained nor healed. Both matrices of every low-rank linear are
    quantised, in either form, and the decoder's linears that stayed dense. Embeddings, head, norms and biases stay.
    `right` goes first, and `left` is fitted to it as it was stored (**choice**: this takes the part of the error in the
    span of `right` away, for any input). Weights become floats again when they are multiplied, so it saves memory and
    not arithmetic. The numbers do not depend on the number of threads.

    Args:
        compressed: a checkpoint of ours, or such a model in memory, which is changed in place.
        bits: 8 or 4, symmetric.
        group_size: the most weights that share a scale: 128, 64, 32 or 16. A matrix takes the largest of these, up to
            it, that divides its rows; one that none divides takes one scale a row, and 8 bits. None is 128 with 4 bits;
            with 8, one scale a row, and 32 for pivoted models, whose outputs are sums over errors of other outputs
            (**choice**: it halves the divergence for 3 % of the bytes).
        device: where to load a checkpoint; None takes the GPU when there is one.
        trust_remote_code: run modelling code that the checkpoint brings, where it is loaded here.

    Returns the model, with `quantized` and without the perplexities that were measured of the floats.

    Raises InputError when bits or groups are not legal, torchao is not installed, or the model is not compressed, is
    quantised already, or was opened with `stream`.
    """
    checked, size = check_quantizable(bits, group_size)
    if isinstance(compressed, str | Path):
        compressed = open_compressed(compressed, device=device, trust_remote_code=trust_remote_code)
    model = compressed.model
    if compressed.pages is not None:
        raise InputError("A model that was opened with stream=True cannot be quantised; open it without.")
    refuse_foreign(model, done="quantised")
    refuse_quantized(model, "quantised again")
    refuse_expert_targets(model, compressed.plan.ranks, "Quantisation")
    low_rank = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    if not low_rank:
        raise InputError("The model has no low-rank layers; quantise a dense model with torchao itself.")
    whole = [name for name, rank in compressed.plan.ranks.items() if rank == DENSE]
    names = [*low_rank, *whole]
    _, size = groups_of(checked, size, compressed.plan.form)
    for position, name in enumerate(names, start=1):
        linear = model.get_submodule(name)
        if isinstance(linear, LowRankLinear):
            right = quantized_of(linear.right, checked, size)
            fitted = _fitted(linear.left.weight, linear.right.weight, right.dense_weight(torch.float32))
            linear.put_quantized(quantized_of(linear.left, checked, size, fitted), right)
        else:
            model.set_submodule(name, quantized_of(linear, checked, size))
        told(progress)("quantize", position, len(names))
    keep_apart(model)
    model.config.quantization_config = UniRankConfig(
        ranks={name: module.rank for name, module in low_rank.items()},
        biased=[name for name, module in low_rank.items() if module.added_bias],
        form=compressed.plan.form,
        bits=checked,
        group_size=size,
        whole=whole,
    )
    report = QuantizeReport.of(model, checked, size)
    return dataclasses.replace(compressed, quantized=report, evaluations=())


def _fitted(left: torch.Tensor, right: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """The `left` float64 `[M, R]` with `left stored` nearest to `left right`; as it was where `stored` has no rank R.

    `stored`, `[R, N]`, is `right + E`. With P the projection on its rows, the error `left E` becomes `left E (I - P)`.
    """
    with one_thread(left.device):
        stored = stored.double()
        factor, failed = torch.linalg.cholesky_ex(stored @ stored.T)
        if bool(failed):
            return left.double()
        turned = torch.cholesky_solve(stored @ right.double().T, factor).T  # [R, R], near the identity
        fitted = left.double() @ turned
    return fitted if bool(fitted.isfinite().all()) else left.double()
