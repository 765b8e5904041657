"""torch's matrix products on a CPU, with the same bits for any number of threads, where MKL does not give them.

MKL shares a product out by its number of threads, and takes another kernel, which adds in another order, for a smaller
share. On an Intel CPU `MKL_CBWR` forbids that (`unirank/__init__.py`); on another it has no such effect. There the
products of float32 and float64 are made by `unirank::matmul_` instead, for the whole process: in tiles that follow from
the shapes alone, each by MKL on one thread, the tiles side by side. The environment variable UNIRANK_PRODUCTS set to
"torch" leaves torch's own, set to "tiles" replaces them on an Intel CPU too.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
from torch import Tensor

from unirank.errors import InputError
from unirank.libraries import load_cpu_library

_NAME, _OURS, _TORCHS = "UNIRANK_PRODUCTS", "tiles", "torch"
_FULL = (torch.float32, torch.float64)

_library: torch.library.Library | None = None  # torch's own products come back when it is deleted


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a b` of `a [B, M, K]` and `b [B, K, N]`, on a CPU, both float32 or both float64, of any strides: `[B, M, N]`.

    The bits do not depend on the number of threads.

    Raises:
        ValueError: a shape or dtype is not as above.
        NotImplementedError: torch's BLAS is not MKL (`possible`).
    """
    load_cpu_library()
    return _product(a, b)


def possible() -> bool:
    """Whether torch's BLAS is an MKL of which single products on one thread can be asked for."""
    load_cpu_library()
    return torch.ops.unirank.has_mkl_products()


def replaced() -> bool:
    """Whether torch's own products are made by `matmul` in this process."""
    return _library is not None


def keep_order() -> None:
    """Replace torch's products where their bits depend on the number of threads; once a process.

    Raises InputError when UNIRANK_PRODUCTS is set to something else than "tiles" or "torch", or cannot be obeyed.
    """
    global _library
    wish = os.environ.get(_NAME, "")
    if wish not in ("", _OURS, _TORCHS):
        raise InputError(f'{_NAME} must be "{_OURS}", "{_TORCHS}" or empty, got "{wish}".')
    if _library is not None or wish == _TORCHS or (wish != _OURS and keeps_order()):
        return
    if possible():
        _library = _replace()
    elif wish == _OURS:
        raise InputError(f"{_NAME} is {_OURS}, but this torch multiplies without MKL: unset it.")


def keeps_order(cpu: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether MKL keeps the order of its sums on this CPU: Intel's, or one that cannot be told."""
    return not cpu.is_file() or "GenuineIntel" in cpu.read_text()


def _replace() -> torch.library.Library:
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s).*[Oo]verriding a previously registered kernel")
        for name, function in (("mm", _mm), ("bmm", _bmm), ("addmm", _addmm), ("baddbmm", _baddbmm)):
            library.impl(name, function, "CPU", allow_override=True)
    return library


def _mm(a: Tensor, b: Tensor) -> Tensor:
    if not _ours(a, b):
        return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[-1]))
    return _product(a[None], b[None])[0]


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    if not _ours(a, b):
        return torch.bmm(a, b, out=a.new_empty(*a.shape[:-1], b.shape[-1]))
    return _product(a, b)


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if not _ours(a, b, bias):
        return torch.addmm(bias, a, b, beta=beta, alpha=alpha, out=a.new_empty(a.shape[0], b.shape[-1]))
    return _added(bias, a[None], b[None], alpha, beta)[0]


def _baddbmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if not _ours(a, b, bias):
        return torch.baddbmm(bias, a, b, beta=beta, alpha=alpha, out=a.new_empty(*a.shape[:-1], b.shape[-1]))
    return _added(bias, a, b, alpha, beta)


def _ours(a: Tensor, b: Tensor, bias: Tensor | None = None) -> bool:
    """Whether `matmul` takes them; what it does not take goes to torch, with its own words for what is wrong.

    One row or one column goes there too: of 7028 such products none depended on the number of threads, and MKL has
    kernels for them that are twice as fast (docs/numerics.md).
    """
    fits = a.dim() == b.dim() and a.shape[-1] == b.shape[-2] and a.shape[:-2] == b.shape[:-2]
    fits = fits and a.shape[-2] > 1 and b.shape[-1] > 1
    alike = a.dtype in _FULL and b.dtype == a.dtype and (bias is None or bias.dtype == a.dtype)
    return fits and alike and a.layout == b.layout == torch.strided


def _product(a: Tensor, b: Tensor) -> Tensor:
    return _into(a.new_empty(a.shape[0], a.shape[1], b.shape[2]), a, b, 1.0, 0.0)


def _added(bias: Tensor, a: Tensor, b: Tensor, alpha: float, beta: float) -> Tensor:
    shape = (a.shape[0], a.shape[1], b.shape[2])
    out = a.new_empty(shape)
    if beta != 0:  # where it is 0, even a NaN of the bias does not count
        out.copy_(bias.expand(shape if bias.dim() == 3 else shape[1:]))
    return _into(out, a, b, float(alpha), float(beta))


def _into(out: Tensor, a: Tensor, b: Tensor, alpha: float, beta: float) -> Tensor:
    torch.ops.unirank.matmul_(out, _dense(a), _dense(b), alpha, beta)
    return out


def _dense(a: Tensor) -> Tensor:
    """`a`, or a copy of it where neither its rows nor its columns lie without gaps, as a BLAS asks for."""
    by_rows = a.stride(2) == 1 and a.stride(1) >= a.shape[2]
    by_columns = a.stride(1) == 1 and a.stride(2) >= a.shape[1]
    return a if by_rows or by_columns else a.contiguous()
