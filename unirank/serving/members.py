"""What a layer of an engine multiplies by, from the tensors of the linears that it stands for.

An engine fuses linears that read the same input (q, k and v; gate and up), and gives every process of a tensor-parallel
group a share: rows of what makes the outputs, or columns of what reads the inputs. Here the pieces of the members, of
any rank, form or none, become one product down and one up for each member.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from unirank.errors import InputError
from unirank.models.matrices import Matrix, read_matrix
from unirank.types import stack_of


@dataclass(frozen=True)
class Share:
    """What a process holds of one member: its own outputs, and its own inputs.

    Attributes:
        spans: `(first, count)` of the member's outputs, in order; None is all of them.
        total: outputs of the member on all processes together, M.
        columns: `(first, count)` of the inputs; None is all of them.
        inputs: of the member on all processes together, N.
    """

    total: int
    inputs: int
    spans: tuple[tuple[int, int], ...] | None = None
    columns: tuple[int, int] | None = None

    @property
    def rows(self) -> torch.Tensor | None:
        """int64 indices of the own outputs, or None."""
        if self.spans is None:
            return None
        return torch.cat([torch.arange(first, first + count) for first, count in self.spans])


@dataclass(frozen=True)
class Member:
    """One linear of a layer, in a process's share.

    Attributes:
        down: `[R, N]`; of a dense linear its weight, `[M, N]`.
        up: `[M, R]`, or of the pivoted form `[M - R, R]`; None of a dense linear.
        place: int64 `[M]` where the pivoted form finds each output in `cat(down(x), up(down(x)))`, else None.
        bias: `[M]` or None.
    """

    down: Matrix
    up: Matrix | None = None
    place: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def outputs(self) -> int:
        """M of the share."""
        if self.place is not None:
            return len(self.place)
        return (self.up or self.down).shape[0]


def member(name: str, rank: int | None, pieces: Mapping[str, torch.Tensor], share: Share) -> Member:
    """One linear from its tensors, as the checkpoint names them below `name`.

    Raises InputError where one is missing, too many, or does not fit the rank that the checkpoint's configuration names
    (None: dense) or the shape that the engine expects.
    """
    if rank is None:
        down = _matrix(name, "", pieces, (share.total, share.inputs))
        return Member(_own(down, share), bias=_bias(name, pieces, share))
    guard = pieces.get("weight")
    found = "nothing" if guard is None else "a dense matrix" if guard.dim() > 1 else f"rank {guard[0].item()}"
    if found != f"rank {rank}":
        raise InputError(f"{name} has rank {rank} in quantization_config, and the checkpoint's weights hold {found}.")
    place = pieces.get("place")
    made = share.total - rank if place is not None else share.total
    right = _matrix(name, "right.", pieces, (rank, share.inputs))
    left = _matrix(name, "left.", pieces, (made, rank))
    bias = _bias(name, pieces, share)
    if place is None:
        return Member(_columns(right, share), _own_rows(left, share), bias=bias)
    if place.shape != (share.total,):
        raise InputError(f"{name}.place has the shape {tuple(place.shape)}, expected {(share.total,)}.")
    place = place.long()
    if share.spans is None and share.columns is None:
        return Member(right, left, place, bias)
    # Pivots of one process are outputs of another: what is split is unfolded to two factors first.
    unfolded = left.below_identity().take_rows(place)
    return Member(_columns(right, share), _own_rows(unfolded, share), bias=bias)


def _matrix(name: str, part: str, pieces: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> Matrix:
    found = read_matrix(pieces, part, shape[1])
    if found is None:
        raise InputError(f"The checkpoint has no weights for {name}.{part}weight; it is damaged, or of another model.")
    if found.shape != shape:
        raise InputError(f"{name}.{part}weight has the shape {found.shape} in the checkpoint, expected {shape}.")
    return found


def _columns(matrix: Matrix, share: Share) -> Matrix:
    return matrix if share.columns is None else matrix.take_columns(*share.columns)


def _own_rows(matrix: Matrix, share: Share) -> Matrix:
    return matrix if share.rows is None else matrix.take_rows(share.rows)


def _own(matrix: Matrix, share: Share) -> Matrix:
    return _columns(_own_rows(matrix, share), share)


def _bias(name: str, pieces: Mapping[str, torch.Tensor], share: Share) -> torch.Tensor | None:
    bias = next((pieces[part] for part in ("left.bias", "added_bias") if part in pieces), None)
    if bias is None:
        return None
    if bias.shape != (share.total,):
        raise InputError(f"The bias of {name} has the shape {tuple(bias.shape)}, expected {(share.total,)}.")
    return bias if share.rows is None else bias[share.rows]


@dataclass(frozen=True)
class Layout:
    """Where a fused layer's outputs come from.

    `h` is the one product down; of every member with an `up`, `h[first : first + count]` goes up. The outputs are
    `cat(*pieces)[gather]`, the pieces in the order `h`, ups; where `gather` is None, they are the ups alone.
    """

    inner: tuple[tuple[int, int], ...]  # (first, count) of each member that goes up
    gather: torch.Tensor | None  # int64 [M of the layer]


def layout(members: Sequence[Member]) -> Layout:
    """The layout of a layer that stands for `members`, in their order."""
    counts = [each.down.shape[0] for each in members]
    firsts = [0, *itertools.accumulate(counts)]
    inner = tuple(
        (first, count) for first, count, each in zip(firsts, counts, members, strict=False) if each.up is not None
    )
    if all(each.up is not None and each.place is None for each in members):
        return Layout(inner, None)
    if len(members) == 1 and members[0].up is None:
        return Layout(inner, None)
    gathers, above = [], firsts[-1]  # ups lie above all of h
    for first, count, each in zip(firsts, counts, members, strict=False):
        own = torch.arange(first, first + count)
        if each.up is None:
            gathers.append(own)
            continue
        made = torch.arange(above, above + each.up.shape[0])
        above += each.up.shape[0]
        gathers.append(made if each.place is None else torch.cat((own, made))[each.place.cpu()])
    return Layout(inner, torch.cat(gathers))


def refuse_experts(names: Iterable[str]) -> None:
    """Raise InputError where a target is a matrix of a stack of experts."""
    expert = next(filter(stack_of, names), None)
    if expert is not None:
        raise InputError(
            f"vLLM cannot serve low-rank experts, and this checkpoint has them ({expert}); make a dense checkpoint of "
            "it: unirank densify."
        )
