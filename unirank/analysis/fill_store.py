"""The expensive stage: calibrate and decompose every layer, and keep the result in a store."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path

import torch

from unirank.analysis.calibration import (
    PRECISIONS,
    Calibration,
    calibration_of,
    checked_windows,
    gradient_windows,
    settled,
    texts_of,
)
from unirank.analysis.decompose import decompose_layer, weights_of_layer
from unirank.analysis.gradient_pass import gradient_pass
from unirank.analysis.hidden import Place, place_of
from unirank.analysis.identity import make_identity, weights_hash
from unirank.analysis.manifest import identity_differences
from unirank.analysis.overlap import THREADS, Finishing, Solvers, shares_of
from unirank.analysis.scheme import scheme as scheme_of
from unirank.analysis.scheme.base import Scheme
from unirank.analysis.store import MANIFEST, AnalysisStore, create_or_resume, open_store
from unirank.disk.files import check_output, locked
from unirank.distributed import barrier, from_zero, process_group, rank, share, size
from unirank.errors import InputError, StoreError, warn
from unirank.layerwise.recording import record
from unirank.layerwise.statistics import calibrate_layer, calibrate_parts
from unirank.progress import OnProgress, silent
from unirank.queues import CALLS, Beside, has_queues
from unirank.types import ExpertSpec, Factors, LayerStats, LoadedModel


def fill_store(
    loaded: LoadedModel,
    store_path: str | Path,
    *,
    scheme: str = "whiten",
    calibration: Calibration | str | Path | None = None,
    gradients_from: str | Path | None = None,
    hidden_limit: int | None = None,
    keep_hidden: bool | None = None,
    overwrite: bool = False,
    progress: OnProgress = silent,
) -> AnalysisStore:
    """Calibrate and decompose every layer of `loaded` into the store at `store_path`, resuming what is there.

    Args:
        gradients_from: a store of the same model and calibration, with gradients: they are taken from there, so that
            several schemes share one backward pass. They are the same bytes as a pass of its own would give.
        hidden_limit: hidden states of more bytes than these go into mapped files of the store's directory while it
            runs; None is a quarter of the memory that is free, and beside a GPU first the host's memory up to a quarter
            of it. It changes no byte of the store.
        keep_hidden: what enters the next layer is written into the store's directory too, so that a run that was killed
            goes on from there; without it the layers that are done run again, which takes a part of the time that they
            took and gives the same bytes. None is True on a CPU and False on a GPU.

    Raises:
        InputError: unknown scheme, unusable text, an output directory that is not a store, a model that was compressed.
        StoreError: the store, or that of the gradients, belongs to other inputs; says what differs.
        NonFiniteError: names the layer or linear.
        WriteError: the disk refused; finished layers stay and the next run resumes.
    """
    loaded.require_dense()
    calibration = calibration_of(calibration)
    chosen = scheme_of(scheme)
    source = open_store(gradients_from) if gradients_from is not None else None
    if source is not None:
        source.require_gradients()
        if calibration.gradient_windows is None:
            count = source.identity.calibration.gradient_windows
            calibration = dataclasses.replace(calibration, gradient_windows=count)
    place = Path(store_path)
    asked, begun = calibration, _begun(place, overwrite)
    # A store that is gone on with keeps its clip and its shrinkage, also one from before there was any.
    calibration = settled(asked, chosen, begun, source)
    backward = gradient_windows(calibration, chosen)
    if backward:
        loaded.require_no_experts("A backward pass")
    texts = texts_of(loaded, calibration)
    windows, notes = checked_windows(loaded, texts, calibration, moments=chosen.needs_moment)
    weights = weights_hash(loaded)
    identity = make_identity(loaded, texts, windows, calibration, backward, scheme, weights_sha256=weights)

    def weights_like(recorded: str) -> str:
        return weights_hash(loaded, like=recorded)

    if overwrite and begun is not None:
        alike = dataclasses.replace(identity, processes=begun.identity.processes)
        if identity_differences(begun.identity, alike, weights_like):  # it is replaced, and these with it
            calibration = settled(asked, chosen, source=source)
            identity = make_identity(loaded, texts, windows, calibration, backward, scheme, weights_sha256=weights)
    if source is not None:
        source.check_shared(identity, weights_like)
    if not place.is_dir():  # else create_or_resume looks into it
        check_output(place, marker=MANIFEST, overwrite=True)
    with process_group():
        if size() > 1:
            identity = dataclasses.replace(identity, processes=size())
            _check_processes(windows, calibration.batch)
        with locked(place) if rank() == 0 else nullcontext():
            store = AnalysisStore(place, identity, loaded.linears)
            if rank() == 0:
                store = create_or_resume(place, identity, loaded.linears, overwrite=overwrite, weights=weights_like)
                if source is not None:
                    store.share_gradients(source)
            barrier()
            if rank() == 0 and not store.complete:
                for note in notes:
                    warn(note)
            hidden = place_of(loaded, windows, place, limit=hidden_limit, keep=keep_hidden)
            _fill(store, loaded, windows, chosen, calibration, backward, hidden, progress)
            barrier()
    return store


def _begun(place: Path, overwrite: bool) -> AnalysisStore | None:
    """The store that is there, if any; with `overwrite` a damaged one is none, as in `create_or_resume`."""
    if not (place / MANIFEST).is_file():
        return None
    try:
        return open_store(place)
    except StoreError:
        if not overwrite:
            raise
        return None


def _check_processes(windows: torch.Tensor, batch: int) -> None:
    batches = -(-len(windows) // batch)
    if batches < size():
        raise InputError(
            f"{size()} processes need a batch of windows each, and there are {batches} of {batch}; "
            "use fewer processes, more windows or a smaller batch (Calibration.windows, Calibration.batch)."
        )


def _fill(
    store: AnalysisStore,
    loaded: LoadedModel,
    windows: torch.Tensor,
    chosen: Scheme,
    calibration: Calibration,
    backward: int,
    hidden: Place,
    progress: OnProgress,
) -> None:
    """Make what is missing in `store`; arguments as in `analyze`, `backward` windows of all `windows` run backward.

    Of several processes each runs its own batches through every layer, and process 0 writes.
    """
    stage, batch = "calibrate and decompose", calibration.batch
    collected = {"mean_abs": chosen.needs_mean_abs, "clip": calibration.clip or 0.0}
    collected["shrink"] = calibration.shrink or 0.0
    first, count = from_zero(store.layers_done()), store.layer_count
    if backward:  # also with all layers done: one of its files may have been lost since
        if size() > 1 and from_zero(store.layers_without_gradients()):
            raise InputError(
                "Gradients are made by one process: run it without torchrun, and give its store with gradients_from=."
            )
        gradient_pass(loaded, windows[:backward], store, batch=batch, keep=hidden.keep, progress=progress)
    progress(stage, first, count)
    if first == count:
        return
    own = share(-(-len(windows) // batch))
    own_windows = windows[own.start * batch : own.stop * batch]
    recording = record(loaded, own_windows, batch=batch, folder=hidden.folder, host=hidden.host)
    device, work = recording.start.probe.device, PRECISIONS[calibration.precision]
    # Hidden states go when their layer is done; where there are none, finished layers run again to make them.
    resumed = size() == 1 and store.has_streams(first)
    streams = store.read_streams(first, device, hidden.folder, hidden.host) if resumed else recording.start

    def factors_of(stats: LayerStats, weights: Mapping[str, torch.Tensor], full: bool) -> dict[str, Factors]:
        gradients = store.gradients(stats.layer, device) if backward else None
        more = {"weights": weights, "solvers": solvers, "full": full, "work": work}
        return decompose_layer(loaded, stats, chosen, gradients, **more)

    with ExitStack() as stack:
        solvers, beside = None, False
        if has_queues(device):
            shares = shares_of(CALLS.free(device), loaded.linears, work)
            solvers = Solvers(stack.enter_context(Beside(device, THREADS)), shares.room)
            beside = shares.beside and size() == 1  # two threads of a process could not both talk to the others
        finishing = stack.enter_context(
            Finishing(store, device, beside=beside, report=lambda done: progress(stage, done, count))
        )
        for layer in range(first if resumed else 0, count):
            moments = layer >= first and (chosen.needs_moment or backward > 0)
            with loaded.resident(layer, then=layer + 1):
                if layer < first:
                    calibrate_layer(loaded, layer, recording, streams, moments=moments, **collected)
                    continue
                weights = weights_of_layer(loaded, layer)
                if any(isinstance(spec, ExpertSpec) and spec.layer == layer for spec in loaded.linears):
                    factors: dict[str, Factors] = {}
                    for stats in calibrate_parts(loaded, layer, recording, streams, moments=moments, **collected):
                        factors |= factors_of(stats, weights, store.full)
                        cosines, shared = stats.cosines, stats.shares
                        del stats  # a part's are as much as the next one's
                    solve = partial(dict, factors)
                    del factors
                else:
                    stats = calibrate_layer(loaded, layer, recording, streams, moments=moments, **collected)
                    cosines, shared = stats.cosines, stats.shares
                    solve = partial(factors_of, stats, weights, store.full)
                    del stats  # a layer's are as much as the next layer's work needs
                entering = streams.settled() if hidden.keep and size() == 1 else None
                finishing.take(layer, cosines, shared, entering, solve)
                del solve, entering, weights
        finishing.end()
