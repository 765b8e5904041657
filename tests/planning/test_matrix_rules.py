"""Rules that give ranks to matrices: what they share, and each on a case that is counted by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.components import Gradients, allocate, cost, make_request, request_of
from unirank.errors import NonFiniteError
from unirank.planning.allocator.targets import ranks_from_targets, shares
from unirank.planning.allocator.zs_svd import zero_sum_order
from unirank.rank_plan import budget_of
from unirank.types import CosineStat, LinearSpec

# -- what the matrix rules share --------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.floats(0, 10), st.integers(1, 1000)), min_size=1, max_size=8),
    st.floats(0, 1),
)
def test_shares_are_proportional_capped_and_have_the_mean(pairs: list[tuple[float, int]], mean: float) -> None:
    weights, sizes = (torch.tensor(values, dtype=torch.float64) for values in zip(*pairs, strict=True))
    fractions = shares(weights, sizes, mean)
    assert bool((fractions >= 0).all() and (fractions <= 1).all())
    assert float((fractions * sizes).sum() / sizes.sum()) == pytest.approx(mean, abs=1e-9)
    free = (fractions < 1 - 1e-9) & (weights > 1e-6 * weights.max())
    ratios = fractions[free] / weights[free]
    assert ratios.tolist() == pytest.approx([float(ratios.mean())] * len(ratios), rel=1e-6)


def test_what_a_capped_share_cannot_take_goes_to_the_others() -> None:
    weights, sizes = torch.tensor([4.0, 1.0, 1.0]).double(), torch.ones(3)
    # 1.5 to share as 4 : 1 : 1 would give the first 1.0; 1.8 would give it 1.2.
    assert shares(weights, sizes, 0.5).tolist() == pytest.approx([1.0, 0.25, 0.25])
    assert shares(weights, sizes, 0.6).tolist() == pytest.approx([1.0, 0.4, 0.4])
    assert shares(torch.zeros(3), sizes, 0.5).tolist() == [0.5, 0.5, 0.5]


def square(count: int, side: int = 200, kinds: tuple[str, ...] = ("x",)) -> list[LinearSpec]:
    """`count` layers with one square linear of each kind; `r* = side / 2`."""
    return [
        LinearSpec(f"l.{layer}.{kind}", layer, "mlp" if kind == "x" else "attention", kind, side, side)
        for layer in range(count)
        for kind in kinds
    ]


def flat(linears: list[LinearSpec]) -> dict[str, torch.Tensor]:
    return {spec.name: torch.ones(spec.k, dtype=torch.float64) for spec in linears}


def block(*cosines: float, tokens: int = 10) -> list[dict[str, CosineStat]]:
    return [{"block": CosineStat(cosine * tokens, 0.0, tokens)} for cosine in cosines]


def test_ranks_are_proportional_to_targets_and_dense_from_the_break_even_rank_on() -> None:
    linears = square(3)
    request = make_request(linears, flat(linears), block(0, 0, 0), 0.4)  # 180 components of 300
    assert ranks_from_targets(request, torch.tensor([1.0, 2.0, 3.0]))[0] == [30, 60, 90]
    # 1 : 3 : 8 would give the third 120, beyond r* = 100: it is dense, and the others share 80.
    assert ranks_from_targets(request, torch.tensor([1.0, 3.0, 8.0]))[0] == [20, 60, 200]
    # By eights 24, 56, 88, and of the 12 that frees the next 8 go to the first: 1/25 > 2/57 > 3/89.
    assert ranks_from_targets(replace(request, multiple_of=8), torch.tensor([1.0, 2.0, 3.0]))[0] == [32, 56, 88]


def test_a_target_that_is_not_finite_names_the_linear() -> None:
    linears = square(2)
    request = make_request(linears, flat(linears), block(0, 0), 0.4)
    with pytest.raises(NonFiniteError, match=r"l\.1\.x"):
        ranks_from_targets(request, torch.tensor([1.0, math.inf]))


# -- each rule on a case that is counted by hand ----------------------------------------------------------------------


def test_typed_keeps_three_times_as_much_of_v_and_o() -> None:
    linears = square(2, kinds=("q_proj", "k_proj", "v_proj", "o_proj", "x"))
    request = make_request(linears, flat(linears), block(0, 0), 0.6)
    assert allocate("typed", request) == [20, 20, 60, 60, 40] * 2
    assert allocate("typed", request, ratio=1.0) == [40] * 10
    # With 0.8 kept, v and o would be at 1.2: dense, and q and k keep (4 * 0.8 - 2) / 2 = 0.6.
    assert allocate("typed", replace(request, remove=0.2, budget=budget_of(0.2, 400_000))) == [60, 60, 200, 200, 80] * 2


def test_d_rank_follows_the_root_of_the_effective_rank_and_moves_a_share_to_v() -> None:
    linears = square(2, kinds=("q_proj", "k_proj", "v_proj"))
    energies = {spec.name: (torch.arange(200) < (4 if spec.layer else 16)).double() for spec in linears}
    request = make_request(linears, energies, block(0, 0), 0.7)  # 60 components a kind
    # sqrt(16) : sqrt(4) = 2 : 1, so 40 and 20; then a fifth of q and k: 40 - 8, 40 - 8, 40 + 16.
    assert allocate("d-rank", request, beta=0.0) == [40, 40, 40, 20, 20, 20]
    assert allocate("d-rank", request) == [32, 32, 56, 16, 16, 28]


def test_d_rank_weighs_the_effective_rank_by_the_cost_of_a_rank() -> None:
    wide, narrow = LinearSpec("l.0.x", 0, "mlp", "x", 300, 600), LinearSpec("l.1.x", 1, "mlp", "x", 100, 125)
    energies = flat([wide, narrow])
    energies["l.0.x"][100:] = 0.0  # both of effective rank 100
    request = make_request([wide, narrow], energies, block(0, 0), 0.9)
    ranks = allocate("d-rank", request, beta=0.0)
    # k ∝ sqrt(R / w): sqrt(225 / 900) = 1/2; and 900 k + 225 * 2 k = 19250.
    assert ranks == [14, 29]
    assert cost(request, ranks) <= request.budget == 19250


def test_svdllm_v2_removes_in_proportion_to_the_inverse_log_of_the_loss() -> None:
    linears = square(2)
    energies = flat(linears)
    tokens = 1000
    for name, loss in (("l.0.x", 1e12), ("l.1.x", 1e4)):
        energies[name][50:] = loss / tokens / 150  # the uniform rank is 50
    request = make_request(linears, energies, block(0, 0, tokens=tokens), 0.5)
    # 1/12 : 1/4 = 1 : 3, mean 0.5: removed 0.25 and 0.75.
    assert allocate("svdllm-v2", request) == [75, 25]


def test_tolerance_is_the_least_rank_with_one_relative_tail() -> None:
    linears = square(2, side=4)
    energies = {"l.0.x": torch.tensor([80.0, 15.0, 4.0, 1.0]), "l.1.x": torch.tensor([4.0, 3.0, 2.0, 1.0])}
    request = make_request(linears, {n: e.double() for n, e in energies.items()}, block(0, 0), 0.25)
    # Dense costs 2 ranks. Tails from component 2: 0.2 and 0.6, so 3 ranks buy the second of the second.
    assert allocate("tolerance", request) == [1, 4]


@given(st.integers(0, 1000), st.floats(0.1, 0.7))
@settings(deadline=None)
def test_tolerance_means_what_it_says(seed: int, remove: float) -> None:
    request = request_of(seed, 3, remove, scale=4)
    ranks = allocate("tolerance", request)
    with_it, without_last = [], []
    for spec, rank in zip(request.linears, ranks, strict=True):
        p = request.energies[spec.name] / request.energies[spec.name].sum()
        with_it.append(float(p[rank:].sum()))
        if 1 < rank < spec.k:
            without_last.append(float(p[rank - 1 :].sum()))
    if without_last:
        # Some eps² lies between: every matrix fulfils it, none with its last component less.
        assert max(with_it) <= min(without_last) + 1e-12


def test_bi_is_proportional_to_the_angle_of_the_block() -> None:
    linears = square(3)
    cosines = block(*(math.cos(math.pi * angle) for angle in (0.1, 0.2, 0.3)))
    assert allocate("bi", make_request(linears, flat(linears), cosines, 0.4)) == [30, 60, 90]


def test_softmax_removes_by_the_softmax_of_the_block_influence() -> None:
    linears = square(2, kinds=("x", "q_proj"))
    cosines = block(0.9, 0.9 - 0.1 * math.log(3))
    # softmax(-BI / 0.1) = 3/4 and 1/4, so 2 * 0.4 * that is removed.
    request = make_request(linears, flat(linears), cosines, 0.4)
    assert allocate("softmax", request) == [40, 40, 80, 80]
    assert allocate("softmax", request, temperature=1e6) == [60] * 4


def test_zs_svd_drops_from_the_ends_and_holds_the_sum_near_zero() -> None:
    # Ends: 1, -2, 5. Sum 0: the smaller rise, 1; sum 1: the fall, -2; sum -1: of the rises 5 and 3 the 3; sum 2: the
    # fall -9 behind it; then the rises in their order, 4 and 5, as there is no fall any more.
    changes = [[7.0, -9.0, 3.0, 1.0], [7.0, 4.0, -2.0], [7.0, 5.0]]
    order = zero_sum_order(changes, 1)
    assert [changes[l][i] for l, i in order] == [1.0, -2.0, 3.0, -9.0, 4.0, 5.0]
    assert [l for l, _ in order] == [0, 1, 0, 0, 1, 2]


def test_zs_svd_keeps_what_would_be_dropped_last() -> None:
    linears = square(2, side=8)  # r* = 4, the stored components
    slopes = {"l.0.x": torch.tensor([9.0, 1.0, -1.0, 0.5]), "l.1.x": torch.tensor([9.0, 3.0, 2.0, 4.0])}
    request = make_request(linears, flat(linears), block(0, 0), 0.5, slopes=slopes)
    # Dropped: 0.5; -1; then 1, the smallest rise; then, without falls, 4. Four are kept.
    assert allocate("zs-svd", request) == [1, 3]


def test_curvature_per_parameter_prefers_the_cheaper_component() -> None:
    cheap, dear = LinearSpec("a", 0, "mlp", "a", 8, 8), LinearSpec("b", 0, "mlp", "b", 8, 24)
    slopes = {"a": torch.tensor([2.0, 1.0, 1.0, 1.0]), "b": torch.tensor([3.0, 1.5, 0.1, 0.1, 0.1, 0.1])}
    request = make_request([cheap, dear], flat([cheap, dear]), block(0), 0.75)  # 64 = 16 + 32 and one more of a
    request = replace(request, store=Gradients(Path("none"), {}, (cheap, dear), values=slopes))
    assert allocate("curvature", request, cost_power=1.0) == [2, 1]
    assert allocate("curvature", replace(request, budget=80), cost_power=0.0) == [1, 2]
    assert allocate("curvature", replace(request, budget=80), cost_power=1.0) == [3, 1]
