"""Measuring a model that is only lent: modules are put in the place of its linears and taken out again.

Nothing is written into a weight. Whatever happens in between, an exception or Ctrl-C, the modules are then what they
were; `unirank.layerwise.lending` answers for their flags.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from unirank.analysis.store import AnalysisStore
from unirank.errors import InputError, NonFiniteError
from unirank.layerwise.recording import layers_of
from unirank.models.low_rank import LowRankLinear, align_weights, lost_output
from unirank.models.structure import weight_of
from unirank.planning.allocator.base import Request, Workbench
from unirank.planning.allocator.divergence import ALL, Counted, Window
from unirank.types import LinearSpec, LoadedModel


def workbench_of(request: Request) -> Workbench:
    """The request's workbench; raises InputError where there is none."""
    if request.workbench is None:
        raise InputError("This allocator measures the model, so its request needs a workbench.")
    return request.workbench


def whole(request: Request, name: str, least: int = 1) -> int:
    """The option `name` as a whole number; raises InputError when it is none, or is below `least`."""
    value = request.options[name]
    if value != int(value) or value < least:
        raise InputError(f"The option {name} = {value} is not legal; it must be a whole number, at least {least}.")
    return int(value)


def first_windows(workbench: Workbench, windows: int, tokens: int | None = None) -> torch.Tensor:
    """The first tokens of the first calibration windows: int64 `[W, T]`, at most `windows` of at most `tokens`.

    Raises InputError when a window has fewer than two tokens, so that nothing is predicted.
    """
    chosen = workbench.windows[:windows, :tokens]
    if chosen.shape[0] < 1 or chosen.shape[1] < 2:
        raise InputError(f"Measuring needs a window of at least 2 tokens, got windows of shape {list(chosen.shape)}.")
    return chosen


def low_rank_of(store: AnalysisStore, spec: LinearSpec, linear: nn.Module, rank: int) -> LowRankLinear:
    """What truncation would put in the place of `linear` at `rank`; `linear` and its bias are only read."""
    weight = weight_of(linear)
    left, right = store.factors(spec, rank)
    mean = store.input_mean(spec)
    bias = _bias_of(linear)
    if mean is not None:
        lost = lost_output(weight, left, right, mean)
        bias = lost if bias is None else bias + lost
    # On "meta" nothing is drawn from the global random state, which is not ours to move.
    low = LowRankLinear(spec.n, spec.m, rank, bias=bias is not None, device="meta", dtype=weight.dtype)
    low.left.weight = _fixed(left.to(weight.device))
    low.right.weight = _fixed(right.to(weight.device))
    if bias is not None:
        low.left.bias = _fixed(bias)
    low.weight = torch.full((1,), rank, dtype=torch.int64, device=weight.device)
    align_weights(low)
    return low.eval()


def _fixed(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _bias_of(linear: nn.Module) -> torch.Tensor | None:
    bias = linear.bias
    return bias.detach() if isinstance(bias, torch.Tensor) else None


@contextmanager
def replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Modules by name stand in the place of the model's own meanwhile."""
    originals = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            model.set_submodule(name, module)
        yield
    finally:
        for name, module in originals.items():
            model.set_submodule(name, module)


def truncated_modules(request: Request, ranks: Sequence[int]) -> dict[str, LowRankLinear]:
    """What truncation to `ranks` puts into the lent model, by name; K, or what costs it, means dense: nothing.

    As two factors, which is the same map in every form. Needs memory for the factors beside the dense weights.
    """
    model = workbench_of(request).loaded.model
    return {
        spec.name: low_rank_of(request.store, spec, model.get_submodule(spec.name), rank)
        for spec, rank in zip(request.linears, ranks, strict=True)
        if rank < spec.dense_rank(request.form)
    }


@contextmanager
def truncated(request: Request, ranks: Sequence[int]) -> Iterator[None]:
    """The lent model is truncated to `ranks` meanwhile, in the order of the linears; see `truncated_modules`."""
    with replaced(workbench_of(request).loaded.model, truncated_modules(request, ranks)):
        yield


@torch.no_grad()
def divergences(
    loaded: LoadedModel,
    ids: torch.Tensor,
    compressed: Callable[[LinearSpec], nn.Module | None],
    measured: Callable[[LinearSpec], None],
    *,
    counted: Counted = ALL,
    base: Mapping[str, nn.Module] | None = None,
) -> dict[str, torch.Tensor]:
    """`KL(dense || compressed)` of each linear compressed alone, by token, in nats: float64 `[T - first]`.

    Only the layers from the changed one on run, from the hidden states that enter it; those of one layer's linears run
    on together, as many as `Window.at_once`. See `Window` for the memory.

    Args:
        ids: int64 `[T]`.
        compressed: the module that takes a linear's place; None: it is not measured.
        measured: called after each linear.
        base: modules that stand in the model meanwhile, by name. Then a linear is compressed inside of that model,
            and what is returned is the divergence with it less the divergence without it. The first is from the dense
            model, as always.

    Raises:
        NonFiniteError: a divergence is NaN or infinity; names the linear, unless it is that of `base`.
    """
    window = Window(loaded, ids, counted)
    results = {}
    with replaced(loaded.model, base or {}):
        without = torch.zeros(())
        if base:
            without = window.divergences(window.onward(window.entering, 0))[0]
            if not bool(without.isfinite().all()):
                raise NonFiniteError("The output of the model that is compressed by its plan is NaN or infinity.")
        entering = window.entering
        for index in range(len(layers_of(loaded))):
            for specs in _batches(loaded, index, window.at_once):
                streams = {}
                for spec in specs:
                    module = compressed(spec)
                    if module is not None:
                        with replaced(loaded.model, {spec.name: module}):
                            streams[spec.name] = window.onward(entering, index, index + 1)
                if streams:
                    found = window.divergences(window.onward(torch.cat(list(streams.values())), index + 1))
                    results |= {name: values - without for name, values in zip(streams, found, strict=True)}
                for spec in specs:
                    if spec.name in results and not bool(results[spec.name].isfinite().all()):
                        raise NonFiniteError(f"With {spec.name} compressed, the model's output is NaN or infinity.")
                    measured(spec)
            entering = window.onward(entering, index, index + 1)
    return results


def _batches(loaded: LoadedModel, layer: int, size: int) -> list[list[LinearSpec]]:
    """The linears of a layer, `size` at a time."""
    specs = [spec for spec in loaded.linears if spec.layer == layer]
    return [specs[start : start + size] for start in range(0, len(specs), size)]
