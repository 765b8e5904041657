"""Inputs for the emulated kernels that need numpy alone: the kernel tests and the mutants share them.

A mutant counts as caught where one of `CHECKS[kernel]` sees its results differ from those of the unchanged kernels,
which test_kernels.py holds to the CPU ops, by more than test_kernels.py tolerates.
"""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np


def rows(T: int, D: int, kind: str) -> np.ndarray:
    """Random rows; "bf16" as the upper halves of fp32, in uint16."""
    x = np.random.default_rng(T * 1000 + D).standard_normal((T, D))
    if kind == "bf16":
        return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return x.astype(kind)


def _cosine(emulated: ModuleType, seed: int) -> list[float]:
    results: list[float] = []
    # A warp a row and a block a row, whole packs and tails, more rows than one reduction holds threads.
    for T, D, kind in [(9, 33, "float32"), (3, 1033, "bf16"), (2, 1100, "float64"), (520, 3, "float16")]:
        x, y = rows(T, D, kind), rows(T + 1, D, kind)[:T]
        for layout in ({}, {"pad": 3, "shift": 1}):
            results += emulated.cosine(x, y, bf16=kind == "bf16", seed=seed, **layout)
    degenerate = np.ones((4, 5), np.float32)
    degenerate[1] = 0
    results += emulated.cosine(degenerate, degenerate, seed=seed)
    huge = np.full((2, 5), 3e30, np.float32)
    results += emulated.cosine(huge, huge, seed=seed)
    results += emulated.cosine(np.full((1, 3), 1e100), np.full((1, 3), 1e140), seed=seed)
    return results


def _gram(emulated: ModuleType, seed: int) -> list[float]:
    results: list[float] = []
    for T, N, kind, sums in [(130, 37, "float32", "float64"), (9, 70, "bf16", "float32"), (5, 3, "float64", "float64")]:
        gram, mean = np.zeros((N, N), sums), np.zeros(N, sums)
        emulated.gram(gram, mean, rows(T, N, kind), bf16=kind == "bf16", pad=2, shift=1, seed=seed)
        results += [*gram.ravel().tolist(), *mean.tolist()]
    # One row whose stride is 1, as torch gives it to some views; and more rows than two chunks.
    for T, N, pad in [(1, 40, -39), (2 * 8192 + 3, 2, 0)]:
        gram, mean = np.zeros((N, N)), np.zeros(N)
        emulated.gram(gram, mean, rows(T, N, "float32"), pad=pad, seed=seed)
        results += [*gram.ravel().tolist(), *mean.tolist()]
    return results


def bad_matrices(B: int, m: int, n: int, *bad: tuple[int, int, int], dtype: str = "float64") -> np.ndarray:
    """Column-major matrices `[B, n, m]`, not finite at the places `(matrix, row, column)`."""
    a = np.random.default_rng(B + m + n).standard_normal((B, n, m)).astype(dtype)
    for number, (b, i, j) in enumerate(bad):
        a[b, j, i] = (math.nan, math.inf, -math.inf)[number % 3]
    return a


def _matrices(emulated: ModuleType, seed: int) -> list[float]:
    results: list[float] = []
    # Below, on and above the diagonal; the first and the last element; a row and a column that a warp does not fill;
    # several bad matrices, of which the first counts; none.
    for bad in [(), ((3, 7, 2),), ((1, 5, 5),), ((2, 2, 7),), ((0, 0, 0),), ((4, 39, 39),), ((3, 38, 0), (1, 33, 39))]:
        for dtype in ("float32", "float64"):
            a = bad_matrices(5, 40, 40, *bad, dtype=dtype)
            results += [emulated.scan(a, upper, seed=seed) for upper in (False, True)]
    results.append(emulated.scan(bad_matrices(3, 70, 9, (2, 69, 8)), False, seed=seed))
    results.append(emulated.scan(bad_matrices(3, 2, 1), False, seed=seed))  # a block for more columns than there are
    for n in (1, 31, 33, 70):
        for dtype in ("float32", "float64"):
            source = bad_matrices(1, n, n, dtype=dtype)[0]
            target = np.zeros_like(source)
            emulated.transpose(source, target, seed=seed)
            results += target.ravel().tolist()
    return results


def _topk(emulated: ModuleType, seed: int) -> list[object]:
    def outcome(*arguments, fp64: bool = True) -> object:
        try:
            return emulated.topk(*arguments, fp64=fp64, seed=seed)
        except ValueError as error:
            return str(error)

    results: list[object] = []
    g = np.random.default_rng(7)
    for L, K, fp64 in [(40, 20, False), (3, 7, True), (300, 3, True)]:
        value = np.sort(g.integers(-3, 9, (L, K)) / 4, axis=1)[:, ::-1]
        value = np.where(value == 0, g.choice([0.0, -0.0], value.shape), value)
        cost = g.integers(1, 9, L)
        dense = np.maximum(1, (cost * K * g.uniform(0.4, 1.5, L)).astype(np.int64))
        offsets = np.arange(L + 1) * K
        for keep, min_rank, multiple_of in [(0.3, 0, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 3), (2.0, 1, 4)]:
            arguments = (value.ravel().tolist(), cost.tolist(), dense.tolist(), offsets.tolist())
            results.append(outcome(*arguments, int(keep * dense.sum()), min_rank, multiple_of, fp64=fp64))
    for L, K, fp64 in [(40, 20, False), (300, 3, True)]:
        value = np.sort(g.integers(-3, 9, (L, K)) / 4, axis=1)[:, ::-1]
        M = g.integers(K, 2 * K, L)
        # With the price of the dense matrix at K, below it, and out of reach.
        dense = (M * K * g.choice([1, 0.8, 1.2], L)).astype(np.int64)
        arguments = (value.ravel().tolist(), (M + K).tolist(), dense.tolist(), (np.arange(L + 1) * K).tolist())
        for keep, min_rank, multiple_of in [(0.3, 0, 1), (0.7, 1, 1), (0.7, 2, 3), (2.0, 1, 4)]:
            results.append(outcome(*arguments, int(keep * dense.sum()), min_rank, multiple_of, True, fp64=fp64))
    # Faults in the input; a tie of -0.0 and 0.0; a sum of prices that carries into its upper half; a floor that is no
    # multiple, beside a segment that would take what it frees. Pivoted, the least legal cost, one below it, and prices
    # near the end of int64.
    for value, cost, dense, offsets, *limits in [
        ([3.0, 1, 2, math.nan], [5, 5], [9, 9], [0, 2, 4], 15, 1, 1),
        ([3.0, 1, 0, 2], [5, 5], [9, 9], [0, 2, 4], 15, 1, 1),
        ([3.0, 1, 2, 0], [5, 0], [9, 9], [0, 2, 4], 15, 1, 1),
        ([3.0, 1, 2, 0], [5, 5], [2**63 - 1, 1], [0, 2, 4], 15, 1, 1),
        ([1.0, 1e-300, 1e-310, 0], [5, 5], [9, 9], [0, 2, 4], 15, 1, 1),
        ([-0.0, 0.0], [5, 5], [9, 9], [0, 1, 2], 5, 0, 1),
        ([1.0] * 3 + [9.0] * 6, [5, 2], [100, 100], [0, 3, 9], 26, 3, 2),
        ([3.0, 1, 2, 0], [4, 5], [4, 9], [0, 2, 4], 12, 1, 1, True),
        ([3.0, 1, 2, 0], [4, 3], [4, 9], [0, 2, 4], 12, 1, 1, True),
        ([3.0, 2, 1], [2**62], [2**63 - 1], [0, 3], 2**63 - 4, 0, 1, True),
        ([3.0, 2, 1], [2**62], [2**63 - 1], [0, 3], 2**63 - 1, 0, 1, True),
    ]:
        results.append(outcome(value, cost, dense, offsets, *limits))
    return results


CHECKS = {"cosine": _cosine, "gram": _gram, "matrices": _matrices, "topk": _topk}


def differ(kernel: str, got: list, want: list) -> bool:
    if kernel in ("matrices", "topk"):
        return got != want
    rtol = 1e-12 if kernel == "cosine" else 1e-5
    return not np.allclose(got, want, rtol=rtol, atol=rtol * 10, equal_nan=True)
