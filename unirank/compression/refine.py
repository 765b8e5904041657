"""The second, sequential pass: ranks fixed, every linear is fitted again to what really enters it (method 3).

Two streams go through the layers in order: `x` of the dense model and `x'` of the layers that are already compressed.
Inside a layer the linears follow in the order of their inputs, so that each sees what those before it have lost.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch

from unirank.analysis.hidden import free_bytes
from unirank.analysis.store import AnalysisStore
from unirank.compression.replay import Inputs, Replay
from unirank.compression.second_fit import Pair, Refine, fit
from unirank.compression.truncation import TruncateReport, check_plan, settle
from unirank.layerwise.recording import record
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
    room: int | None = None,
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
        room: bytes of what is kept of a layer's inputs, and as many of what its modules gave; batches beyond run again
            for every input, with the same bits. None is a quarter of what is free when the pass begins (**choice**).

    Raises NonFiniteError when a fit is NaN or infinity, also in the dtype of the model; names the linear.
    """
    recording = record(loaded, windows, batch=batch)
    dense_stream, own_stream = list(recording.start.batches), list(recording.start.batches)
    recording.start.batches.clear()  # else the embeddings stay as long as the recording
    probe = recording.start.probe
    if room is None:
        room = free_bytes(probe.device) // 4
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
        seen = Inputs(original, calls, dense_stream, list(paths.values()), room=room)
        del original
        linears = [layer.path_of(spec.name) for spec in layer.specs]
        replay = Replay(layer.module, calls, own_stream, linears, entered, room=room)
        for owner in owners:
            pair = Pair.zeros(wanted[owner][0].n, probe.device, clip=clip)
            for x, own in zip(seen.inputs(paths[owner]), replay.inputs(paths[owner]), strict=True):
                pair.add(x, own)
                del x, own  # else they are there while the next ones are made
            for spec in wanted[owner]:
                g = metrics[spec.name].g.to(probe.device) if metrics else None
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
