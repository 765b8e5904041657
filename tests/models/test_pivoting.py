"""The pivoted form of one matrix: which rows it takes, what it costs, and what it loses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.threads import with_threads
from unirank.models.low_rank import LowRankLinear, stored_tensors, weight_product
from unirank.models.pivoting import LIMIT, Pivoted, dominant_rows, pivot
from unirank.types import rank_cost

shapes = st.tuples(st.integers(2, 40), st.integers(1, 40), st.integers(1, 39), st.integers(0, 1000)).filter(
    lambda s: s[2] < s[0]
)


def factors(m: int, n: int, rank: int, seed: int, spread: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(m, rank, generator=generator, dtype=torch.float64)
    scale = 10.0 ** (-spread * torch.arange(rank, dtype=torch.float64) / max(1, rank - 1))
    return left * scale, torch.randn(rank, n, generator=generator, dtype=torch.float64)


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    stored = stored_tensors(left, right, "pivoted")
    return weight_product(stored["left.weight"], stored["right.weight"], stored["place"])


@given(shapes, st.sampled_from([0.0, 4.0, 8.0]))
@settings(deadline=None, max_examples=200)
def test_the_product_is_the_same_and_no_entry_is_above_the_limit(shape: tuple, spread: float) -> None:
    m, n, rank, seed = shape
    left, right = factors(m, n, rank, seed, spread)
    found = pivot(left, right)
    assert found.a.shape == (m - rank, rank)
    assert found.b.shape == (rank, n)
    assert sorted(found.order.tolist()) == list(range(m))
    assert not found.a.numel() or float(found.a.abs().max()) <= LIMIT
    whole = left @ right
    assert torch.allclose(product(left, right), whole, rtol=0, atol=1e-12 * float(whole.abs().max()))
    assert found.a.numel() + found.b.numel() == rank * (m + n - rank)


def test_the_parameters_are_those_of_the_cost() -> None:
    for form in ("factors", "pivoted"):
        for rank in range(1, 12):
            low = LowRankLinear(17, 12, rank, form=form)
            count = low.left.weight.numel() + low.right.weight.numel()
            assert count == rank * (29 - rank if form == "pivoted" else 29)
            assert rank_cost(12, 17, rank, form) == min(count, 12 * 17)
    assert rank_cost(12, 17, 12, "pivoted") == 12 * 17


@pytest.mark.parametrize(
    "left",
    [
        torch.zeros(6, 3),
        torch.tensor([[1.0, 2.0], [2.0, 4.0], [0.0, 0.0], [3.0, 6.0]]),  # of rank 1
        torch.eye(6)[:, :3],
        torch.eye(6)[[5, 0, 3, 1, 2, 4]][:, :5] * torch.tensor([1e-30, 1, 1e8, 1, 1e-8]),
    ],
)
def test_a_matrix_of_lower_rank_or_wild_scale_is_no_special_case(left: torch.Tensor) -> None:
    left = left.double()
    a, order = dominant_rows(left)
    rank = left.shape[1]
    assert a.isfinite().all()
    assert torch.allclose(a @ left[order[:rank]], left[order[rank:]], rtol=1e-12, atol=0)


def test_pivots_and_others_ascend_so_that_the_gather_runs_forward() -> None:
    left, right = factors(30, 20, 11, 0)
    order = pivot(left, right).order
    assert bool((order[:11].diff() > 0).all())
    assert bool((order[11:].diff() > 0).all())


def test_the_pivots_do_not_depend_on_how_the_product_is_split() -> None:
    left, right = factors(30, 20, 11, 1)
    turn = torch.linalg.qr(torch.randn(11, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))[0]
    one, other = pivot(left, right), pivot(left @ turn, turn.T @ right)
    # Where the start differs the end may be another local optimum; both hold the limit and make the same matrix.
    assert torch.allclose(product(left @ turn, turn.T @ right), product(left, right), atol=1e-12)
    assert float(other.a.abs().max()) <= LIMIT >= float(one.a.abs().max())


@pytest.mark.parametrize("shape", [(576, 576, 300), (400, 150, 149), (300, 2000, 128)])
def test_bits_do_not_depend_on_threads(shape: tuple[int, int, int]) -> None:
    left, right = factors(*shape, seed=3)

    def run() -> Pivoted:
        threads = torch.get_num_threads()
        made = pivot(left, right)
        assert torch.get_num_threads() == threads
        return made

    found = with_threads(run)
    for other in found[1:]:
        assert torch.equal(found[0].a, other.a)
        assert torch.equal(found[0].b, other.b)
        assert torch.equal(found[0].order, other.order)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_the_others_are_fitted_to_the_rounded_pivots(dtype: torch.dtype) -> None:
    left, right = (factor.to(dtype) for factor in factors(96, 64, 40, 4, spread=2.0))
    exact = left.double() @ right.double()
    found = pivot(left, right)
    assert found.a.dtype == found.b.dtype == dtype
    a, order = dominant_rows(left.double())
    plain = a.to(dtype)

    def lost(others: torch.Tensor) -> float:
        return float((others.double() @ found.b.double() - exact[order[40:]]).norm() / exact[order[40:]].norm())

    assert lost(found.a) < lost(plain)
    assert lost(found.a) < 8 * torch.finfo(dtype).eps


def test_a_bias_is_added_where_it_belongs() -> None:
    left, right = factors(12, 9, 5, 6)
    low = LowRankLinear(9, 12, 5, bias=True, form="pivoted", dtype=torch.float64)
    low.set_product(left, right)
    bias = torch.arange(12, dtype=torch.float64)
    low.set_bias(torch.nn.Parameter(bias))
    x = torch.randn(2, 3, 9, dtype=torch.float64)
    want = x @ (left @ right).T + bias
    assert torch.allclose(low(x), want)
    assert torch.allclose(low.dense_weight(), left @ right)
    assert low.output_bias is low.bias


def test_gradients_are_those_of_the_two_products_and_the_gather() -> None:
    left, right = factors(12, 9, 5, 7)
    low = LowRankLinear(9, 12, 5, bias=True, form="pivoted", dtype=torch.float64)
    low.set_product(left, right)
    x = torch.randn(3, 4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(low, (x,))
    wanted = [x, low.left.weight, low.right.weight, low.output_bias]
    inner = x @ low.right.weight.T
    plain = torch.cat((inner, inner @ low.left.weight.T), -1)[..., low.place.long()] + low.output_bias
    weight = torch.randn(3, 4, 12, dtype=torch.float64)
    ours = torch.autograd.grad((low(x) * weight).sum(), wanted)
    assert all(
        torch.allclose(a, b) for a, b in zip(ours, torch.autograd.grad((plain * weight).sum(), wanted), strict=True)
    )
    assert low(x[0, 0]).shape == (12,)


@pytest.fixture
def low() -> LowRankLinear:
    found = LowRankLinear(24, 32, 10, bias=True, form="pivoted")
    left, right = factors(32, 24, 10, 8)
    found.set_product(left.float(), right.float())
    found.set_bias(torch.nn.Parameter(torch.linspace(-1, 1, 32)))
    return found


@pytest.mark.parametrize("shape", [(24,), (0, 24), (3, 5, 24), (3, 40, 24)], ids=str)
def test_without_gradients_the_bits_are_the_same(low: LowRankLinear, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    want = low(x).detach()
    turned = x.movedim(0, -2).contiguous().movedim(-2, 0) if len(shape) > 2 else x
    with torch.no_grad():
        assert torch.equal(low(x), want)
        assert torch.allclose(low(turned), want, atol=1e-5)
    with torch.inference_mode():
        assert torch.equal(low(x), want)


@pytest.mark.parametrize("inner", ["left", "right"])
@pytest.mark.parametrize("how", ["hook", "pre-hook", "forward", "module"])
@torch.no_grad()
def test_whatever_is_put_on_the_inner_linears_is_heard(low: LowRankLinear, inner: str, how: str) -> None:
    """Hooks, the patched forward of an offloading library, an adapter's wrapper."""
    linear, x = low.get_submodule(inner), torch.randn(64, 24)
    before, heard = low(x), []
    if how == "hook":
        linear.register_forward_hook(lambda *_: heard.append(1))
    elif how == "pre-hook":
        linear.register_forward_pre_hook(lambda *_: heard.append(1))
    elif how == "forward":
        original = linear.forward
        linear.forward = lambda given: heard.append(1) or original(given)
    else:

        class Wrapper(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = linear.weight

            def forward(self, given: torch.Tensor) -> torch.Tensor:
                heard.append(1)
                return linear(given)

        setattr(low, inner, Wrapper())
    assert torch.equal(low(x), before)
    assert heard == [1]


@torch.no_grad()
def test_vmap_trace_and_autocast(low: LowRankLinear) -> None:
    x = torch.randn(3, 40, 24)
    want = low(x)
    assert torch.allclose(torch.func.vmap(low)(x), want, atol=1e-6)
    traced = torch.jit.trace(low, x)
    assert torch.allclose(traced(x[:2, :35]), want[:2, :35], atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert low(x).dtype == torch.bfloat16  # as every linear
        assert (low(x).float() - want).abs().max() < 0.02 * want.abs().max()
