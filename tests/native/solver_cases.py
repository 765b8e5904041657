"""Inputs and comparisons that the tests of the cuSOLVER driver share."""

from __future__ import annotations

import numpy as np

DTYPES = (np.float32, np.float64)


def columns(B: int, m: int, n: int, dtype=np.float64) -> np.ndarray:
    """Column-major matrices as they lie in memory: [B, n, m]."""
    return np.random.default_rng(m * 1000 + n).standard_normal((B, n, m)).astype(dtype)


def symmetric(B: int, n: int, dtype=np.float64) -> np.ndarray:
    a = columns(B, n, n)
    return (a + a.transpose(0, 2, 1)).astype(dtype)


def perturb_all(mock) -> None:
    """Let the polar method report every matrix as perturbed, so that QR iteration solves each again."""
    for matrix in range(100):
        mock.set_perturbation(matrix, 1.0)


def close(got: np.ndarray, want: np.ndarray) -> None:
    eps = np.finfo(got.dtype).eps
    assert np.abs(got - want).max() <= 100 * eps * max(1.0, float(np.abs(want).max()))
