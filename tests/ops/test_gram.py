import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ops.cases import FLOATING, FULL, SCHEMA_CHECKS, SIZES, activations, run_gram
from tests.ops.tolerance import assert_as_good_as_torch, assert_moments, assert_same_bits_for_any_thread_count
from unirank import ops, reference


def exact_moment(rows: Tensor) -> Tensor:
    """`rowsᵀ rows`; of fp64 rows in extended precision, because torch's own fp64 product is no truth for another."""
    if rows.dtype != torch.float64:
        return rows.double().T @ rows.double()
    wide = rows.numpy().astype(np.longdouble)
    return torch.from_numpy((wide.T @ wide).astype(np.float64))


def assert_matches(x: Tensor, dtype: torch.dtype = torch.float64) -> None:
    truth = exact_moment(x)
    for op in (ops.gram_accumulate_, reference.gram_accumulate_):
        assert_moments(*run_gram(op, x, dtype), x, truth)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("N", SIZES)
@pytest.mark.parametrize("T", SIZES)
def test_equals_twin_and_fp64(T: int, N: int, dtype: torch.dtype) -> None:
    assert_matches(activations(T, N, dtype))


@pytest.mark.parametrize("gram_dtype", FULL)
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("N", [576, 1536])
def test_real_shapes(N: int, dtype: torch.dtype, gram_dtype: torch.dtype) -> None:
    assert_matches(activations(300, N, dtype), gram_dtype)


@pytest.mark.parametrize("T", [2047, 2048, 2049, 5000])
def test_more_rows_than_a_chunk(T: int) -> None:
    assert_matches(activations(T, 33))


def test_accumulates_onto_state() -> None:
    x = activations(90, 50)
    gram, mean = run_gram(ops.gram_accumulate_, x[:30])
    ops.gram_accumulate_(gram, mean, x[30:])
    assert_as_good_as_torch(gram, x.T @ x, x.double().T @ x.double())
    assert_as_good_as_torch(mean, x.sum(0), x.double().sum(0))


def test_non_finite_rows_show() -> None:
    x = activations(50, 20)
    x[7, 3] = float("nan")
    gram, mean = run_gram(ops.gram_accumulate_, x)
    assert gram[3].isnan().all()
    assert mean[3].isnan()


def test_layout_and_alignment_do_not_change_bits() -> None:
    x = activations(301, 64)
    flat = torch.cat((torch.zeros(1), x.flatten()))
    for other in (x.T.contiguous().T, flat[1:].view(301, 64)):
        for got, want in zip(run_gram(ops.gram_accumulate_, other), run_gram(ops.gram_accumulate_, x), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", FULL)
@pytest.mark.parametrize("N", [33, 576, 1000])
def test_bits_do_not_depend_on_threads(N: int, dtype: torch.dtype) -> None:
    x = activations(2500, N, dtype)
    assert_same_bits_for_any_thread_count(lambda: run_gram(ops.gram_accumulate_, x))


@pytest.mark.parametrize("op", [ops.gram_accumulate_, reference.gram_accumulate_])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(5)}, r"x must have shape \[T, N\]"),
        ({"x": torch.zeros(4, 5).int()}, "x must be float32"),
        ({"gram": torch.zeros(5, 6)}, r"gram must be contiguous of shape \[5, 5\]"),
        ({"gram": torch.zeros(5, 10)[:, ::2]}, "gram must be contiguous"),
        ({"mean": torch.zeros(6)}, r"mean must be contiguous of shape \[5\]"),
        ({"gram": torch.zeros(5, 5).double()}, "gram and mean must both be"),
        ({"gram": torch.zeros(5, 5).half(), "mean": torch.zeros(5).half()}, "gram and mean must both be"),
    ],
)
def test_bad_arguments(op, changed: dict, message: str) -> None:
    arguments = {"gram": torch.zeros(5, 5), "mean": torch.zeros(5), "x": torch.zeros(4, 5), **changed}
    with pytest.raises(ValueError, match=message):
        op(**arguments)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("T", [0, 33])
def test_opcheck(T: int, dtype: torch.dtype) -> None:
    arguments = (torch.zeros(7, 7), torch.zeros(7), activations(T, 7, dtype))
    torch.library.opcheck(torch.ops.unirank.gram_accumulate_, arguments, test_utils=SCHEMA_CHECKS)


def test_compiles_into_one_graph() -> None:
    def moment(x: Tensor) -> Tensor:
        gram, mean = x.new_zeros(x.shape[1], x.shape[1]), x.new_zeros(x.shape[1])
        ops.gram_accumulate_(gram, mean, x)
        return gram - mean.outer(mean)

    x = activations(33, 31)
    assert torch.equal(torch.compile(moment, fullgraph=True, backend="aot_eager")(x), moment(x))
