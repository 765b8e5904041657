"""The expensive stage: calibrate and decompose every layer, and keep the result in a store."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch

from unirank.analysis.calibration import (
    Calibration,
    calibration_of,
    checked_windows,
    gradient_windows,
    texts_of,
    with_clip,
)
from unirank.analysis.decompose import decompose_layer
from unirank.analysis.gradient_pass import gradient_pass
from unirank.analysis.identity import make_identity, weights_hash
from unirank.analysis.manifest import identity_differences
from unirank.analysis.scheme import scheme as scheme_of
from unirank.analysis.scheme.base import Scheme
from unirank.analysis.store import MANIFEST, AnalysisStore, create_or_resume, open_store
from unirank.disk.files import check_output, locked
from unirank.distributed import barrier, from_zero, process_group, rank, share, size
from unirank.errors import InputError, StoreError, warn
from unirank.layerwise.recording import Recording, Streams, record
from unirank.layerwise.statistics import calibrate_layer, calibrate_parts
from unirank.progress import OnProgress, silent
from unirank.types import ExpertSpec, LayerStats, LoadedModel


def fill_store(
    loaded: LoadedModel,
    store_path: str | Path,
    *,
    scheme: str = "whiten",
    calibration: Calibration | str | Path | None = None,
    gradients_from: str | Path | None = None,
    hidden_limit: int | None = None,
    overwrite: bool = False,
    progress: OnProgress = silent,
) -> AnalysisStore:
    """Calibrate and decompose every layer of `loaded` into the store at `store_path`, resuming what is there.

    Args:
        gradients_from: a store of the same model and calibration, with gradients: they are taken from there, so that
            several schemes share one backward pass. They are the same bytes as a pass of its own would give.
        hidden_limit: hidden states of more bytes than these go into mapped files of the store's directory while it
            runs; None is a quarter of the memory that is free. It changes no byte of the store.

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
    # A store that is gone on with keeps its clip, also one from before there was any.
    calibration = with_clip(asked, begun, source)
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
        if identity_differences(begun.identity, alike, weights_like):  # it is replaced, and its clip with it
            calibration = with_clip(asked, source)
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
            scratch = place if _hidden_bytes(loaded, windows) > _limit(loaded, hidden_limit) else None
            _fill(store, loaded, windows, chosen, calibration, backward, scratch, progress)
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
    scratch: Path | None,
    progress: OnProgress,
) -> None:
    """Make what is missing in `store`; arguments as in `analyze`, `backward` windows of all `windows` run backward,
    and hidden states are in mapped files of `scratch`, if any.

    Of several processes each runs its own batches through every layer, and process 0 writes.
    """
    stage, batch = "calibrate and decompose", calibration.batch
    collected = {"mean_abs": chosen.needs_mean_abs, "clip": calibration.clip or 0.0}
    first, count = from_zero(store.layers_done()), store.layer_count
    if backward:  # also with all layers done: one of its files may have been lost since
        if size() > 1 and from_zero(store.layers_without_gradients()):
            raise InputError(
                "Gradients are made by one process: run it without torchrun, and give its store with gradients_from=."
            )
        gradient_pass(loaded, windows[:backward], store, batch=batch, progress=progress)
    progress(stage, first, count)
    if first == count:
        return
    own = share(-(-len(windows) // batch))
    recording = record(loaded, windows[own.start * batch : own.stop * batch], batch=batch, folder=scratch)
    device = recording.start.probe.device
    # Hidden states go when their layer is done; where a finished layer's file was lost since, they are made again.
    resumed = size() == 1 and store.has_streams(first)
    streams = store.read_streams(first, device, scratch) if resumed else recording.start
    with ThreadPoolExecutor(max_workers=1) as disk:  # a layer is written while the next one is calibrated
        writing: Future[None] | None = None
        for layer in range(first if resumed else 0, count):
            moments = layer >= first and (chosen.needs_moment or backward > 0)
            with loaded.resident(layer):
                if layer < first:
                    calibrate_layer(loaded, layer, recording, streams, moments=moments, **collected)
                    continue
                gradients = store.gradients(layer, device) if backward else None
                factors, cosines, shares = {}, {}, {}
                for stats in _calibrated(loaded, layer, recording, streams, moments=moments, **collected):
                    factors |= decompose_layer(loaded, stats, chosen, gradients, full=store.full)
                    cosines, shares = stats.cosines, stats.shares
                    del stats  # a part's are as much as the next one's
            if writing is not None:
                writing.result()
                progress(stage, layer, count)
            if rank() == 0:
                # Calibration goes on with the list.
                entering = Streams(list(streams.batches), streams.probe) if size() == 1 else None
                writing = disk.submit(store.write_layer, layer, factors, cosines, entering, shares)
            del factors  # a layer's are as much as the next layer's work needs
        if writing is not None:
            writing.result()
            progress(stage, count, count)


def _calibrated(
    loaded: LoadedModel, layer: int, recording: Recording, streams: Streams, **options: Any
) -> Iterator[LayerStats]:
    """What calibration sees of one layer; in parts where it holds many experts."""
    if any(isinstance(spec, ExpertSpec) and spec.layer == layer for spec in loaded.linears):
        yield from calibrate_parts(loaded, layer, recording, streams, **options)
    else:
        yield calibrate_layer(loaded, layer, recording, streams, **options)


def _hidden_bytes(loaded: LoadedModel, windows: torch.Tensor) -> int:
    """Of the hidden states between two layers, and of the copy that the writer holds."""
    embedding = loaded.model.get_input_embeddings().weight
    assert isinstance(embedding, torch.Tensor)
    width = loaded.model.config.get_text_config().hidden_size
    return 2 * windows.numel() * width * embedding.element_size()


def _limit(loaded: LoadedModel, asked: int | None) -> int:
    if asked is not None:
        return asked
    device = loaded.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return free // 4
