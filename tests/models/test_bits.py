"""How quantised matrices are stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unirank import InputError
from unirank.models.bits import GROUPS, check_bits, layout, pack, stored_shape, unpack


@given(rows=st.integers(1, 5), columns=st.integers(1, 40), seed=st.integers(0, 99))
def test_two_numbers_a_byte_are_found_again(rows: int, columns: int, seed: int) -> None:
    numbers = torch.randint(-8, 8, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = pack(numbers)
    assert (packed.dtype, tuple(packed.shape)) == stored_shape(4, rows, columns)
    assert torch.equal(unpack(packed, columns), numbers)


def test_the_earlier_number_is_the_low_half() -> None:
    assert pack(torch.tensor([[-8, 7, 0]], dtype=torch.int8)).tolist() == [[0xF0, 0x08]]


@pytest.mark.parametrize(
    ("bits", "size", "columns", "expected"),
    [
        (8, None, 576, (8, 576)),
        (8, 128, 576, (8, 64)),
        (8, 16, 577, (8, 577)),
        (4, 128, 576, (4, 64)),
        (4, 32, 576, (4, 32)),
        (4, 128, 1536, (4, 128)),
        (4, 128, 48, (4, 16)),
        (4, 128, 1, (8, 1)),
        (4, 128, 577, (8, 577)),
        (4, 16, 24, (8, 24)),
    ],
)
def test_the_largest_group_that_divides_a_row(bits: Any, size: int | None, columns: int, expected: Any) -> None:
    assert layout(bits, size, columns) == expected


@pytest.mark.parametrize(
    ("bits", "size", "match"),
    [
        (3, None, r"^bits = 3 is not legal; legal values: 8, 4\.$"),
        ("8", None, r"^bits = '8' is not legal"),
        (True, None, r"^bits = True is not legal"),
        (8, 24, r"^group_size = 24 is not legal; legal values: 128, 64, 32, 16\.$"),
        (4, 48, r"^group_size = 48 is not legal; legal values: 128, 64, 32, 16\.$"),
        (4, 32.0, r"^group_size = 32\.0 is not legal"),
    ],
)
def test_what_is_not_legal(bits: object, size: object, match: str) -> None:
    with pytest.raises(InputError, match=match):
        check_bits(bits, size)
    with pytest.raises(InputError, match=match.replace("^", r"^quantization_config\.")):
        check_bits(bits, size, where="quantization_config.")


def test_what_is_legal() -> None:
    assert check_bits(8, None) == (8, None)
    assert check_bits(4, None) == (4, GROUPS[0])
    for bits in (8, 4):
        assert [check_bits(bits, size) for size in GROUPS] == [(bits, size) for size in GROUPS]
