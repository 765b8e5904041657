"""One backward pass over all layers, into the store; a killed pass resumes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack

import torch

from unirank.analysis.between import Between, InMemory, OnDisk
from unirank.analysis.hidden import place_of
from unirank.analysis.store import AnalysisStore
from unirank.errors import NonFiniteError
from unirank.layerwise.backward import backward_layer, head_gradient
from unirank.layerwise.lending import lent
from unirank.layerwise.recording import Recording, layers_of, record
from unirank.progress import OnProgress, silent
from unirank.queues import Beside, has_queues
from unirank.types import Gradient, LoadedModel

_STAGE = "gradients"


def gradient_pass(
    loaded: LoadedModel,
    windows: torch.Tensor,
    store: AnalysisStore,
    *,
    batch: int,
    keep: bool | None = None,
    progress: OnProgress = silent,
) -> None:
    """Write the gradients of every layer to `store`, resuming what is there. `windows` int64 `[W, T]`.

    Args:
        keep: what passes between layers is written to the disk, and a pass that was killed goes on from there. Else it
            stays in memory (see `InMemory`), and a pass that was killed runs again, without the sums of layers that are
            done. The same bytes. None is True on a CPU and False on a GPU.

    Raises:
        InputError: no gradient reaches a linear; names it.
        NonFiniteError: a hidden state, the loss or a gradient is NaN or infinity; names the layer, window or linear.
        WriteError: the disk refused; finished layers stay.
    """
    count = store.layer_count
    steps = 2 * count
    remaining = store.layers_without_gradients()
    if remaining == 0:
        progress(_STAGE, steps, steps)
        return
    gpu = has_queues(loaded.device)
    keep = not gpu if keep is None else keep
    with ExitStack() as stack:
        stack.enter_context(lent(loaded.model))
        recording = record(loaded, windows, batch=batch)
        between = _between(loaded, windows, store, recording.start.probe.device, keep=keep)
        begin = remaining
        if not between.has("backward", remaining) or _forward_done(between, count) < remaining:
            begin = count  # not started, or what a killed run needs is not there any more
            _forward(loaded, windows.split(batch), recording, between, count, progress)
            remaining = count if keep else remaining
        progress(_STAGE, steps - begin, steps)
        writer = _Writer(store, stack.enter_context(Beside(loaded.device)) if gpu else None)
        for layer in reversed(range(begin)):
            inputs, outputs = between.read("forward", layer), between.read("backward", layer + 1)
            with loaded.resident(layer, then=layer - 1):
                found, arriving = backward_layer(loaded, layer, recording, inputs, outputs, sums=layer < remaining)
            if layer:
                between.write("backward", layer, arriving)

            def done(layer: int = layer) -> None:
                progress(_STAGE, steps - layer, steps)

            if layer < remaining:
                writer.write(layer, found, done)
            else:
                done()
            between.remove("backward", layer + 1)
            between.remove("forward", layer)
        writer.end()


class _Writer:
    """Writes gradients; with a thread, one layer's are on their way to the disk while the next one is at work.

    A layer is done when its file is whole, and layers are written in order.
    """

    def __init__(self, store: AnalysisStore, thread: Beside | None) -> None:
        self._store, self._thread = store, thread
        self._writing: tuple[Future[None], Callable[[], None]] | None = None

    def write(self, layer: int, gradients: Mapping[str, Gradient], done: Callable[[], None]) -> None:
        """`done` is called when they are written. Raises what writing these and earlier ones raises."""
        self.end()
        if self._thread is None:
            self._store.write_gradients(layer, gradients)
            done()
        else:
            self._writing = self._thread.submit(self._store.write_gradients, layer, gradients), done

    def end(self) -> None:
        """All of them are written."""
        if self._writing is not None:
            (future, done), self._writing = self._writing, None
            future.result()
            done()


def _between(
    loaded: LoadedModel, windows: torch.Tensor, store: AnalysisStore, device: torch.device, *, keep: bool
) -> Between:
    if keep:
        return OnDisk(store, device)
    # What enters every layer and leaves the last one, and the gradients at two of them: as many times the windows.
    sets = windows.expand(store.layer_count + 3, -1, -1)
    return InMemory(place_of(loaded, sets, store.path, limit=None, keep=False), device)


def _forward_done(between: Between, count: int) -> int:
    """How many layers' inputs are there, from the first without a gap; behind the last layer counts as one more."""
    return next((i for i in range(count + 1) if not between.has("forward", i)), count + 1)


def _forward(
    loaded: LoadedModel,
    windows: Sequence[torch.Tensor],
    recording: Recording,
    between: Between,
    count: int,
    progress: OnProgress,
) -> None:
    first = max(0, _forward_done(between, count) - 1)
    batches = recording.start.batches
    if first:
        batches = between.read("forward", first)
    else:
        between.write("forward", 0, batches)
    progress(_STAGE, first, 2 * count)
    layers = layers_of(loaded)
    for index in range(first, count):
        with torch.no_grad(), loaded.resident(index, then=index + 1):
            batches = [calls[index].run(layers[index], x) for calls, x in zip(recording.calls, batches, strict=True)]
        if not all(bool(x.isfinite().all()) for x in batches):
            raise NonFiniteError(f"The output of {loaded.layers}.{index} is NaN or infinity on the calibration text.")
        between.write("forward", index + 1, batches)
        progress(_STAGE, index + 1, 2 * count)
    gradients = []
    position = 0
    for ids, hidden in zip(windows, batches, strict=True):
        parts = []
        for i, h in zip(ids, hidden, strict=True):  # one window at a time: its logits are as wide as the vocabulary
            parts.append(head_gradient(loaded, recording, i[None], h[None], position))
            position += 1
        gradients.append(torch.cat(parts))
    between.write("backward", count, gradients)
    between.remove("forward", count)
