"""Moments of linears of networks in a list, of which each may see some of the tokens only: experts as modules.

Where all networks of a list see the same number of tokens they are ordinary. Else each linear's moment is shrunk
towards what the same linears of all networks read, as in `expert_moments`, and its share is that of the tokens that it
saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from unirank.distributed import sum_in_order
from unirank.errors import InputError
from unirank.layerwise.clipping import clipped
from unirank.layerwise.expert_moments import Sums, shrunk
from unirank.layerwise.hooks import Hook, reading
from unirank.types import LinearSpec, ListedSpec, Moment


class ListedMoments:
    """Watches the listed linears of one layer."""

    def __init__(
        self,
        layer: nn.Module,
        prefix: str,
        specs: Sequence[LinearSpec],
        *,
        enabled: bool,
        mean_abs: bool,
        clip: float,
    ) -> None:
        self._specs = [spec for spec in specs if isinstance(spec, ListedSpec)]
        self._modules: dict[str, Any] = {
            spec.name: layer.get_submodule(spec.name.removeprefix(f"{prefix}.")) for spec in self._specs
        }
        self._mean_abs, self._clip = mean_abs, clip
        self._tokens = dict.fromkeys(self._modules, 0)
        self._sums: dict[str, Sums] = {}
        if enabled:
            for spec in self._specs:
                device = self._modules[spec.name].weight.device
                self._sums[spec.name] = Sums.empty(spec.n, device, mean_abs=mean_abs)

    def hooked(self) -> AbstractContextManager[None]:
        return reading(self._modules, self._hook)

    def _hook(self, name: str) -> Hook:
        def accumulate(_module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            self._tokens[name] += len(x)
            if self._sums and len(x):
                self._sums[name].add(clipped(x, self._clip))

        return accumulate

    def shares(self) -> dict[str, float]:
        """Of each linear the share of the tokens that all its siblings saw; none where all saw as many."""
        found = {}
        for members in self._groups():
            tokens = [int(sum_in_order(torch.tensor([self._tokens[spec.name]]))) for spec in members]
            if max(tokens) == 0:
                raise InputError(f"No calibration token reaches {members[0].name}, nor the same linear of its list.")
            if min(tokens) < max(tokens):
                found |= {spec.name: count / sum(tokens) for spec, count in zip(members, tokens, strict=True)}
        return found

    def finish(self) -> dict[str, Moment]:
        """The moment of each linear; none where none are wanted."""
        found: dict[str, Moment] = {}
        for members in self._groups() if self._sums else []:
            own = [self._sums.pop(spec.name).gathered() for spec in members]
            if len({sums.tokens for sums in own}) == 1:
                found |= {spec.name: sums.moment() for spec, sums in zip(members, own, strict=True)}
                continue
            total = Sums.empty(members[0].n, own[0].gram.device, mean_abs=self._mean_abs)
            for sums in own:
                total.merge(sums)
            common = total.moment()
            found |= {spec.name: shrunk(spec.name, sums, common) for spec, sums in zip(members, own, strict=True)}
        return found

    def _groups(self) -> list[list[ListedSpec]]:
        groups: dict[tuple[str, int], list[ListedSpec]] = {}
        for spec in self._specs:
            groups.setdefault((spec.siblings, spec.n), []).append(spec)
        return list(groups.values())
