"""Products whose bits do not depend on the number of threads, and how they take the place of torch's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import unirank
from tests.ops.cases import FULL
from tests.support.processes import run_python
from tests.support.threads import with_threads
from unirank import matmul
from unirank.matmul import keep_order, possible

with_mkl = pytest.mark.skipif(not possible(), reason="this torch multiplies without MKL")
# One tile is 192 x 192.
SHAPES = [(1, 1, 1), (1, 576, 200), (5, 32, 16), (191, 33, 193), (192, 192, 192), (8, 600, 385), (400, 7, 390)]


def operands(M: int, K: int, N: int, dtype: torch.dtype, batch: int = 1) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(3)
    a = torch.randn(batch, M, K, generator=made, dtype=torch.float64)
    return a.to(dtype), torch.randn(batch, K, N, generator=made, dtype=torch.float64).to(dtype)


def close(found: Tensor, a: Tensor, b: Tensor) -> bool:
    """Within the rounding of as many sums as there are, entry by entry."""
    a, b = a.double(), b.double()
    allowed = torch.finfo(found.dtype).eps * (a.shape[-1] + 2) * (a.abs() @ b.abs())
    return bool(((found.double() - a @ b).abs() <= allowed).all())


@with_mkl
@pytest.mark.parametrize("dtype", FULL)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_product(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    a, b = operands(*shape, dtype, batch=3)
    turned = a.transpose(1, 2).contiguous().transpose(1, 2), b.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.zeros(3, a.shape[1], 2 * a.shape[2] + 1, dtype=dtype)
    wide[:, :, 1 : a.shape[2] + 1] = a  # rows with gaps between them
    spread = torch.zeros(3, a.shape[1], 2 * a.shape[2], dtype=dtype)
    spread[:, :, ::2] = a  # no neighbours in memory
    for left in (a, turned[0], wide[:, :, 1 : a.shape[2] + 1], spread[:, :, ::2], a[:1].expand(3, -1, -1)):
        for right in (b, turned[1], b[:1].expand(3, -1, -1)):
            assert close(matmul.matmul(left, right), left, right)


@with_mkl
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
@pytest.mark.parametrize("batch", [0, 2])
def test_of_nothing(shape: tuple[int, int, int], batch: int) -> None:
    a, b = operands(*shape, torch.float32, batch)
    assert torch.equal(matmul.matmul(a, b), torch.zeros(batch, shape[0], shape[2]))


@with_mkl
@pytest.mark.parametrize("dtype", FULL)
@pytest.mark.parametrize("shape", [*SHAPES, (2000, 700, 517), (24, 32, 32), (31, 192, 560)], ids=str)
def test_the_bits_do_not_depend_on_the_number_of_threads(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    a, b = operands(*shape, dtype)
    one, *others = with_threads(lambda: matmul.matmul(a, b), (1, 2, 3, 4, 8))
    assert all(torch.equal(one, other) for other in others)


@with_mkl
def test_what_it_does_not_take() -> None:
    a, b = operands(2, 3, 4, torch.float32)
    out = torch.zeros(1, 2, 4)
    run = torch.ops.unirank.matmul_
    with pytest.raises(ValueError, match=r"must all be float64 or all float32, got float32, float64 and float32"):
        run(out, a.double(), b, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"shapes \[B, M, K\] and \[B, K, N\], got \[1, 2, 3\] and \[1, 2, 4\]"):
        run(out, a, torch.zeros(1, 2, 4), 1.0, 0.0)
    with pytest.raises(ValueError, match=r"out must be contiguous of shape \[1, 2, 4\], got \[1, 4, 2\]"):
        run(torch.zeros(1, 4, 2), a, b, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"a must have rows or columns without gaps"):
        run(out, torch.zeros(1, 4, 6)[:, ::2, ::2], b, 1.0, 0.0)


@pytest.mark.parametrize(
    ("vendor", "keeps"), [("GenuineIntel", True), ("AuthenticAMD", False), ("HygonGenuine", False)]
)
def test_mkl_keeps_its_order_on_intels_alone(vendor: str, keeps: bool, tmp_path: Path) -> None:
    cpu = tmp_path / "cpuinfo"
    cpu.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    assert matmul.keeps_order(cpu) == keeps
    assert matmul.keeps_order(tmp_path / "nowhere")


def test_a_wish_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIRANK_PRODUCTS", "tile")
    with pytest.raises(unirank.InputError, match=r'UNIRANK_PRODUCTS must be "tiles", "torch" or empty, got "tile"'):
        keep_order()


REPLACED = "import torch, unirank.ops, unirank.matmul as m; print(m.replaced())"


@with_mkl
def test_torch_s_own_can_be_kept_and_replaced_without_a_word() -> None:
    assert run_python(REPLACED, UNIRANK_PRODUCTS="torch") == "False"
    assert run_python(REPLACED, UNIRANK_PRODUCTS="tiles") == "True"
    for module in ("unirank.models.low_rank", "unirank.models.loading", "unirank.evaluation.perplexity"):
        assert (
            run_python(f"import {module}, unirank.matmul as m; print(m.replaced())", UNIRANK_PRODUCTS="tiles") == "True"
        )


@with_mkl
def test_torch_multiplies_as_before_where_they_are_replaced() -> None:
    assert (
        run_python("from tests.ops.test_matmul import check_torch; check_torch()", UNIRANK_PRODUCTS="tiles") == "done"
    )


def check_torch() -> None:
    """What a program sees of torch's products, run where `matmul` makes them."""
    matmul.keep_order()
    assert matmul.replaced()
    x, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((2, 5, 7), (4, 7), (4,)))
    y = F.linear(x, weight, bias)
    y.square().sum().backward()
    wanted = 2 * y.detach()
    torch.testing.assert_close(y, torch.einsum("btn,mn->btm", x, weight) + bias)
    torch.testing.assert_close(x.grad, torch.stack([w @ weight.detach() for w in wanted]))
    torch.testing.assert_close(weight.grad, torch.einsum("btm,btn->mn", wanted, x.detach()))
    torch.testing.assert_close(bias.grad, wanted.sum((0, 1)))

    a, b, c = torch.randn(3, 4, 5).double(), torch.randn(3, 5, 6).double(), torch.randn(3, 4, 6).double()
    c[0, 0, 0] = torch.nan
    product = torch.stack([torch.stack([(row[:, None] * m).sum(0) for row in n]) for n, m in zip(a, b, strict=True)])
    torch.testing.assert_close(a @ b, product)
    torch.testing.assert_close(torch.baddbmm(c, a, b, beta=0, alpha=2), 2 * product)
    torch.testing.assert_close(torch.baddbmm(c, a, b, beta=0.5)[1:], product[1:] + 0.5 * c[1:])
    torch.testing.assert_close(torch.addmm(c[1, 0], a[1], b[1], beta=3, alpha=-1), 3 * c[1, 0] - product[1])
    torch.testing.assert_close(torch.addmm(torch.ones(4, 1).double(), a[1], b[1]), 1 + product[1])
    torch.testing.assert_close(torch.func.vmap(torch.mm)(a, b), product)
    assert torch.autograd.gradcheck(torch.bmm, (a.requires_grad_(), b.requires_grad_()))

    whole = torch.ones(2, 2, dtype=torch.int64)
    assert (whole @ whole).tolist() == [[2, 2], [2, 2]]
    assert (whole[None] @ whole[None]).tolist() == [[[2, 2], [2, 2]]]
    assert torch.addmm(whole, whole, whole).tolist() == [[3, 3], [3, 3]]
    assert torch.baddbmm(whole[None], whole[None], whole[None]).tolist() == [[[3, 3], [3, 3]]]
    for dtype in (torch.bfloat16, torch.float16, torch.complex64):
        assert (whole.to(dtype) @ whole.to(dtype)).tolist() == [[2, 2], [2, 2]]
    assert torch.view_as_complex(torch.randn(3, 3, 2)).conj().imag.mm(torch.eye(3)).shape == (3, 3)
    torch.testing.assert_close(weight.detach().to_sparse() @ torch.eye(7), weight.detach())
    assert torch.mm(torch.empty(2, 3, device="meta"), torch.empty(3, 4, device="meta")).shape == (2, 4)
    with pytest.raises(RuntimeError, match=r"cannot be multiplied \(2x3 and 2x3\)"):
        torch.mm(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="same dtype"):
        torch.mm(torch.zeros(2, 3), torch.zeros(3, 2).double())
    with pytest.raises(RuntimeError):
        torch.addmm(torch.zeros(7), torch.zeros(2, 3), torch.zeros(3, 2))
    print("done")
