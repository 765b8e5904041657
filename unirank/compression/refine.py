"""The second, sequential pass: ranks fixed, every linear is fitted again to what really enters it (method 3).

Two streams go through the layers in order: `x` of the dense model and `x'` of the layers that are already compressed.
Inside a layer the linears follow in the order of their inputs, so that each sees what those before it have lost.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from unirank.analysis.store import AnalysisStore
from unirank.compression.replay import Replay
from unirank.compression.second_fit import Pair, Refine, fit
from unirank.compression.truncation import TruncateReport, check_plan, settle
from unirank.layerwise.recording import LayerCall, record
from unirank.layerwise.trace import traced_layer
from unirank.models.low_rank import count_parameters
from unirank.progress import OnProgress, silent
from unirank.rank_plan import RankPlan
from unirank.types import DENSE, Form, Gradient, LinearSpec, LoadedModel, Rank


def refine(
    loaded: LoadedModel,
    store: AnalysisStore,
    plan: RankPlan,
    windows: torch.Tensor,
    settings: Refine,
    *,
    progress: OnProgress = silent,
) -> TruncateReport:
    """Compress `loaded` in place at the ranks of `plan` by a second pass, instead of `truncate`.

    Args:
        store: the analysis of the plan; with `settings.metric`, also the source of the gradients.
        windows: calibration tokens, int64 `[W, T]`, usually those of the analysis.

    Raises like `truncate`; NonFiniteError when a fit is NaN or infinity, with the name of the linear.
    """
    loaded.require_no_experts("The second pass")
    check_plan(loaded, store, plan)
    before = count_parameters(loaded.model)
    gradients = store.gradients if settings.metric else None
    used = store.identity.calibration
    refit(
        loaded,
        plan.ranks,
        windows,
        settings,
        batch=used.batch,
        clip=used.clip or 0.0,
        gradients=gradients,
        form=plan.form,
        progress=progress,
    )
    return settle(loaded, plan, before)


@torch.no_grad()
def refit(
    loaded: LoadedModel,
    ranks: Mapping[str, Rank],
    windows: torch.Tensor,
    settings: Refine,
    *,
    batch: int = 8,
    clip: float = 0.0,
    gradients: Callable[[int], Mapping[str, Gradient]] | None = None,
    form: Form = "factors",
    progress: OnProgress = silent,
) -> None:
    """Replace every linear of `loaded` that `ranks` gives a rank, layer by layer.

    Args:
        ranks: of every target.
        windows: calibration tokens, int64 `[W, T]`.
        batch: windows that run together.
        clip: of the tokens, as `Calibration.clip`; 0 clips nothing.
        gradients: of a layer; then the fit is in the output metric of `kfac`.
        form: in which low-rank matrices are stored.

    Raises NonFiniteError when a fit is NaN or infinity, also in the dtype of the model; names the linear.
    """
    recording = record(loaded, windows, batch=batch)
    dense_stream, own_stream = list(recording.start.batches), list(recording.start.batches)
    probe = recording.start.probe
    for index in range(loaded.layer_count):
        entered = recording.probe_calls[index], probe
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
        del original
        replay = Replay(layer.module, calls, own_stream, [layer.path_of(spec.name) for spec in layer.specs], entered)
        for owner in owners:
            pair = _measure(replay.inputs(paths[owner]), seen.pop(owner), clip)
            for spec in wanted[owner]:
                g = metrics[spec.name].g if metrics else None
                fit(loaded, spec, ranks[spec.name], pair, g, settings, form)
        own_stream = replay.outputs()
        progress("refine", index + 1, loaded.layer_count)


def _groups(specs: Sequence[LinearSpec], input_of: Mapping[str, str]) -> dict[str, list[LinearSpec]]:
    """Linears by the first one that reads the same input, in the order in which they run."""
    by_name = {spec.name: spec for spec in specs}
    groups: dict[str, list[LinearSpec]] = {}
    for name, owner in input_of.items():  # the trace lists them as they ran
        groups.setdefault(owner, []).append(by_name[name])
    return groups


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


def _measure(own: Iterator[torch.Tensor], dense: list[torch.Tensor], clip: float) -> Pair:
    """The moments of what enters a linear in both streams, `[T, N]` a batch; `dense` is used up."""
    pair = Pair.zeros(dense[0].shape[1], dense[0].device, clip=clip)
    dense.reverse()
    for x in own:
        pair.add(dense.pop(), x)
    return pair
