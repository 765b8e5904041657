"""Measuring a model that is only lent: modules are put in the place of its linears and taken out again.

Nothing is written into a weight. Whatever happens in between, an exception or Ctrl-C, the modules are then what they
were; `unirank.layerwise.lending` answers for their flags.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from unirank.analysis.store import AnalysisStore
from unirank.errors import InputError, NonFiniteError
from unirank.layerwise.head import head_logits
from unirank.layerwise.recording import layers_of, record
from unirank.models.low_rank import LowRankLinear, align_weights, lost_output
from unirank.models.structure import weight_of
from unirank.planning.allocator.base import Request, Workbench
from unirank.types import LinearSpec, LoadedModel

_TOKENS_AT_ONCE = 64  # rows of log-probabilities, as wide as the vocabulary, that are compared together


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


@contextmanager
def truncated(request: Request, ranks: Sequence[int]) -> Iterator[None]:
    """The lent model is truncated to `ranks` meanwhile, in the order of the linears; K, or what costs it, means dense.

    As two factors, which is the same map in every form.

    Needs memory for the factors beside the dense weights.
    """
    model = workbench_of(request).loaded.model
    modules = {
        spec.name: low_rank_of(request.store, spec, model.get_submodule(spec.name), rank)
        for spec, rank in zip(request.linears, ranks, strict=True)
        if rank < spec.dense_rank(request.form)
    }
    with replaced(model, modules):
        yield


@torch.no_grad()
def divergences(
    loaded: LoadedModel,
    ids: torch.Tensor,
    compressed: Callable[[LinearSpec], nn.Module],
    measured: Callable[[LinearSpec], None],
) -> dict[str, float]:
    """`KL(dense || compressed)` of each linear compressed alone, mean over the tokens of one window, in nats.

    Only the layers from the changed one on run, from the dense hidden states that enter it. Holds the dense
    log-probabilities and one set of logits of the window, `[T, vocabulary]` each.

    Args:
        ids: int64 `[T]`.
        compressed: the module that takes a linear's place.
        measured: called after each linear.

    Raises:
        NonFiniteError: a divergence is NaN or infinity; names the linear.
    """
    recording = record(loaded, ids[None], batch=1)
    layers, calls = layers_of(loaded), recording.calls[0]

    def onward(first: int, hidden: torch.Tensor) -> torch.Tensor:
        for layer, call in zip(layers[first:], calls[first:], strict=True):
            hidden = call.run(layer, hidden)
        return head_logits(loaded, recording, ids[None], hidden)[0]

    entering = recording.start.batches[0]
    dense = onward(0, entering).float().log_softmax(-1)
    results = {}
    for index, (layer, call) in enumerate(zip(layers, calls, strict=True)):
        for spec in loaded.linears:
            if spec.layer == index:
                with replaced(loaded.model, {spec.name: compressed(spec)}):
                    results[spec.name] = _divergence(dense, onward(index, entering))
                if not math.isfinite(results[spec.name]):
                    raise NonFiniteError(f"With {spec.name} compressed, the model's output is NaN or infinity.")
                measured(spec)
        entering = call.run(layer, entering)
    return results


def _divergence(dense: torch.Tensor, logits: torch.Tensor) -> float:
    """Mean over tokens of `Σ p (log p - log q)`: `dense` log-probabilities, `logits` of q, `[T, vocabulary]`."""
    total = 0.0
    for log_p, part in zip(dense.split(_TOKENS_AT_ONCE), logits.split(_TOKENS_AT_ONCE), strict=True):
        log_q = part.float().log_softmax(-1)
        total += float(F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).double().sum())
    # Rounding can put the divergence of nearly equal outputs below zero.
    return max(total / len(dense), 0.0) if math.isfinite(total) else total
