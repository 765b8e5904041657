"""What a run will need, from the work on one layer: memory, disk, time."""

from __future__ import annotations

import resource
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from unirank import looks
from unirank.analysis.calibration import (
    PRECISIONS,
    Calibration,
    calibration_of,
    checked_windows,
    gradient_windows,
    settled,
    texts_of,
)
from unirank.analysis.decompose import decompose_layer
from unirank.analysis.identity import Identity, make_identity
from unirank.analysis.overlap import THREADS, needs_of_decomposition, shares_of
from unirank.analysis.scheme import scheme as scheme_of
from unirank.analysis.scheme.base import Scheme
from unirank.analysis.store import create_or_resume
from unirank.errors import InputError, warn
from unirank.layerwise.backward import backward_layer, head_gradient
from unirank.layerwise.lending import lent
from unirank.layerwise.recording import Recording, Streams, record
from unirank.layerwise.statistics import calibrate_parts
from unirank.models.shards import SHARD_BYTES
from unirank.progress import OnProgress, Stopwatch, gib, silent
from unirank.queues import has_queues
from unirank.types import LinearSpec, LoadedModel


@dataclass(frozen=True)
class Needs:
    """What a run needs. Bytes and seconds; memory and disk are peaks of the run, `available_*` what is there now.

    Attributes:
        seconds: of all of it.
        memory: of the process; on a GPU, of the GPU. Of the analysis, and of writing the checkpoint of its factors.
        whole_memory, stream_memory: the same when the model is loaded as a whole, and when it is streamed.
        disk: of store and, where `remove` was given, checkpoint, with what is deleted again.
        behind: seconds of each stage that runs the model again behind the analysis, by its name; part of `seconds`.
            Not measured: see `unirank.stages.with_stages_behind`.
    """

    seconds: float
    memory: int
    whole_memory: int
    stream_memory: int
    disk: int
    available_memory: int
    available_disk: int
    layers: int
    device: str
    behind: Mapping[str, float] = field(default_factory=dict)

    @property
    def analysis_seconds(self) -> float:
        """Without the stages behind the analysis."""
        return self.seconds - sum(self.behind.values())

    def __repr__(self) -> str:
        parts = {"analysis": self.analysis_seconds, **self.behind} if self.behind else {}
        told = ", ".join(f"{name} {seconds:,.0f}" for name, seconds in parts.items())
        return looks.lines(
            f"Needs: {'it fits' if self.fits else 'it does not fit'}; about {self.seconds:,.0f} s on {self.device}",
            f"seconds: {told}" if told else "",
            f"memory: {gib(self.memory)} of {gib(self.available_memory)}; whole {gib(self.whole_memory)}, "
            f"streamed {gib(self.stream_memory)}",
            f"disk: {gib(self.disk)} of {gib(self.available_disk)}",
            f"from the work on one of {self.layers} layers",
        )

    @property
    def fits(self) -> bool:
        return self.memory <= self.available_memory and self.disk <= self.available_disk

    def require_fit(self) -> None:
        """Raise InputError where memory or disk is short; it says what would fit."""
        if self.memory > self.available_memory:
            advice = "a shorter Calibration.window, a smaller Calibration.batch, fewer Calibration.windows or "
            advice += "a machine with more"
            if self.stream_memory <= self.available_memory:
                advice = f"stream=True needs {gib(self.stream_memory)}"
            raise InputError(
                f"It needs {gib(self.memory)} of memory, and {gib(self.available_memory)} are free; {advice}."
            )
        if self.disk > self.available_disk:
            raise InputError(
                f"It needs {gib(self.disk)} on the disk, and {gib(self.available_disk)} are free; "
                "fewer Calibration.windows need less, or choose another place."
            )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"fits": self.fits}


def dry_run(
    loaded: LoadedModel,
    place: Path,
    *,
    scheme: str = "whiten",
    calibration: Calibration | str | Path | None = None,
    stream: bool = False,
    remove: float | None = None,
    keep_hidden: bool | None = None,
    progress: OnProgress = silent,
) -> Needs:
    """Do the work of one batch on one layer, the first of the largest ones, and scale it to the whole analysis.

    The peak of the process so far counts as needed, so this is best the first thing that a process does.

    Args:
        loaded: the model, loaded with `stream` whatever the run will do.
        place: where the store will be; the nearest directory that exists is written to, and left as it was.
        stream: whether the run will stream.
        remove: where a checkpoint will be written, the fraction removed.
        keep_hidden: as in `analyze`.

    Raises InputError, NonFiniteError and WriteError like `analyze`.
    """
    loaded.require_dense()
    chosen = scheme_of(scheme)
    calibration = settled(calibration_of(calibration), chosen)
    backward = gradient_windows(calibration, chosen)
    texts = texts_of(loaded, calibration)
    windows, notes = checked_windows(loaded, texts, calibration, moments=chosen.needs_moment)
    for note in notes:
        warn(note)
    identity = make_identity(loaded, texts, windows, calibration, backward, scheme, weights_sha256="estimate")
    if backward:
        loaded.require_no_experts("A backward pass")
    keep = not has_queues(loaded.device) if keep_hidden is None else keep_hidden
    index = _largest_layer(loaded)
    batch = windows[: calibration.batch]
    one = _work_on_layer(loaded, index, batch, chosen, identity, backward > 0, keep, _existing(place), progress)
    batches = max(1.0, len(windows) / calibration.batch)
    share = backward / len(windows)
    params = sum(spec.params for spec in loaded.linears)
    first = [spec for spec in loaded.linears if spec.layer == index]
    scale = params / sum(spec.params for spec in first)  # the layers, in units of this one
    element = next(loaded.model.parameters()).element_size()
    others = sum(parameter.numel() for parameter in loaded.model.parameters()) - params

    # Beside the one batch: the others, as they are and as the writer holds them, and how their layers are called.
    held = batches * one.stream_bytes * (2 if keep else 1)
    copies = (2 if keep else 1) if not has_queues(one.device) or held <= _available(one.device) // 4 else 0
    streamed = one.peak + (batches - 1) * (copies * one.stream_bytes + one.call_bytes)
    whole = streamed + (scale - 1) * sum(spec.params for spec in first) * element
    if not has_queues(one.device):  # else it is the host's memory that is read ahead into
        streamed += sum(spec.params for spec in first) * element
    beside = 0
    if has_queues(one.device):
        left = _available(one.device) - int(streamed if stream else whole)
        beside = _beside(left, loaded.linears, PRECISIONS[calibration.precision])
        if beside:  # and the weights of a streamed layer stay behind it
            streamed += beside + sum(spec.params for spec in first) * element
            whole += beside

    layer = one.read + batches * one.calibrate + one.decompose
    if beside:
        layer = one.read + max(batches * one.calibrate, one.decompose)
    # A layer is written while the next one is calibrated.
    seconds = batches * one.record + scale * max(layer, one.write)
    seconds += (
        scale * batches * share * (one.forward + one.backward + 2 * one.write_stream) + share * batches * one.head
    )
    disk = scale * one.layer_bytes + (2 * batches * one.stream_bytes if keep else 0)
    if backward:
        disk += scale * sum(4 * (spec.m**2 + spec.params) for spec in first)
        disk += (scale + 1) * batches * share * one.stream_bytes if keep else 0
    if remove is not None:
        out = ((1 - remove) * params + others) * element
        disk += out
        seconds += 2 * out * one.write / (one.layer_bytes + one.stream_bytes)  # read once more and written
        streamed = max(streamed, one.resting + 2 * min(SHARD_BYTES, out))
    return Needs(
        seconds=seconds,
        memory=int(streamed if stream else whole),
        whole_memory=int(whole),
        stream_memory=int(streamed),
        disk=int(disk),
        available_memory=_available(one.device),
        available_disk=shutil.disk_usage(_existing(place)).free,
        layers=loaded.layer_count,
        device=str(one.device),
    )


def _beside(free: int, linears: Sequence[LinearSpec], work: torch.dtype) -> int:
    """Bytes of a decomposition beside the calibration of the next layer, of `free` ones of a GPU; 0 without room."""
    shares = shares_of(max(0, free), linears, work)
    largest, held = needs_of_decomposition(linears, work)
    return min(shares.room, THREADS * largest) + held if shares.beside else 0


@dataclass
class _Work:
    """Seconds and bytes of one batch on one layer."""

    device: torch.device
    stream_bytes: int = 0
    call_bytes: int = 0
    layer_bytes: int = 0
    resting: int = 0  # in use before the work on the layer
    peak: int = 0
    record: float = 0.0
    read: float = 0.0  # the layer's weights
    calibrate: float = 0.0
    decompose: float = 0.0
    write: float = 0.0  # factors and the stream
    write_stream: float = 0.0
    forward: float = 0.0
    backward: float = 0.0
    head: float = 0.0


def _largest_layer(loaded: LoadedModel) -> int:
    """The first of the layers with the most parameters: in mixtures of experts, the first ones are often without."""
    sizes: dict[int, int] = {}
    for spec in loaded.linears:
        sizes[spec.layer] = sizes.get(spec.layer, 0) + spec.params
    return max(sizes, key=lambda layer: sizes[layer])


def _work_on_layer(
    loaded: LoadedModel,
    index: int,
    windows: torch.Tensor,
    scheme: Scheme,
    identity: Identity,
    backward: bool,
    keep: bool,
    place: Path,
    progress: OnProgress,
) -> _Work:
    stage, steps = "measure one layer", 5
    progress(stage, 0, steps)
    device = loaded.device
    clock = Stopwatch((lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else None)
    work = _Work(device)
    recording = record(loaded, windows, batch=len(windows))
    work.record = clock.lap()
    streams = recording.start
    work.resting = _in_use(device)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".unirank-", dir=place)))
        clock.lap()
        stack.enter_context(loaded.resident(index))
        work.read = clock.lap()
        moving = Streams(list(streams.batches), streams.probe)
        for _ in range(2):  # the first time warms up
            moving = Streams(list(streams.batches), streams.probe)
            clock.lap()
            parts = calibrate_parts(
                loaded,
                index,
                recording,
                moving,
                moments=scheme.needs_moment or backward,
                mean_abs=scheme.needs_mean_abs,
                clip=identity.calibration.clip or 0.0,
                shrink=identity.calibration.shrink or 0.0,
            )
            stats = next(parts)
            work.calibrate = clock.lap()
        progress(stage, 1, steps)
        gradients = None
        if backward:
            with torch.no_grad():
                layer = loaded.model.get_submodule(f"{loaded.layers}.{index}")
                recording.calls[0][index].run(layer, streams.batches[0])
            work.forward = clock.lap()
            with lent(loaded.model):
                gradients, _ = backward_layer(loaded, index, recording, streams.batches, streams.batches)
                work.backward = clock.lap()
                for ids, hidden in zip(windows, streams.batches[0], strict=True):
                    head_gradient(loaded, recording, ids[None], hidden[None], 0)
                work.head = clock.lap()
        progress(stage, 2, steps)
        clock.lap()
        work_dtype = PRECISIONS[identity.calibration.precision or "float64"]
        factors = decompose_layer(loaded, stats, scheme, gradients, work=work_dtype)
        work.decompose = clock.lap()
        cosines, shares = stats.cosines, stats.shares
        del stats
        for more in parts:  # of a layer with many experts
            work.calibrate += clock.lap()
            factors |= decompose_layer(loaded, more, scheme, gradients, work=work_dtype)
            work.decompose += clock.lap()
            del more
        progress(stage, 3, steps)
        store = create_or_resume(scratch / "store", identity, loaded.linears)
        clock.lap()
        store.write_scratch("forward", 0, streams.batches)
        work.write_stream = clock.lap()
        progress(stage, 4, steps)
        store.write_layer(index, factors, cosines, moving if keep else None, shares)
        work.write = clock.lap()
        work.layer_bytes = store.layer_file(index).stat().st_size
    progress(stage, steps, steps)
    work.stream_bytes = sum(hidden.nbytes for hidden in streams.batches)
    work.call_bytes = _call_bytes(recording)
    work.peak = _peak(device)
    return work


def _call_bytes(recording: Recording) -> int:
    """Bytes of the tensors that a batch's layer calls hold, masks above all; each once."""
    found: dict[int, int] = {}
    for call in recording.calls[0]:
        for value in (*call.args, *call.kwargs.values()):
            for tensor in value if isinstance(value, tuple) else (value,):
                if isinstance(tensor, torch.Tensor):
                    found[tensor.data_ptr()] = tensor.nbytes
    return sum(found.values())


def _peak(device: torch.device) -> int:
    """Most bytes in use so far: of the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _in_use(device: torch.device) -> int:
    """Bytes in use now, as `_peak` counts them."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def _available(device: torch.device) -> int:
    """Bytes that this process may have in all: what is free now and what it holds."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    given = limit.read_text().strip() if limit.is_file() else "max"
    return min(free, int(given)) if given.isdigit() else free


def _existing(place: Path) -> Path:
    return next(path for path in (place.absolute(), *place.absolute().parents) if path.is_dir())
