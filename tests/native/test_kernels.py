"""The CUDA kernels under the emulator: every dtype, ragged and real sizes, layouts and thread schedules, against the
CPU ops and float64. CUB and cuBLAS are replaced by what they promise; all else is the code that runs on a GPU.
"""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import pytest
import torch
from emulation import KERNELS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.cases import SIZES, run_cosine, run_gram
from tests.ops.tolerance import assert_same_cosine_sums, gram_bound
from unirank import ops, reference

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
# Pad and shift in elements: whole 16-byte loads, rows that miss them, operands that miss them.
LAYOUTS = ((0, 0), (8, 0), (1, 0), (0, 1))

dtypes = pytest.mark.parametrize("dtype", DTYPES)


def tensor(T: int, D: int, dtype: str, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(T * 1000 + D + 7 * seed)
    return torch.randn(T, D, generator=g).to(DTYPES[dtype])


def array(x: Tensor) -> np.ndarray:
    x = x.contiguous()
    return (x.view(torch.int16) if x.element_size() == 2 else x).numpy()


def cosine_truth(x: Tensor, y: Tensor) -> Tensor:
    state = run_cosine(ops.cosine_accumulate_, x, y)
    assert_same_cosine_sums(state, run_cosine(reference.cosine_accumulate_, x, y))
    return state


def check_cosine(emulated: ModuleType, x: Tensor, y: Tensor, dtype: str, seeds: range) -> None:
    want = cosine_truth(x, y)
    for pad, shift in LAYOUTS:
        results = {
            tuple(emulated.cosine(array(x), array(y), bf16=dtype == "bf16", pad=pad, shift=shift, seed=seed))
            for seed in seeds
        }
        for result in results:
            assert_same_cosine_sums(torch.tensor(result, dtype=torch.float64), want)
        assert len(results) == 1 or want.isnan().any(), "the bits depend on the schedule"


@dtypes
@pytest.mark.parametrize("D", SIZES)
def test_cosine_sizes(emulated: ModuleType, D: int, dtype: str) -> None:
    for T in (0, 1, 9, 33):
        x = tensor(T, D, dtype)
        check_cosine(emulated, x, x + tensor(T, D, dtype, 1), dtype, range(3))


@dtypes
@pytest.mark.parametrize(("D", "seeds"), [(33, 50), (1024, 10), (1025, 50), (1536, 3), (4096, 3), (65536, 1)])
def test_cosine_schedules_and_real_sizes(emulated: ModuleType, D: int, seeds: int, dtype: str) -> None:
    x = tensor(3, D, dtype)
    check_cosine(emulated, x, x + tensor(3, D, dtype, 1), dtype, range(seeds))


@dtypes
def test_cosine_of_more_tokens_than_threads(emulated: ModuleType, dtype: str) -> None:
    x = tensor(1100, 5, dtype)
    check_cosine(emulated, x, tensor(1100, 5, dtype, 1), dtype, range(3))


@dtypes
@pytest.mark.parametrize("D", [40, 1100])
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, -math.inf])
def test_cosine_of_degenerate_rows(emulated: ModuleType, dtype: str, bad: float, D: int) -> None:
    x, y = tensor(4, D, dtype), tensor(4, D, dtype, 1)
    if bad == 0:
        x[1], y[2] = 0, 0
    else:
        x[1, 37] = bad
        y[1] = 0
    check_cosine(emulated, x, y, dtype, range(2))


def test_cosine_does_not_overflow_where_fp64_does_not(emulated: ModuleType) -> None:
    for dtype in ("fp32", "bf16"):
        x = tensor(3, 40, dtype) * 1e30
        check_cosine(emulated, x, x, dtype, range(2))
    check_cosine(emulated, tensor(2, 9, "fp64") * 1e100, tensor(2, 9, "fp64") * 1e140, "fp64", range(2))


def check_gram(
    emulated: ModuleType, x: Tensor, sums: torch.dtype, dtype: str, layout: tuple[int, int], seeds: range
) -> None:
    T, N = x.shape
    truth, total = x.double().T @ x.double(), x.double().sum(0)
    want, want_mean = run_gram(ops.gram_accumulate_, x, sums)
    # Half of the error goes to the product, in fp32 but for fp64 throughout, half to the sums.
    exact = x.dtype == sums == torch.float64
    eps = torch.finfo(torch.float64 if exact else torch.float32).eps
    scale = x.double().abs().T @ x.double().abs()
    mean_eps = torch.finfo(sums).eps * 4
    results = set()
    for seed in seeds:
        gram, mean = torch.zeros(N, N, dtype=sums), torch.zeros(N, dtype=sums)
        emulated.gram(
            gram.numpy(), mean.numpy(), array(x), bf16=dtype == "bf16", pad=layout[0], shift=layout[1], seed=seed
        )
        for right, right_mean in ((truth, total), (want, want_mean)):
            assert bool(((gram - right).abs() <= 2 * math.sqrt(T + 4) * eps * scale).all())
            assert bool(((mean - right_mean).abs() <= mean_eps * (1 + x.double().abs().sum(0))).all())
        assert torch.equal(gram, gram.T)
        results.add((gram.numpy().tobytes(), mean.numpy().tobytes()))
    assert len(results) == 1, "the bits depend on the schedule"


@dtypes
@pytest.mark.parametrize("N", SIZES)
@pytest.mark.parametrize("sums", [torch.float32, torch.float64])
def test_gram_sizes(emulated: ModuleType, N: int, sums: torch.dtype, dtype: str) -> None:
    # Two slices of the column sums where rows are short; a thread an element is dear to emulate where they are long.
    for T, layout in zip((0, 1, 33, 129) if N < 100 else (0, 1, 2, 9), LAYOUTS, strict=True):
        check_gram(emulated, tensor(T, N, dtype), sums, dtype, layout, range(3))


@dtypes
@pytest.mark.parametrize(("T", "N", "seeds"), [(33, 40, 50), (40, 576, 1), (4, 1536, 1)])
def test_gram_schedules_and_real_sizes(emulated: ModuleType, T: int, N: int, seeds: int, dtype: str) -> None:
    check_gram(emulated, tensor(T, N, dtype), torch.float64, dtype, (0, 0), range(seeds))


# Rows that one fp32 sum of the gram holds, and rows of it that one product computes: kChunk and kPanel.
CHUNK, PANEL = 8192, 2048


def test_chunk_and_panel_are_as_the_tests_take_them() -> None:
    source = (KERNELS / "gram.cuh").read_text()
    for name, length in (("kChunk", CHUNK), ("kPanel", PANEL)):
        assert f"constexpr i64 {name} = {length};" in source


@dtypes
@pytest.mark.parametrize("T", [CHUNK, CHUNK + 1, 2 * CHUNK + 700])
def test_gram_of_more_rows_than_a_chunk(emulated: ModuleType, T: int, dtype: str) -> None:
    check_gram(emulated, tensor(T, 9, dtype), torch.float64, dtype, (0, 0), range(1))


def test_gram_of_more_columns_than_a_panel(emulated: ModuleType) -> None:
    check_gram(emulated, tensor(2, PANEL + 33, "fp32"), torch.float64, "fp32", (0, 0), range(1))


@dtypes
@pytest.mark.parametrize("stride", [0, 1, 39, 2**40])
def test_gram_of_one_row_whose_stride_says_nothing(emulated: ModuleType, stride: int, dtype: str) -> None:
    # torch calls a [1, N] view contiguous whatever its stride, and cuBLAS refuses one below N.
    view = tensor(40, 40, dtype).as_strided((1, 40), (stride, 1))
    assert view.is_contiguous()
    check_gram(emulated, view, torch.float64, dtype, (stride - 40, 0), range(1))


@pytest.mark.parametrize(("group", "extra_bits"), [(4, 0), (8, 1), (16, 2)])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_bound_on_a_chunk_holds_where_sums_are_cut_off(
    emulated: ModuleType, dtype: str, group: int, extra_bits: int
) -> None:
    # The worst case of docs/numerics.md: all products of one sign, so that every cut goes the same way.
    x = tensor(CHUNK + 300, 6, dtype).abs()
    gram, mean = torch.zeros(6, 6).double(), torch.zeros(6).double()
    emulated.gram(
        gram.numpy(), mean.numpy(), array(x), bf16=dtype == "bf16", group=group, extra_bits=extra_bits
    )  # fmt: skip
    truth = x.double().T @ x.double()
    errors = (truth - gram) / truth
    assert float(errors.min()) >= 0
    assert float(errors.max()) <= gram_bound(CHUNK, group, extra_bits)
    assert float(errors.max()) > gram_bound(CHUNK, group, extra_bits) / 40


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("B", "m", "n"), [(0, 3, 3), (1, 1, 1), (3, 31, 31), (2, 33, 32), (7, 300, 5), (1, 576, 576)])
def test_the_scan_names_the_first_bad_matrix(emulated: ModuleType, B: int, m: int, n: int, dtype) -> None:
    a = np.random.default_rng(m).standard_normal((B, n, m)).astype(dtype)
    huge = np.finfo(dtype).max
    a[:, 0, 0] = huge  # the largest numbers are numbers
    for upper in (False, True) if m == n else (False,):
        for seed in range(3):
            assert emulated.scan(a, upper, seed=seed, shift=seed) == 0
    for b in range(B):
        for bad in (np.nan, np.inf, -np.inf):
            dirty = a.copy()
            dirty[b, n - 1, m - 1] = bad
            dirty[B - 1, 0, m - 1] = bad  # in the last matrix too, of square ones below the diagonal
            assert emulated.scan(dirty, False) == B - b
            if m == n:
                assert emulated.scan(dirty, True, seed=b) == B - b


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 100])
def test_a_square_is_turned(emulated: ModuleType, n: int, dtype) -> None:
    source = np.random.default_rng(n).standard_normal((n, n)).astype(dtype)
    for seed in range(5):
        target = np.zeros_like(source)
        emulated.transpose(source, target, shift=seed % 2, seed=seed)
        np.testing.assert_array_equal(target, source.T)


Ranking = tuple[list[float], list[int], list[int], list[int], bool]  # the last: pivoted


@st.composite
def rankings(draw: st.DrawFn) -> Ranking:
    few = st.sampled_from([-1.0, -0.0, 0.0, 0.25, 0.5, 1.0])  # ties within and between segments
    any_float = st.floats(allow_nan=False, allow_infinity=False, width=32)
    one = draw(st.sampled_from([few, any_float]))
    scores = draw(st.lists(st.lists(one, min_size=1, max_size=12), max_size=6))
    pivoted = draw(st.booleans())
    cost = [draw(st.integers(1, 9)) + (2 * len(s) - 1 if pivoted else 0) for s in scores]
    # Below the price of rank K the dense cap bites, above it the segment was truncated by the caller.
    most = [len(s) * (c - len(s) if pivoted else c) for c, s in zip(cost, scores, strict=True)]
    dense = [draw(st.just(price) | st.integers(1, 2 * price)) for price in most]
    offsets = [0]
    for s in scores:
        offsets.append(offsets[-1] + len(s))
    return [v for s in scores for v in sorted(s, reverse=True)], cost, dense, offsets, pivoted


def outcome(op, value, cost, dense, offsets, *rest) -> tuple[list[int], float] | str:
    try:
        ranks, threshold = op(value, cost, dense, offsets, *rest)
    except ValueError as error:
        return str(error)
    return list(ranks), float(threshold)


def check_topk(
    emulated: ModuleType, ranking: Ranking, budget: int, min_rank: int, multiple_of: int, fp64: bool, seeds: range
) -> None:
    value, cost, dense, offsets, pivoted = ranking
    scores = torch.tensor(value, dtype=torch.float64 if fp64 else torch.float32)
    prices = (torch.tensor(numbers, dtype=torch.int64) for numbers in (cost, dense, offsets))
    want = outcome(ops.global_topk, scores, *prices, budget, min_rank, multiple_of, pivoted)
    for seed in seeds:
        got = outcome(
            lambda *a, seed=seed: emulated.topk(*a, fp64=fp64, seed=seed),
            scores.double().tolist(), cost, dense, offsets, budget, min_rank, multiple_of, pivoted,
        )  # fmt: skip
        assert got == want
        if not isinstance(got, str):
            assert math.copysign(1, got[1]) == math.copysign(1, want[1])


@settings(max_examples=300, deadline=None)
@given(
    rankings(),
    st.integers(-1, 250) | st.floats(0, 1.1),
    st.integers(0, 14),
    st.integers(1, 6),
    st.booleans(),
    st.integers(0, 1000),
)
def test_topk_ranks_are_those_of_the_cpu(
    emulated: ModuleType, ranking: Ranking, budget: float, min_rank: int, multiple_of: int, fp64: bool, seed: int
) -> None:
    budget = int(budget * sum(ranking[2])) if isinstance(budget, float) else budget
    check_topk(emulated, ranking, budget, min_rank, multiple_of, fp64, range(seed, seed + 2))


def whole_model(L: int, K: int, pivoted: bool = False) -> Ranking:
    g = torch.Generator().manual_seed(L)
    value = torch.rand(L, K, generator=g).mul(2 * K).round().sort(1, descending=True).values.flatten()
    M = torch.randint(K, 3 * K, (L,), generator=g)
    return value.tolist(), (M + K).tolist(), (M * K).tolist(), [seg * K for seg in range(L + 1)], pivoted


@pytest.mark.parametrize("fp64", [True, False])
@pytest.mark.parametrize("multiple_of", [1, 8, 64])
@pytest.mark.parametrize("keep", [0.25, 0.8, 1.0])
@pytest.mark.parametrize("pivoted", [False, True])
def test_topk_of_a_whole_model(emulated: ModuleType, pivoted: bool, keep: float, multiple_of: int, fp64: bool) -> None:
    ranking = whole_model(210, 96, pivoted)
    check_topk(emulated, ranking, int(keep * sum(ranking[2])), 1, multiple_of, fp64, range(2))


@pytest.mark.parametrize("pivoted", [False, True])
def test_topk_of_more_segments_than_threads(emulated: ModuleType, pivoted: bool) -> None:
    ranking = whole_model(700, 5, pivoted)
    for multiple_of in (1, 2):
        check_topk(emulated, ranking, sum(ranking[2]) // 2, 1, multiple_of, True, range(3))


@pytest.mark.parametrize("multiple_of", [1, 3])
@pytest.mark.parametrize("pivoted", [False, True])
def test_topk_schedules(emulated: ModuleType, pivoted: bool, multiple_of: int) -> None:
    ranking = whole_model(20, 16, pivoted)
    check_topk(emulated, ranking, sum(ranking[2]) // 2, 1, multiple_of, True, range(50))


@pytest.mark.parametrize(
    "changed",
    [
        {"value": [3.0, 1, 2, math.nan]},
        {"value": [math.inf, 1, 2, 0]},
        {"value": [3.0, 1, 0, 2]},
        {"cost": [5, 0]},
        {"dense_cost": [-9, 9]},
        {"dense_cost": [2**62, 2**62]},
        {"offsets": [0, 2, 3]},
        {"offsets": [0, 4, 4]},
        {"offsets": [0, -3, 4]},
        {"offsets": [0, 9, 4]},
        {"budget": 9},
        {"budget": -(2**63)},
        {"cost": [2**62 - 1, 5], "dense_cost": [2**62 - 1, 2**60], "budget": 2**62 + 10, "min_rank": 0},
        {"value": [], "cost": [], "dense_cost": [], "offsets": [0]},
        {"value": [1.0, 1e-300, 1e-310, 5e-324]},
        {"min_rank": 2**62, "budget": 2**62, "multiple_of": 2**62},
        {"pivoted": True},
        {"pivoted": True, "cost": [5, 3]},
        {"pivoted": True, "cost": [4, 5]},
        {"pivoted": True, "cost": [1, 5], "offsets": [0, 9, 4]},
        {"pivoted": True, "min_rank": 2**62, "budget": 2**62, "multiple_of": 2**62},
        *(
            {
                "value": [3.0, 2, 1],
                "cost": [2**62],
                "dense_cost": [2**63 - 1],
                "offsets": [0, 3],
                "pivoted": True,
                "budget": budget,
                "min_rank": 0,
            }
            for budget in (2**62 - 1, 2**63 - 5, 2**63 - 4, 2**63 - 1)
        ),
    ],
)
def test_topk_says_what_the_cpu_says(emulated: ModuleType, changed: dict) -> None:
    good = {
        "value": [3.0, 1, 2, 0],
        "cost": [5, 5],
        "dense_cost": [9, 9],
        "offsets": [0, 2, 4],
        "pivoted": False,
        "budget": 15,
        "min_rank": 1,
        "multiple_of": 1,
    }
    value, cost, dense_cost, offsets, pivoted, budget, min_rank, multiple_of = {**good, **changed}.values()
    ranking = (value, cost, dense_cost, offsets, pivoted)
    check_topk(emulated, ranking, budget, min_rank, multiple_of, True, range(4))
