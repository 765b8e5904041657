"""One backward pass over all layers, into the store; a killed pass resumes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from unirank.analysis.store import AnalysisStore
from unirank.errors import NonFiniteError
from unirank.layerwise.backward import backward_layer, head_gradient
from unirank.layerwise.lending import lent
from unirank.layerwise.recording import Recording, layers_of, record
from unirank.progress import OnProgress, silent
from unirank.types import LoadedModel

_STAGE = "gradients"


def gradient_pass(
    loaded: LoadedModel, windows: torch.Tensor, store: AnalysisStore, *, batch: int, progress: OnProgress = silent
) -> None:
    """Write the gradients of every layer to `store`, resuming what is there. `windows` int64 `[W, T]`.

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
    with lent(loaded.model):
        recording = record(loaded, windows, batch=batch)
        if not store.has_scratch("backward", remaining) or _forward_done(store) < remaining:
            remaining = count  # not started, or what a killed run needs was deleted since
            _forward(loaded, windows.split(batch), recording, store, progress)
        progress(_STAGE, steps - remaining, steps)
        for layer in reversed(range(remaining)):
            inputs = store.read_scratch("forward", layer, recording.start.probe.device)
            outputs = store.read_scratch("backward", layer + 1, recording.start.probe.device)
            with loaded.resident(layer):
                gradients, arriving = backward_layer(loaded, layer, recording, inputs, outputs)
            if layer:
                store.write_scratch("backward", layer, arriving)
            store.write_gradients(layer, gradients)
            store.remove_scratch("backward", layer + 1)
            store.remove_scratch("forward", layer)
            progress(_STAGE, steps - layer, steps)


def _forward_done(store: AnalysisStore) -> int:
    """How many layers' inputs are on disk, from the first without a gap; behind the last layer counts as one more."""
    slots = store.layer_count + 1
    return next((i for i in range(slots) if not store.has_scratch("forward", i)), slots)


def _forward(
    loaded: LoadedModel,
    windows: Sequence[torch.Tensor],
    recording: Recording,
    store: AnalysisStore,
    progress: OnProgress,
) -> None:
    count = store.layer_count
    first = max(0, _forward_done(store) - 1)
    batches = recording.start.batches
    if first:
        batches = store.read_scratch("forward", first, recording.start.probe.device)
    else:
        store.write_scratch("forward", 0, batches)
    progress(_STAGE, first, 2 * count)
    layers = layers_of(loaded)
    for index in range(first, count):
        with torch.no_grad(), loaded.resident(index):
            batches = [calls[index].run(layers[index], x) for calls, x in zip(recording.calls, batches, strict=True)]
        if not all(bool(x.isfinite().all()) for x in batches):
            raise NonFiniteError(f"The output of {loaded.layers}.{index} is NaN or infinity on the calibration text.")
        store.write_scratch("forward", index + 1, batches)
        progress(_STAGE, index + 1, 2 * count)
    gradients = []
    position = 0
    for ids, hidden in zip(windows, batches, strict=True):
        parts = []
        for i, h in zip(ids, hidden, strict=True):  # one window at a time: its logits are as wide as the vocabulary
            parts.append(head_gradient(loaded, recording, i[None], h[None], position))
            position += 1
        gradients.append(torch.cat(parts))
    store.write_scratch("backward", count, gradients)
    store.remove_scratch("forward", count)
