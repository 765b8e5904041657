"""Spectra that no store holds: of the weights themselves, of sublayer outputs, and of the streams behind sublayers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import cosine_similarity, normalize

from unirank import ops
from unirank.analysis.scheme.base import WORK_DTYPE, eigh_descending
from unirank.errors import NonFiniteError
from unirank.layerwise.recording import record
from unirank.layerwise.statistics import SublayerStreams
from unirank.layerwise.trace import traced_layer
from unirank.models.targets import target_weight
from unirank.progress import OnProgress
from unirank.types import LoadedModel, Sublayer

Group = Literal["weights", "scheme", "outputs", "stream"]
SECOND_MOMENT = "second moment"
_STREAMS: tuple[Group, Group] = ("outputs", "stream")
_MOMENTS = (SECOND_MOMENT, "second moment of directions")


@dataclass(frozen=True)
class Geometry:
    """Why a cosine is what it is: token means of `|f| / |x|` and of `|cos(x, f)|` of one sublayer."""

    layer: int
    sublayer: Sublayer
    cosine: float  # over the windows of this pass
    size: float
    parallel: float


@torch.no_grad()
def weight_energies(loaded: LoadedModel, progress: OnProgress) -> dict[str, torch.Tensor]:
    """`sigma²` of every weight, float64 `[K]`, descending: eigenvalues of the smaller of `W Wᵀ` and `Wᵀ W`.

    Cheaper than an SVD. A sigma below 1e-8 of the largest is lost in rounding; no effective rank sees it.
    """
    energies = {}
    for layer in range(loaded.layer_count):
        specs = [spec for spec in loaded.linears if spec.layer == layer]
        grams = []
        for spec in specs:
            weight = target_weight(loaded.model, spec).to(WORK_DTYPE)
            grams.append(weight @ weight.T if spec.m <= spec.n else weight.T @ weight)
        solved = eigh_descending(grams)
        energies |= {spec.name: values.cpu() for spec, (values, _) in zip(specs, solved, strict=True)}
        progress("spectra of the weights", layer + 1, loaded.layer_count)
    return energies


@dataclass(frozen=True)
class SublayerSpectra:
    """Eigenvalues `[D]` (descending, float64) of each second moment of one sublayer, and its geometry."""

    spectra: dict[tuple[Group, str], torch.Tensor]
    geometry: Geometry


class _Sublayer:
    """Running second moments of one sublayer's `f = y - x` and of `y`, as they are and with every token at length 1.

    Outlier tokens (the attention sink) can carry nearly all energy of a stream; the cosine, which looks at
    directions only, does not see their length. Therefore both.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        zeros = {"dtype": torch.float64, "device": device}
        self._grams: dict[tuple[Group, str], tuple[torch.Tensor, torch.Tensor]] = {
            (group, name): (torch.zeros(width, width, **zeros), torch.zeros(width, **zeros))
            for group in _STREAMS
            for name in _MOMENTS
        }
        self._sums = torch.zeros(3, **zeros)
        self._tokens = 0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """One batch of streams in and out, `[T, D]`."""
        if x.dtype != torch.float64:
            x, y = x.float(), y.float()
        f = y - x  # what the sublayer did to the stream: biases and closing norms are in it
        for group, tokens in zip(_STREAMS, (f, y), strict=True):
            for name, rows in zip(_MOMENTS, (tokens, normalize(tokens, dim=1)), strict=True):
                ops.gram_accumulate_(*self._grams[group, name], rows)
        x, y, f = x.double(), y.double(), f.double()
        before, after = x.norm(dim=1), f.norm(dim=1)
        size = torch.where(before > 0, after / before, 0.0)  # a zero token has no cosine either
        cosine, parallel = cosine_similarity(x, y), cosine_similarity(x, f).abs()
        self._sums += torch.stack([cosine.sum(), size.sum(), parallel.sum()])
        self._tokens += len(x)

    def finish(self, layer: int, sublayer: Sublayer) -> SublayerSpectra:
        for gram, _ in self._grams.values():
            if not gram.diagonal().isfinite().all():
                raise NonFiniteError(f"The {sublayer} of layer {layer} gives NaN or infinity on the calibration text.")
        solved = eigh_descending([gram for gram, _ in self._grams.values()])
        spectra = {key: values.cpu() for key, (values, _) in zip(self._grams, solved, strict=True)}
        return SublayerSpectra(spectra, Geometry(layer, sublayer, *(self._sums / self._tokens).tolist()))


@torch.no_grad()
def stream_spectra(
    loaded: LoadedModel, windows: torch.Tensor, batch: int, progress: OnProgress
) -> Iterator[tuple[int, dict[Sublayer, SublayerSpectra]]]:
    """Run the windows through the layers and yield each layer's spectra; memory is that of a calibration.

    Args:
        windows: int64 `[W, T]`; `batch` windows go together.

    Raises NonFiniteError with the layer's name, InputError for a layer whose structure is not understood.
    """
    progress("spectra of the streams", 0, loaded.layer_count)
    recording = record(loaded, windows, batch=batch)
    streams = recording.start
    for index in range(loaded.layer_count):
        layer, streams.probe = traced_layer(loaded, index, recording, streams.probe)
        caught = SublayerStreams(layer)
        width, device = streams.probe.shape[-1], streams.probe.device
        running: dict[Sublayer, _Sublayer] = {key: _Sublayer(width, device) for key in layer.trace.spans}
        with caught.hooked():
            for position, hidden in enumerate(streams.batches):
                output = recording.calls[position][index].run(layer.module, hidden)
                pairs = caught.pairs(hidden, output)
                for sublayer, state in running.items():
                    state.add(*(stream.reshape(-1, width) for stream in pairs[sublayer]))
                streams.batches[position] = output
        yield index, {sublayer: state.finish(index, sublayer) for sublayer, state in running.items()}
        progress("spectra of the streams", index + 1, loaded.layer_count)
