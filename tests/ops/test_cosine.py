import pytest
import torch
from torch import Tensor

from tests.ops.cases import FLOATING, SCHEMA_CHECKS, SIZES, run_cosine
from tests.ops.tolerance import assert_same_bits_for_any_thread_count, assert_same_cosine_sums
from unirank import ops, reference


def streams(T: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(T * 1000 + D)
    x = torch.randn(T, D, generator=g)
    return x.to(dtype), (x + torch.randn(T, D, generator=g)).to(dtype)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("D", SIZES)
@pytest.mark.parametrize("T", SIZES)
def test_equals_twin_and_fp64(T: int, D: int, dtype: torch.dtype) -> None:
    x, y = streams(T, D, dtype)
    got = run_cosine(ops.cosine_accumulate_, x, y)
    assert_same_cosine_sums(got, run_cosine(reference.cosine_accumulate_, x, y))
    cosine = torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=1, eps=1e-300)
    assert_same_cosine_sums(got, torch.tensor([cosine.sum(), (cosine**2).sum(), T], dtype=torch.float64))


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("D", [576, 1536])
def test_real_shapes(D: int, dtype: torch.dtype) -> None:
    x, y = streams(300, D, dtype)
    got = run_cosine(ops.cosine_accumulate_, x, y)
    assert_same_cosine_sums(got, run_cosine(reference.cosine_accumulate_, x, y))
    assert got[2] == 300


def test_accumulates_onto_state() -> None:
    x, y = streams(64, 33, torch.float32)
    state = torch.zeros(3, dtype=torch.float64)
    for part in (slice(0, 20), slice(20, 64)):
        ops.cosine_accumulate_(state, x[part], y[part])
    assert_same_cosine_sums(state, run_cosine(ops.cosine_accumulate_, x, y))


def test_non_contiguous_inputs() -> None:
    x, y = streams(40, 50, torch.float32)
    wide = torch.cat((x, y), 1)
    got = run_cosine(ops.cosine_accumulate_, wide[:, :50], y.T.contiguous().T)
    assert torch.equal(got, run_cosine(ops.cosine_accumulate_, x, y))


@pytest.mark.parametrize("dtype", FLOATING)
def test_zero_rows_count_as_cosine_zero(dtype: torch.dtype) -> None:
    x, y = streams(5, 17, dtype)
    x[1] = 0
    y[3] = 0
    x[4] = y[4] = 0
    got = run_cosine(ops.cosine_accumulate_, x, y)
    others = run_cosine(ops.cosine_accumulate_, x[[0, 2]], y[[0, 2]])
    assert_same_cosine_sums(got, others + torch.tensor([0.0, 0.0, 3.0]).double())


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("other_is_zero", [False, True])
def test_non_finite_rows_poison(dtype: torch.dtype, bad: float, other_is_zero: bool) -> None:
    x, y = streams(5, 40, dtype)
    x[2, 37] = bad
    if other_is_zero:
        y[2] = 0
    for op in (ops.cosine_accumulate_, reference.cosine_accumulate_):
        state = run_cosine(op, x, y)
        assert state[:2].isnan().all()
        assert state[2] == 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_value_is_widened_exactly(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    # D = 1: the cosine is the product of signs, and squares of the smallest subnormal stay above zero in fp64.
    x, y = every[:, None], torch.ones_like(every)[:, None]
    assert torch.equal(run_cosine(ops.cosine_accumulate_, x, y), run_cosine(reference.cosine_accumulate_, x, y))
    # Against a fixed second column the cosine depends on the magnitude too.
    x, y = torch.stack((every, torch.ones_like(every)), 1), torch.ones(len(every), 2, dtype=dtype)
    assert_same_cosine_sums(run_cosine(ops.cosine_accumulate_, x, y), run_cosine(reference.cosine_accumulate_, x, y))


def test_cosine_never_leaves_unit_interval() -> None:
    x, _ = streams(1000, 33, torch.float64)
    assert run_cosine(ops.cosine_accumulate_, x, x * 3)[0] <= 1000


def test_bits_do_not_depend_on_threads() -> None:
    x, y = streams(3000, 257, torch.float32)
    assert_same_bits_for_any_thread_count(lambda: [run_cosine(ops.cosine_accumulate_, x, y)])


@pytest.mark.parametrize("op", [ops.cosine_accumulate_, reference.cosine_accumulate_])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"state": torch.zeros(3)}, "state must be contiguous float64 of shape"),
        ({"state": torch.zeros(4).double()}, "state must be"),
        ({"state": torch.zeros(6).double()[::2]}, "state must be contiguous"),
        ({"x": torch.zeros(4)}, r"x must have shape \[T, D\]"),
        ({"y": torch.zeros(4, 6)}, "y must have the shape of x"),
        ({"y": torch.zeros(4, 5).half()}, "y must have the dtype of x"),
        (
            {"x": torch.zeros(4, 5).int(), "y": torch.zeros(4, 5).int()},
            "x must be float32, float64, bfloat16 or float16",
        ),
    ],
)
def test_bad_arguments(op, changed: dict, message: str) -> None:
    arguments = {"state": torch.zeros(3).double(), "x": torch.zeros(4, 5), "y": torch.zeros(4, 5), **changed}
    with pytest.raises(ValueError, match=message):
        op(**arguments)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("T", [0, 1, 33])
def test_opcheck(T: int, dtype: torch.dtype) -> None:
    arguments = (torch.zeros(3).double(), *streams(T, 7, dtype))
    torch.library.opcheck(torch.ops.unirank.cosine_accumulate_, arguments, test_utils=SCHEMA_CHECKS)


def test_compiles_into_one_graph() -> None:
    x, y = streams(33, 31, torch.float32)

    def doubled(x: Tensor, y: Tensor) -> Tensor:
        state = torch.zeros(3, dtype=torch.float64)
        ops.cosine_accumulate_(state, x, y)
        return state * 2

    assert torch.equal(torch.compile(doubled, fullgraph=True, backend="aot_eager")(x, y), doubled(x, y))
