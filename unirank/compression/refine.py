"""The second, sequential pass: ranks fixed, every linear is fitted again to what really enters it (method 3).

Two streams go through the layers in order: `x` of the dense model and `x'` of the layers that are already compressed.
Inside a layer the linears follow in the order of their inputs, so that each sees what those before it have lost.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from unirank import ops
from unirank.analysis.scheme.base import WORK_DTYPE
from unirank.analysis.scheme.two_sided import Target, damped, solve
from unirank.analysis.store import AnalysisStore
from unirank.compression.truncation import TruncateReport, check_plan, settle
from unirank.errors import InputError, NonFiniteError
from unirank.layerwise.products import cross_moment
from unirank.layerwise.recording import LayerCall, record
from unirank.layerwise.trace import traced_layer
from unirank.models.low_rank import LowRankLinear, count_parameters, make_low_rank
from unirank.models.structure import weight_of
from unirank.progress import OnProgress, silent
from unirank.rank_plan import RankPlan
from unirank.types import DENSE, Gradient, LinearSpec, LoadedModel, Rank

# Of a moment's mean diagonal: what is left below it when the mean is taken out is rounding, for Gram matrices multiply
# in float32 (docs/numerics.md; measured with one token everywhere: 1e-7).
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Refine:
    """How the second pass fits.

    Attributes:
        mix: `b` in [0, 1]. 1 aims at the dense model's outputs (AA-SVD), 0 at the dense weights on the new inputs
            (re-whitening, SVD-LLM at high ratios), between them SAES-SVD's mixture.
        damping: of the inputs' mean diagonal; pulls the fit to the dense weight (**choice**), so that it never follows
            directions that few tokens show.
        metric: fit in the output metric of `kfac`; needs a store with gradients.
        metric_damping: of the output gradients' mean diagonal, where gradients give the output metric.
        centred: fit the centred streams and restore the mean output with a bias (`afm`).
        dense: also fit the linears that keep their full rank.
    """

    mix: float = 0.5
    damping: float = 1e-2
    metric: bool = False
    metric_damping: float = 1e-2
    centred: bool = False
    dense: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.mix <= 1:
            raise InputError(f"mix = {self.mix} is not legal; it lies between 0 and 1.")
        for name in ("damping", "metric_damping"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"{name} = {getattr(self, name)} is not legal; it is above 0 and at most 1.")


@dataclass
class _Pair:
    """Running sums over tokens of an input of the dense (`x`) and of the compressed (`x'`) stream, float64."""

    own: torch.Tensor  # x' x'ᵀ
    cross: torch.Tensor  # x x'ᵀ
    own_sum: torch.Tensor
    dense_sum: torch.Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, n: int, device: torch.device) -> _Pair:
        def make(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=WORK_DTYPE, device=device)

        return cls(make(n, n), make(n, n), make(n), make(n))

    def add(self, dense: torch.Tensor, own: torch.Tensor) -> None:
        ops.gram_accumulate_(self.own, self.own_sum, own)
        self.cross += cross_moment(dense, own)
        self.dense_sum += dense.sum(0, dtype=WORK_DTYPE)
        self.tokens += len(own)


def refine(
    loaded: LoadedModel,
    store: AnalysisStore,
    plan: RankPlan,
    windows: torch.Tensor,
    settings: Refine,
    *,
    progress: OnProgress = silent,
) -> TruncateReport:
    """Compress `loaded` in place at the ranks of `plan` by a second pass, in the place of `truncate`.

    Args:
        store: the analysis of the plan; with `settings.metric`, also the source of the gradients.
        windows: calibration tokens, int64 `[W, T]`, usually those of the analysis.

    Raises like `truncate`; NonFiniteError when a fit is NaN or infinity, with the name of the linear.
    """
    check_plan(loaded, store, plan)
    before = count_parameters(loaded.model)
    gradients = store.gradients if settings.metric else None
    batch = store.identity["calibration"]["batch"]
    refit(loaded, plan.ranks, windows, settings, batch=batch, gradients=gradients, progress=progress)
    return settle(loaded, plan, before)


@torch.no_grad()
def refit(
    loaded: LoadedModel,
    ranks: Mapping[str, Rank],
    windows: torch.Tensor,
    settings: Refine,
    *,
    batch: int = 8,
    gradients: Callable[[int], Mapping[str, Gradient]] | None = None,
    progress: OnProgress = silent,
) -> None:
    """Replace every linear of `loaded` that `ranks` gives a rank, layer by layer.

    Args:
        ranks: of every target.
        windows: calibration tokens, int64 `[W, T]`.
        batch: windows that run together.
        gradients: of a layer; then the fit is in the output metric of `kfac`.

    Raises NonFiniteError when a fit is NaN or infinity; names the linear.
    """
    recording = record(loaded, windows, batch=batch)
    dense_stream, own_stream = list(recording.start.batches), list(recording.start.batches)
    probe = recording.start.probe
    for index in range(loaded.layer_count):
        layer, probe = traced_layer(loaded, index, recording, probe)
        calls = [call[index] for call in recording.calls]
        original = copy.deepcopy(layer.module)
        metrics = gradients(index) if gradients else {}
        groups = _groups(layer.specs, layer.trace.input_of)
        wanted = {
            owner: [spec for spec in members if settings.dense or ranks[spec.name] != DENSE]
            for owner, members in groups.items()
        }
        owners = [owner for owner in groups if wanted[owner]]
        paths = {owner: layer.path_of(owner) for owner in owners}
        seen, dense_stream = _inputs(original, calls, dense_stream, paths)
        for owner in owners:
            pair = _measure(layer.module, calls, own_stream, paths[owner], seen.pop(owner))
            for spec in wanted[owner]:
                g = metrics[spec.name].g if metrics else None
                _fit(loaded, spec, ranks[spec.name], pair, g, settings)
        own_stream = [call.run(layer.module, x) for call, x in zip(calls, own_stream, strict=True)]
        progress("refine", index + 1, loaded.layer_count)


def _groups(specs: Sequence[LinearSpec], input_of: Mapping[str, str]) -> dict[str, list[LinearSpec]]:
    """Linears by the first one that reads the same input, in the order in which they run."""
    by_name = {spec.name: spec for spec in specs}
    groups: dict[str, list[LinearSpec]] = {}
    for name, owner in input_of.items():  # the trace lists them as they ran
        groups.setdefault(owner, []).append(by_name[name])
    return groups


class _Reached(Exception):  # noqa: N818 - control flow: what lies behind is not needed
    """A layer got as far as the input that was asked for."""


@contextmanager
def _caught(module: nn.Module, catch: Callable[[torch.Tensor], None]) -> Iterator[None]:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
        catch(args[0].reshape(-1, args[0].shape[-1]))

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _inputs(
    layer: nn.Module, calls: Sequence[LayerCall], stream: Sequence[torch.Tensor], paths: Mapping[str, str]
) -> tuple[dict[str, list[torch.Tensor]], list[torch.Tensor]]:
    """Inputs `[T, N]` of each batch by owner, and what leaves the layer."""
    seen: dict[str, list[torch.Tensor]] = {owner: [] for owner in paths}
    handles = []
    for owner, path in paths.items():

        def hook(_module: nn.Module, args: tuple[Any, ...], _owner: str = owner) -> None:
            seen[_owner].append(args[0].reshape(-1, args[0].shape[-1]))

        handles.append(layer.get_submodule(path).register_forward_pre_hook(hook))
    try:
        left = [call.run(layer, x) for call, x in zip(calls, stream, strict=True)]
    finally:
        for handle in handles:
            handle.remove()
    return seen, left


def _measure(
    layer: nn.Module,
    calls: Sequence[LayerCall],
    stream: Sequence[torch.Tensor],
    path: str,
    dense: Sequence[torch.Tensor],
) -> _Pair:
    pair = _Pair.zeros(dense[0].shape[1], dense[0].device)
    for call, x, dense_input in zip(calls, stream, dense, strict=True):

        def catch(own: torch.Tensor, _dense: torch.Tensor = dense_input) -> None:
            pair.add(_dense, own)
            raise _Reached

        with _caught(layer.get_submodule(path), catch), suppress(_Reached):
            call.run(layer, x)
    return pair


def _fit(
    loaded: LoadedModel, spec: LinearSpec, rank: Rank, pair: _Pair, g: torch.Tensor | None, settings: Refine
) -> None:
    """Put the best map of that rank from `x'` to `W (b x + (1 - b) x')` in the place of the linear."""
    module = loaded.model.get_submodule(spec.name)
    dense = weight_of(module)
    weight = dense.to(WORK_DTYPE)
    own, cross = pair.own / pair.tokens, pair.cross / pair.tokens
    own_mean, dense_mean = pair.own_sum / pair.tokens, pair.dense_sum / pair.tokens
    if settings.centred:
        scale = own.diagonal().mean()
        own, cross = own - torch.outer(own_mean, own_mean), cross - torch.outer(dense_mean, own_mean)
        if own.diagonal().mean() <= _ROUNDING * scale:  # one and the same input in every token: the rest is rounding
            own, cross = torch.zeros_like(own), torch.zeros_like(cross)
    ridge = damped(own, settings.damping) - own
    aim = settings.mix * cross + (1 - settings.mix) * own + ridge
    factor, failed = torch.linalg.cholesky_ex(own + ridge)
    if bool(failed):
        raise NonFiniteError(f"The moment of the inputs of {spec.name} is not positive definite, so it has no fit.")
    best = torch.cholesky_solve((weight @ aim).T, factor).T
    if rank == DENSE:
        low, right = best, None
    else:
        metric = None if g is None else damped(g, settings.metric_damping)
        (factors,) = solve([Target(best, own + ridge, metric, int(rank))])
        low, right = factors.left, factors.right
    if not low.isfinite().all():
        raise NonFiniteError(f"The second fit of {spec.name} gave NaN or infinity.")
    lost = None
    if settings.centred:
        mean = settings.mix * dense_mean + (1 - settings.mix) * own_mean
        lost = weight @ mean - (low @ own_mean if right is None else low @ (right @ own_mean))
    if right is None:
        dense.copy_(low)
        return
    new = make_low_rank(loaded.model, spec.name, int(rank), add_bias=settings.centred)
    assert isinstance(new, LowRankLinear)
    new.left.weight.copy_(low)
    new.right.weight.copy_(right)
    if lost is not None and new.left.bias is not None:
        new.left.bias.add_(lost)
