"""torch's factorizations, on a CPU by one thread: MKL's split sums by the number of threads, and bits would follow it.

Its products do not, by `MKL_CBWR` (`unirank/__init__.py`) or by `unirank.matmul`; neither reaches LAPACK.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar, cast

import torch

P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU, one thread inside."""
    before = torch.get_num_threads()
    try:
        if device.type == "cpu":
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)


def _by_one_thread(function: Callable[P, T]) -> Callable[P, T]:
    @wraps(function)
    def run(*args: P.args, **options: P.kwargs) -> T:
        with one_thread(cast(torch.Tensor, args[0]).device):
            return function(*args, **options)

    return run


cholesky = _by_one_thread(torch.linalg.cholesky)
cholesky_ex = _by_one_thread(torch.linalg.cholesky_ex)
cholesky_solve = _by_one_thread(torch.cholesky_solve)
qr = _by_one_thread(torch.linalg.qr)
solve_triangular = _by_one_thread(torch.linalg.solve_triangular)
