"""How far a model's output is from the dense model's, token by token, on one window, from any layer on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from unirank.layerwise.head import head_logits
from unirank.layerwise.recording import Recording, layers_of, record
from unirank.types import LoadedModel

_VALUES_AT_ONCE = 2**18  # of a block of logits: it stays in a core's cache
_STREAM_BYTES = 2**25  # of hidden states that run together; a layer needs a small multiple of it


@dataclass(frozen=True)
class Counted:
    """What counts: `KL(dense || other)` of `softmax(logits / temperature)` at positions from `first` on."""

    temperature: float = 1.0
    first: int = 0


ALL = Counted()


def token_divergences(log_p: torch.Tensor, logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """`Σ p (log p - log q)` of each token in nats, float64 `[T]`; NaN or infinity where the logits are.

    With `d = logits / temperature - log p`, shifted to `Σ p d = 0`, this is `log Σ p exp(d)`; computed as
    `log1p(Σ p expm1(d))`, so that rounding is small beside `d`, not beside the logits.

    Args:
        log_p: float32 `[T, vocabulary]`.
        logits: of q before the temperature, `[T, vocabulary]`.
    """
    rows = max(1, _VALUES_AT_ONCE // log_p.shape[-1])
    found = []
    for known, part in zip(log_p.split(rows), logits.split(rows), strict=True):
        p = known.exp()
        total = p.sum(-1)  # 1 but for rounding
        d = part.float().div(temperature).sub_(known)
        d -= (torch.linalg.vecdot(p, d) / total)[:, None]
        left = torch.linalg.vecdot(p, d) / total  # what the shift missed
        value = (torch.linalg.vecdot(p, d.expm1()) / total).log1p() - left
        if not bool(value.isfinite().all()):
            # exp overflows where q is far from p; the logarithm of the sum does not.
            value = value.where(value.isfinite(), (known + d).logsumexp(-1))
        # Rounding can put the divergence of nearly equal outputs below zero.
        found.append(value.double().clamp_min(0.0))
    return torch.cat(found)


class Window:
    """One window of the lent model: how its layers are called, and what the dense model says.

    Made while the model is dense. Keeps the dense log-probabilities of the counted positions, float32
    `[T - first, vocabulary]`; while it measures there is one set of logits more.

    Args:
        ids: int64 `[T]`.
    """

    @torch.no_grad()
    def __init__(self, loaded: LoadedModel, ids: torch.Tensor, counted: Counted = ALL) -> None:
        self._loaded, self._ids, self._counted = loaded, ids, counted
        self._layers = layers_of(loaded)
        self._recordings: dict[int, Recording] = {}
        start = self._recorded(1).start.batches[0]
        self.entering = start
        self.at_once = max(1, _STREAM_BYTES // (start.numel() * start.element_size()))
        logits = self._logits(self.onward(start, 0)[0])
        self._log_p = logits.float().div(counted.temperature).log_softmax(-1)

    @torch.no_grad()
    def onward(
        self,
        hidden: torch.Tensor,
        first: int,
        last: int | None = None,
        seen: Callable[[int, torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """What leaves layer `last - 1` (None: the last one) when `hidden`, `[V, T, D]`, enters layer `first`.

        Args:
            seen: is called with every layer's number and what enters it.
        """
        calls = self._recorded(len(hidden)).calls[0]
        for index in range(first, len(self._layers) if last is None else last):
            if seen is not None:
                seen(index, hidden)
            hidden = calls[index].run(self._layers[index], hidden)
        return hidden

    @torch.no_grad()
    def divergences(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of what leaves the last layer, `[V, T, D]`: float64 `[V, T - first]`."""
        temperature = self._counted.temperature
        return torch.stack([token_divergences(self._log_p, self._logits(stream), temperature) for stream in hidden])

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of the counted positions of `hidden`, `[T, D]`; the head runs on no other."""
        first = self._counted.first
        return head_logits(self._loaded, self._recorded(1), self._ids[None, first:], hidden[None, first:])[0]

    def _recorded(self, copies: int) -> Recording:
        """How the layers are called with that many copies of the window; masks and positions can depend on it."""
        if copies not in self._recordings:
            self._recordings[copies] = record(self._loaded, self._ids.expand(copies, -1), batch=copies)
        return self._recordings[copies]
