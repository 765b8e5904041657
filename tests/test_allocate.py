"""Rank plans: exact budgets, and what must not matter to them."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import unirank
from unirank.allocators import Request, allocator
from unirank.errors import InputError, NonFiniteError
from unirank.score import ScoreSettings, assemble, importance_of, score
from unirank.types import DENSE, CosineStat, LinearSpec, RankPlan, budget_of

SHAPES = [(32, 32), (16, 32), (48, 32), (32, 48)]


def request_of(seed: int, layers: int, remove: float, min_rank: int = 1, multiple_of: int = 1, **kwargs) -> Request:
    """A synthetic model of `layers` layers with 4 linears each; some spectra have ties, some have dead tails."""
    generator = torch.Generator().manual_seed(seed)
    linears, energies, cosines = [], {}, []
    for layer in range(layers):
        for position, (m, n) in enumerate(SHAPES):
            spec = LinearSpec(
                f"l.{layer}.{position}", layer, "attention" if position < 2 else "mlp", str(position), m, n
            )
            decay = torch.rand((), generator=generator, dtype=torch.float64) * 0.3
            spectrum = torch.exp(-decay * torch.arange(spec.k, dtype=torch.float64))
            if position == 1:
                spectrum = (spectrum * 8).round() / 8
            linears.append(spec)
            energies[spec.name] = spectrum
        cosines.append(
            {
                key: CosineStat(10 * (1 - float(torch.rand((), generator=generator))), 10.0, 10)
                for key in ("attention", "mlp", "block")
            }
        )
    budget = budget_of(remove, sum(spec.params for spec in linears))
    return Request(tuple(linears), energies, cosines, ScoreSettings(**kwargs), remove, budget, min_rank, multiple_of)


def reachable(request: Request) -> bool:
    least = -(-request.min_rank // request.multiple_of) * request.multiple_of
    return cost(request, [min(least, spec.k) for spec in request.linears]) <= request.budget


def cost(request: Request, ranks: list[int]) -> int:
    return sum(spec.rank_cost(rank) for spec, rank in zip(request.linears, ranks, strict=True))


requests = st.builds(
    request_of,
    seed=st.integers(0, 1000),
    layers=st.integers(1, 5),
    remove=st.sampled_from([0.0, 0.05, 0.2, 1 / 3, 0.4, 0.6, 0.8]),
    min_rank=st.integers(1, 3),
    multiple_of=st.sampled_from([1, 2, 3]),
    importance=st.sampled_from(["sublayer", "block", "none"]),
    distance=st.sampled_from(["cosine", "angular"]),
    gamma=st.sampled_from([0.0, 0.5, 1.0]),
    local=st.sampled_from(["energy", "sigma", "absolute", "global-only"]),
    per_parameter=st.booleans(),
)


@given(requests, st.sampled_from(unirank.allocators()))
@settings(deadline=None)
def test_the_budget_is_never_exceeded_and_rounding_is_honoured(request: Request, name: str) -> None:
    if not reachable(request):
        with pytest.raises(InputError, match="cannot be reached"):
            allocator(name).allocate(request)
        return
    ranks, _ = allocator(name).allocate(request)
    assert cost(request, ranks) <= request.budget
    for spec, rank in zip(request.linears, ranks, strict=True):
        dense = rank * spec.cost >= spec.params
        assert dense or (rank >= request.min_rank and rank % request.multiple_of == 0)


@given(requests)
@settings(deadline=None)
def test_unirank_leaves_less_than_one_step_of_the_budget(request: Request) -> None:
    assume(reachable(request))
    ranks, _ = allocator("unirank").allocate(request)
    step = max(spec.cost for spec in request.linears) * request.multiple_of
    assert request.budget - cost(request, ranks) < step or all(
        rank * spec.cost >= spec.params for spec, rank in zip(request.linears, ranks, strict=True)
    )


@given(st.integers(0, 1000), st.floats(0.0, 0.9), st.floats(0.0, 0.9))
@settings(deadline=None)
def test_a_larger_budget_never_lowers_a_rank(seed: int, one: float, other: float) -> None:
    more, less = sorted((one, other))
    large, _ = allocator("unirank").allocate(request_of(seed, 3, more))
    small, _ = allocator("unirank").allocate(request_of(seed, 3, less))
    assert all(a >= b for a, b in zip(large, small, strict=True))


@given(requests, st.integers(0, 100))
@settings(deadline=None)
def test_the_order_of_the_linears_does_not_matter_without_ties(request: Request, seed: int) -> None:
    # Ties go by position, by definition; distinct noise removes them.
    noise = torch.Generator().manual_seed(seed)
    energies = {
        spec.name: (request.energies[spec.name] + torch.rand(spec.k, generator=noise, dtype=torch.float64) * 1e-6)
        .sort(descending=True)
        .values
        for spec in request.linears
    }
    shuffled = list(request.linears)
    random.Random(seed).shuffle(shuffled)
    plain = ScoreSettings(importance="sublayer", local="energy")
    first, second = (
        Request(tuple(linears), energies, request.cosines, plain, request.remove, request.budget, 1, 1)
        for linears in (request.linears, shuffled)
    )
    by_name = dict(zip((s.name for s in shuffled), allocator("unirank").allocate(second)[0], strict=True))
    assert by_name == dict(zip((s.name for s in request.linears), allocator("unirank").allocate(first)[0], strict=True))


def test_ties_go_to_the_earlier_linear_and_threads_do_not_matter() -> None:
    specs = tuple(LinearSpec(f"l.{i}", 0, "mlp", "x", 8, 8) for i in range(4))
    energies = {spec.name: torch.ones(8, dtype=torch.float64) for spec in specs}
    cosines = [{key: CosineStat(5.0, 5.0, 10) for key in ("attention", "mlp", "block")}]
    request = Request(specs, energies, cosines, ScoreSettings(), 0.5, 128, 1, 1)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            # 128 parameters: the floor takes 4 x 16; of the 64 left, the first linear needs 48 to be dense (8 x 8).
            assert allocator("unirank").allocate(request)[0] == [8, 2, 1, 1]
    finally:
        torch.set_num_threads(before)


def test_nothing_removed_keeps_everything_dense() -> None:
    request = request_of(0, 3, 0.0)
    for name in unirank.allocators():
        assert allocator(name).allocate(request)[0] == [spec.k for spec in request.linears]


def test_uniform_is_the_floor_of_the_formula() -> None:
    request = request_of(0, 2, 0.4)
    ranks, threshold = allocator("uniform").allocate(request)
    assert ranks == [int(0.6 * m * n / (m + n)) for _ in range(2) for m, n in SHAPES]
    assert threshold is None


def test_an_unreachable_min_rank_says_both_numbers() -> None:
    request = request_of(0, 2, 0.8, min_rank=12)
    for name in unirank.allocators():
        with pytest.raises(InputError, match=rf"min_rank = 12 .* parameters and the budget is {request.budget}"):
            allocator(name).allocate(request)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (ScoreSettings(), 0.25 * 0.8),
        (ScoreSettings(importance="none"), 0.8),
        (ScoreSettings(importance="block"), 0.5 * 0.8),
        (ScoreSettings(gamma=0.5), 0.5 * 0.8),
        (ScoreSettings(importance="none", local="sigma"), 2 / 3),
        (ScoreSettings(importance="none", local="absolute"), 4.0),
        (ScoreSettings(importance="none", local="global-only"), 2.0),
        (ScoreSettings(importance="none", local="absolute", per_parameter=True), 4 / 5),
        (ScoreSettings(importance="block", distance="angular", local="absolute"), 4 / 3),
    ],
)
def test_each_variant_scores_as_written(settings: ScoreSettings, expected: float) -> None:
    spec = LinearSpec("l", 0, "mlp", "x", 2, 3)
    cosines = [{"mlp": CosineStat(7.5, 0, 10), "block": CosineStat(5.0, 0, 10), "attention": CosineStat(0, 0, 10)}]
    components = score([spec], {"l": torch.tensor([4.0, 1.0], dtype=torch.float64)}, cosines, settings)
    assert components.value[0].item() == pytest.approx(expected)


def test_global_only_makes_rank_fractions_proportional_to_importance() -> None:
    specs = [LinearSpec(f"l.{i}", i, "mlp", "x", 400, 400) for i in range(3)]
    energies = {spec.name: torch.rand(400, dtype=torch.float64).sort(descending=True).values for spec in specs}
    cosines = [{key: CosineStat(10 * (1 - i), 0, 10) for key in ("attention", "mlp", "block")} for i in (0.1, 0.2, 0.3)]
    total = sum(spec.params for spec in specs)
    request = Request(
        tuple(specs), energies, cosines, ScoreSettings(local="global-only"), 0.6, budget_of(0.6, total), 1, 1
    )
    ranks, _ = allocator("unirank").allocate(request)
    assert ranks == [40, 80, 120]  # 0.4 * 3 * 400 * 400 / 800 = 240 components, as 1 : 2 : 3


def test_scores_that_rise_inside_a_matrix_get_the_running_maximum_from_the_tail() -> None:
    components = assemble([LinearSpec("l", 0, "mlp", "x", 4, 4)], [torch.tensor([1.0, 3.0, 2.0, 0.5])])
    assert components.value.tolist() == [3.0, 3.0, 2.0, 0.5]


def test_a_cosine_that_rounds_above_one_gives_importance_zero() -> None:
    assert importance_of(CosineStat(10.000000001, 10.0, 10), ScoreSettings()) == 0.0


def test_non_finite_energy_names_the_linear() -> None:
    spec = LinearSpec("layer.7.q", 0, "mlp", "x", 2, 2)
    cosines = [{"mlp": CosineStat(5, 5, 10)}]
    with pytest.raises(NonFiniteError, match=r"layer\.7\.q"):
        score([spec], {"layer.7.q": torch.tensor([float("nan"), 1.0])}, cosines)


@pytest.mark.parametrize(("remove", "total", "expected"), [(0.9, 10, 1), (0.2, 10, 8), (1 / 3, 9, 6), (0.0, 7, 7)])
def test_the_budget_is_exact_in_the_decimal_that_was_written(remove: float, total: int, expected: int) -> None:
    assert budget_of(remove, total) == expected


def test_a_plan_survives_json_and_a_forged_one_is_refused() -> None:
    plan = RankPlan(
        {"a": 3, "b": DENSE}, {"a": (8, 8), "b": (4, 4)}, 0.2, 64, 64, 0.5, "unirank", "whiten", {"x": 1}, "id"
    )
    assert RankPlan.from_json(plan.to_json()) == plan
    for old, new in (
        ('"used": 64', '"used": 60'),
        ('"a": 3', '"a": 0'),
        ('"a": 3', '"a": "3"'),
        ('"format": 1', '"format": 2'),
    ):
        with pytest.raises(InputError):
            RankPlan.from_json(plan.to_json().replace(old, new))
    for text in ("", "[]", "{}", "null", plan.to_json()[:-20]):
        with pytest.raises(InputError, match="rank plan"):
            RankPlan.from_json(text)
