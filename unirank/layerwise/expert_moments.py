"""Moments of what each expert of a layer reads, and its share of the router's weight.

An expert sees only the tokens that are routed to it, and may see few. So its moment is shrunk towards the moment of all
tokens, `C = (n C_own + n0 s C_all) / (n + n0)`: n tokens came, `n0 = PRIOR N` for N inputs, and `s` makes the traces
equal, for the shape is what is lent (**choices**). The mean is that of the same mixture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from unirank import ops
from unirank.distributed import sum_in_order
from unirank.errors import NonFiniteError
from unirank.experts import called_with, count_of, routed, second_input, stacks_of
from unirank.layerwise.clipping import clip_factors, clipped, scaled
from unirank.types import ExpertSpec, Moment

PRIOR = 1.0  # tokens of the common moment that count beside an expert's own, for each input (**choice**)
ROOM = 1 << 31  # bytes of experts' moments that are in memory at once (**choice**: of 64 experts with 2048 inputs)


def parts_of(specs: Sequence[ExpertSpec], room: int | None) -> list[list[ExpertSpec]]:
    """The experts in groups whose moments take at most `room` bytes, but each group has an expert at least.

    Both matrices of an expert are in one group. None is one group.
    """
    parts: list[list[ExpertSpec]] = []
    used = 0
    experts: dict[tuple[str, int], list[ExpertSpec]] = {}
    for spec in specs:
        experts.setdefault((spec.module, spec.expert), []).append(spec)
    for members in experts.values():
        size = sum(8 * spec.n * spec.n for spec in members)
        if not parts or (room is not None and used + size > room):
            parts.append([])
            used = 0
        parts[-1].extend(members)
        used += size
    return parts


@dataclass
class Sums:
    """Running sums over the tokens that one matrix read."""

    gram: torch.Tensor
    total: torch.Tensor
    mean_abs: torch.Tensor | None
    tokens: int = 0

    @classmethod
    def empty(cls, n: int, device: torch.device, *, mean_abs: bool) -> Sums:
        """Of `n` inputs, before the first token."""
        zeros = torch.zeros((n, n), dtype=torch.float64, device=device)
        return cls(zeros, zeros.new_zeros(n), zeros.new_zeros(n) if mean_abs else None)

    def add(self, x: torch.Tensor) -> None:
        ops.gram_accumulate_(self.gram, self.total, x)
        if self.mean_abs is not None:
            self.mean_abs += x.abs().sum(0, dtype=torch.float64)
        self.tokens += len(x)

    def merge(self, other: Sums) -> None:
        self.gram += other.gram
        self.total += other.total
        if self.mean_abs is not None and other.mean_abs is not None:
            self.mean_abs += other.mean_abs
        self.tokens += other.tokens

    def gathered(self) -> Sums:
        """The sums over all processes."""
        count = int(sum_in_order(torch.tensor([self.tokens])))
        mean_abs = None if self.mean_abs is None else sum_in_order(self.mean_abs)
        return Sums(sum_in_order(self.gram), sum_in_order(self.total), mean_abs, count)

    def moment(self) -> Moment:
        """The means over the tokens, in the place of the sums; zeros where none came."""
        count = max(self.tokens, 1)
        mean_abs = None if self.mean_abs is None else self.mean_abs.div_(count)
        return Moment(self.gram.div_(count), self.total.div_(count), self.tokens, mean_abs)


class ExpertMoments:
    """Watches the modules of experts of one layer, in one pass over the batches for each group of experts.

    The first pass also sums what all experts read, and the router's weights.
    """

    def __init__(
        self, layer: nn.Module, prefix: str, specs: Sequence[ExpertSpec], *, mean_abs: bool, clip: float
    ) -> None:
        self._modules: dict[str, Any] = {
            spec.module: layer.get_submodule(spec.module.removeprefix(f"{prefix}.")) for spec in specs
        }
        self._specs, self._mean_abs, self._clip = list(specs), mean_abs, clip
        self._sums: dict[tuple[str, int], tuple[Sums, Sums]] = {}  # of the group, by module and expert: both matrices
        self._common: dict[str, Sums] = {}  # by module, while its first pass runs: what its second matrices read
        self._lent: dict[str, Moment] = {}  # the same, done
        self._weights: dict[str, torch.Tensor] = {}  # by module, [E]

    @contextmanager
    def hooked(self, group: Sequence[ExpertSpec]) -> Iterator[None]:
        """Sum up what the experts of `group` read inside; without one, only the router's weights."""
        sizes: dict[tuple[str, int], list[int]] = {}
        for spec in group:
            sizes.setdefault((spec.module, spec.expert), []).append(spec.n)
        first = not self._weights
        with ExitStack() as stack:
            for name, module in self._modules.items():
                device = getattr(module, stacks_of(module)[0]).device
                for key, ns in sizes.items():
                    if key[0] == name:
                        outer, inner = (Sums.empty(n, device, mean_abs=self._mean_abs) for n in ns)
                        self._sums[key] = outer, inner
                if first and group:
                    n = max((spec for spec in self._specs if spec.module == name), key=_is_second(module)).n
                    self._common[name] = Sums.empty(n, device, mean_abs=self._mean_abs)
                hook = self._hook(name, first=first)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    def _hook(self, name: str, *, first: bool) -> Callable[..., None]:
        def accumulate(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, index, weights = called_with(name, module, args, kwargs)
            count = count_of(module)
            places = routed(index, count)
            if first:
                flat = weights.reshape(-1).to(torch.float64)
                total = self._weights.setdefault(name, flat.new_zeros(count))
                total += torch.stack([flat[rows].sum() for rows in places])
            if not self._sums:
                return
            factors = clip_factors(hidden, self._clip)
            for expert, rows in enumerate(places):
                own = self._sums.get((name, expert))
                if len(rows) and (own is not None or first):
                    tokens = rows // index.shape[-1]
                    x = hidden[tokens]
                    inner = clipped(second_input(module, expert, x), self._clip)
                    if own is None:
                        self._common[name].add(inner)
                    else:
                        own[0].add(scaled(x, None if factors is None else factors[tokens]))
                        own[1].add(inner)

        return accumulate

    def shares(self) -> dict[str, float]:
        """Of each matrix of an expert, the share of the router's weight in its module that the expert received."""
        found = {}
        for name, weights in self._weights.items():
            gathered = sum_in_order(weights)
            total = float(gathered.sum())
            if not math.isfinite(total):
                raise NonFiniteError(f"The router's weights of {name} are NaN or infinity on the calibration text.")
            for spec in self._specs:
                if spec.module == name:  # weights below zero are nobody's loss
                    found[spec.name] = max(float(gathered[spec.expert]) / total, 0.0) if total > 0 else 1 / len(weights)
        return found

    def finish(self, group: Sequence[ExpertSpec], inputs: Mapping[str, Moment]) -> dict[str, Moment]:
        """The moments of `group`, by target; `inputs` are those of all tokens that enter each module, by module."""
        gathered = {key: (outer.gathered(), inner.gathered()) for key, (outer, inner) in self._sums.items()}
        self._sums = {}
        for name in list(self._common):
            total = self._common.pop(name).gathered()
            for (module, _), (_, inner) in gathered.items():
                if module == name:
                    total.merge(inner)
            self._lent[name] = total.moment()
        found = {}
        for spec in group:
            second = _is_second(self._modules[spec.module])(spec)
            own = gathered[spec.module, spec.expert][second]
            found[spec.name] = shrunk(spec.name, own, self._lent[spec.module] if second else inputs[spec.module])
        return found


def _is_second(module: Any) -> Callable[[ExpertSpec], bool]:
    """Tells of a target whether it is of the second of the module's two stacks."""
    second = stacks_of(module)[1]
    return lambda spec: spec.parameter == second


def shrunk(name: str, own: Sums, common: Moment) -> Moment:
    """The moment of what one matrix read, shrunk towards what others read too."""
    n = len(own.total)
    if not (own.gram.diagonal().isfinite().all() and own.total.isfinite().all()):
        raise NonFiniteError(f"The input of {name} is NaN or infinity on the calibration text.")
    if own.tokens == 0:
        return common
    moment = own.moment()
    trace, other = float(moment.c.trace()), float(common.c.trace())
    scale = trace / other if other > 0 else 0.0
    lent = PRIOR * n / (own.tokens + PRIOR * n)
    # The tokens that are lent are all tokens times the root of the scale.
    c = moment.c.mul_(1 - lent).add_(common.c, alpha=lent * scale)
    mean = (1 - lent) * moment.mean + lent * math.sqrt(scale) * common.mean
    mean_abs = None
    if moment.mean_abs is not None and common.mean_abs is not None:
        mean_abs = (1 - lent) * moment.mean_abs + lent * math.sqrt(scale) * common.mean_abs
    return Moment(c, mean, own.tokens, mean_abs)
