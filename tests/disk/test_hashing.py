"""Hashes: of threads that change nothing, and the cheap look that tells whether a tensor was written to."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from unirank.disk.hashing import fingerprint, sha256_files, sha256_tensors, sha256_text, sha256_tree


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(300, 70, generator=generator),
        "a.bias": torch.randn(7, generator=generator).to(torch.bfloat16),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 5),
        "turned": torch.randn(40, 50, generator=generator).T,
        "count": torch.arange(3),
    }


def test_a_tree_is_the_hash_of_sorted_lines(tensors: dict[str, torch.Tensor]) -> None:
    lines = sorted(
        f"{name} {tensor.dtype} {list(tensor.shape)} "
        f"{hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()}\n"
        for name, tensor in tensors.items()
    )
    assert sha256_tree(tensors.items()) == sha256_text("".join(lines))


@pytest.mark.parametrize("limit", [None, 0, 1000])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_neither_threads_nor_order_nor_limit_change_it(
    threads: int, limit: int | None, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = sha256_tree(tensors.items())
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert sha256_tree(reversed(tensors.items()), limit=limit) == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors | {"b": tensors["a.weight"]},
        lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "empty"},
        lambda tensors: tensors | {"a.weight": tensors["a.weight"].view(70, 300)},
        lambda tensors: tensors | {"count": tensors["count"].to(torch.int32)},
        lambda tensors: tensors | {"a.weight": tensors["a.weight"].nextafter(torch.tensor(9.0))},
        lambda tensors: tensors | {"a.weight": tensors["a.weight"].flip(0)},
    ],
)
def test_every_difference_changes_it(change: Callable, tensors: dict[str, torch.Tensor]) -> None:
    assert sha256_tree(change(tensors).items()) != sha256_tree(tensors.items())


@pytest.mark.parametrize(("limit", "most"), [(0, 3), (4 * 4000, 7)])
def test_tensors_that_are_read_are_held_within_the_limit(limit: int, most: int) -> None:
    """One that is read, one that is hashed and one that was just handed over; more only within the limit."""
    alive: list[weakref.ref] = []
    seen = []

    def read() -> Iterator[tuple[str, torch.Tensor]]:
        for index in range(40):
            tensor = torch.full((1000,), float(index))
            alive.append(weakref.ref(tensor))
            yield str(index), tensor
            del tensor
            seen.append(sum(one() is not None for one in alive))

    sha256_tree(read(), limit=limit)
    assert max(seen) <= most


def test_files_are_hashed_by_name(tmp_path: Path) -> None:
    for index in range(7):
        (tmp_path / f"{index}.safetensors").write_bytes(bytes([index]) * (3 << 20))
    (tmp_path / "other").write_bytes(b"")
    found = sha256_files(tmp_path)
    assert list(found) == [f"{index}.safetensors" for index in range(7)]
    assert found["3.safetensors"] == hashlib.sha256(b"\x03" * (3 << 20)).hexdigest()


# -- what was written to ----------------------------------------------------------------------------------------------


def swap(tensor: torch.Tensor, one: tuple[int, int], other: tuple[int, int]) -> None:
    kept = tensor[one].clone()
    tensor[one] = tensor[other]
    tensor[other] = kept


WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "one entry": lambda w: w[3, 4].add_(w[3, 4].abs() * 0.01 + 0.1),
    "the last entry": lambda w: w[-1, -1].add_(1),
    "all signs": lambda w: w.neg_(),
    "a sign": lambda w: w[0, 0].neg_(),
    "a pair of signs": lambda w: w[0, :2].neg_(),
    "scaled": lambda w: w.mul_(1.01),
    "zeroed": lambda w: w.zero_(),
    "rows swapped": lambda w: w.copy_(w.flip(0)),
    "columns swapped": lambda w: w.copy_(w.flip(1)),
    "entries swapped in a block": lambda w: swap(w, (0, 0), (0, 8)),
    "entries swapped between blocks": lambda w: swap(w, (0, 0), (-2, 0)),
    "a NaN": lambda w: w[1, 1].fill_(float("nan")),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 9), (129, 517), (512, 512)])
@pytest.mark.parametrize("write", WRITES)
def test_a_fingerprint_tells_what_was_written(write: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = fingerprint(weight)
    assert fingerprint(weight.clone()) == before
    WRITES[write](weight)
    assert fingerprint(weight) != before


def test_a_fingerprint_of_a_view_at_an_odd_place_and_of_other_dtypes() -> None:
    whole = torch.randn(9001, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    assert fingerprint(whole[1:]) == fingerprint(whole[1:].clone())
    for dtype in (torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64):
        tensor = torch.zeros(9000, dtype=dtype)
        before = fingerprint(tensor)
        tensor.view(torch.uint8)[77] = 1
        assert fingerprint(tensor) != before


def test_the_serial_hash_is_what_it_was(tensors: dict[str, torch.Tensor]) -> None:
    """Stores up to format 3, gradients, windows and every tensor of a store are known by it."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    assert sha256_tensors(tensors.items()) == digest.hexdigest()
