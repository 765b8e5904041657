"""What an engine's layer multiplies by, against the linears that it stands for: whole, and split over processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from unirank.errors import InputError
from unirank.models.bits import pack
from unirank.models.low_rank import stored_tensors
from unirank.serving.members import Member, Share, layout, member
from unirank.types import FORMS

N = 32
Pieces = dict[str, torch.Tensor]


def made(m: int, rank: int | None, form: Any = "factors", *, bias: bool = False, n: int = N) -> Pieces:
    """The tensors of one linear as a checkpoint has them."""
    if rank is None:
        pieces = {"weight": torch.randn(m, n)}
    else:
        pieces = stored_tensors(torch.randn(m, rank), torch.randn(rank, n), form)
        pieces["weight"] = torch.tensor([rank])
    return pieces | ({"left.bias": torch.randn(m)} if bias else {})


def dense(pieces: Pieces) -> torch.Tensor:
    """The weight that the tensors mean."""
    if "left.weight" not in pieces:
        return pieces["weight"]
    product = pieces["left.weight"] @ pieces["right.weight"]
    return torch.cat((pieces["right.weight"], product))[pieces["place"].long()] if "place" in pieces else product


def product(members: Sequence[Member], x: torch.Tensor) -> torch.Tensor:
    """What a layer makes of `x [T, N]`, as the engine's layer computes it."""
    found = layout(members)
    h = torch.cat([x @ each.down.dense(x.dtype).T for each in members], 1)
    ups = [each.up for each in members if each.up is not None]
    parts = [h] if found.gather is not None or not found.inner else []
    for up, (first, count) in zip(ups, found.inner, strict=True):
        parts.append(h[:, first : first + count] @ up.dense(x.dtype).T)
    y = torch.cat(parts, 1)
    return y if found.gather is None else y[:, found.gather]


MIXTURES = {
    "one of low rank": [(24, 5)],
    "one dense": [(24, None)],
    "three of different ranks": [(24, 5), (8, 3), (8, 7)],
    "one of them dense": [(24, 5), (8, None), (8, 7)],
    "only one not dense": [(24, None), (8, 1), (8, None)],
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mixture", MIXTURES)
def test_fused_members_make_what_each_makes(mixture: str, form: Any) -> None:
    pieces = [made(m, rank, form) for m, rank in MIXTURES[mixture]]
    members = [member("q", rank, each, Share(m, N)) for each, (m, rank) in zip(pieces, MIXTURES[mixture], strict=True)]
    x = torch.randn(6, N)
    torch.testing.assert_close(product(members, x), x @ torch.cat([dense(each) for each in pieces]).T)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [2, 4])
def test_outputs_split_over_processes(size: int, form: Any) -> None:
    """Query heads are split, and with 4 processes two of them hold the same one of 2 key heads."""
    linears = [(24, 5), (8, 3), (8, None)]
    pieces = [made(m, rank, form, bias=True) for m, rank in linears]
    x = torch.randn(6, N)
    for rank in range(size):
        members, wanted, biases = [], [], []
        for index, ((m, r), each) in enumerate(zip(linears, pieces, strict=True)):
            own = m // size if index == 0 else m // 2
            first = rank * own if index == 0 else rank // (size // 2) * own
            members.append(member("q", r, each, Share(m, N, spans=((first, own),))))
            wanted.append(dense(each)[first : first + own])
            biases.append(each["left.bias"][first : first + own])
        torch.testing.assert_close(product(members, x), x @ torch.cat(wanted).T)
        torch.testing.assert_close(
            torch.cat([each.bias for each in members if each.bias is not None]), torch.cat(biases)
        )


@pytest.mark.parametrize("form", FORMS)
def test_a_matrix_that_is_fused_on_the_disk_is_split_by_its_parts(form: Any) -> None:
    pieces, x = made(40, 6, form), torch.randn(6, N)
    for rank in range(2):
        spans = ((rank * 12, 12), (24 + rank * 4, 4), (32 + rank * 4, 4))
        wanted = torch.cat([dense(pieces)[first : first + count] for first, count in spans])
        torch.testing.assert_close(product([member("qkv", 6, pieces, Share(40, N, spans=spans))], x), x @ wanted.T)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [5, None])
def test_inputs_split_over_processes(rank: int | None, form: Any) -> None:
    pieces, x = made(24, rank, form), torch.randn(6, N)
    shares = [(first, N // 4) for first in range(0, N, N // 4)]
    parts = [
        product([member("o", rank, pieces, Share(24, N, columns=columns))], x[:, columns[0] : columns[0] + columns[1]])
        for columns in shares
    ]
    torch.testing.assert_close(sum(parts), x @ dense(pieces).T)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("form", FORMS)
def test_whole_numbers_with_scales_are_split_too(form: Any, bits: int) -> None:
    """Groups of 16, of which a process may hold a part; pivots are unfolded without a rounding."""
    n = 48
    pieces = made(32, 16, form, n=n)
    for name in ("left", "right"):
        weight = pieces.pop(f"{name}.weight")
        rows, columns = weight.shape
        top = 127 if bits == 8 else 7
        numbers = torch.randint(-top, top + 1, weight.shape, dtype=torch.int8)
        scale = torch.rand(rows, 1 if bits == 8 else columns // 16) + 0.1
        pieces |= {f"{name}.quantized": numbers if bits == 8 else pack(numbers), f"{name}.scale": scale}
        pieces[f"meant.{name}"] = (numbers * scale.repeat_interleave(columns // scale.shape[1], 1)).double()
    whole = dense(
        {key: value for key, value in pieces.items() if key == "place"}
        | {f"{name}.weight": pieces[f"meant.{name}"] for name in ("left", "right")}
    )
    x = torch.randn(6, n, dtype=torch.float64)
    torch.testing.assert_close(product([member("o", 16, pieces, Share(32, n))], x), x @ whole.T)
    for rank in range(2):
        spans, columns = ((rank * 16, 16),), (rank * 24, 24)
        own = member("q", 16, pieces, Share(32, n, spans=spans))
        torch.testing.assert_close(product([own], x), x @ whole[rank * 16 : rank * 16 + 16].T)
        part = member("o", 16, pieces, Share(32, n, columns=columns))
        mine = x[:, rank * 24 : rank * 24 + 24]
        torch.testing.assert_close(product([part], mine), mine @ whole[:, rank * 24 : rank * 24 + 24].T)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p.pop("weight"), "q has rank 5 in quantization_config, and the checkpoint's weights hold nothing"),
        (lambda p: p.update(weight=torch.tensor([4])), "weights hold rank 4"),
        (lambda p: p.update(weight=torch.randn(24, N)), "weights hold a dense matrix"),
        (lambda p: p.pop("left.weight"), r"no weights for q.left.weight"),
        (lambda p: p.pop("right.weight"), r"no weights for q.right.weight"),
        (lambda p: p.update({"left.weight": torch.randn(24, 6)}), r"q.left.weight has the shape \(24, 6\)"),
        (lambda p: p.update({"right.weight": torch.randn(5, 30)}), r"q.right.weight has the shape \(5, 30\)"),
        (lambda p: p.update({"left.bias": torch.randn(3)}), "The bias of q has the shape"),
    ],
)
def test_what_does_not_fit_is_one_sentence(change: Any, said: str) -> None:
    pieces = made(24, 5)
    change(pieces)
    with pytest.raises(InputError, match=said):
        member("q", 5, pieces, Share(24, N))


def test_a_place_that_does_not_fit_is_one_sentence() -> None:
    pieces = made(24, 5, "pivoted")
    pieces["place"] = pieces["place"][:-1]
    with pytest.raises(InputError, match=r"q\.place has the shape"):
        member("q", 5, pieces, Share(24, N))
