"""Rank plans: exact budgets, and what must not matter to them."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import unirank
from tests.support.components import SHAPES, allocate, cost, make_request, reachable, request_of
from tests.support.tiny import build
from unirank.analysis.store import AnalysisStore
from unirank.errors import InputError, NonFiniteError
from unirank.planning.allocator import allocator
from unirank.planning.allocator.base import Request
from unirank.planning.score import ScoreSettings, assemble, importance_of, score
from unirank.rank_plan import RankPlan, budget_of
from unirank.types import DENSE, FORMS, CosineStat, Form, LinearSpec

RULES = [name for name in unirank.allocators() if not allocator(name).measures]
# A larger budget lowers no rank; the other rules round shares that depend on the budget.
MONOTONE = ["unirank", "curvature", "zs-svd", "uniform", "tolerance", "bi"]

# Equal matrices can have equal targets there; which of them gets the rest goes by position.
TIED = ["typed", "uniform", "bi", "softmax", "d-rank", "svdllm-v2"]


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
    form=st.sampled_from(FORMS),
)


@given(requests, st.sampled_from(RULES))
@settings(deadline=None)
def test_the_budget_is_never_exceeded_and_rounding_is_honoured(request: Request, name: str) -> None:
    if not reachable(request):
        with pytest.raises(InputError, match="cannot be reached"):
            allocate(name, request)
        return
    ranks = allocate(name, request)
    assert cost(request, ranks) <= request.budget
    assert allocate(name, request) == ranks
    for spec, rank in zip(request.linears, ranks, strict=True):
        dense = spec.rank_cost(rank, request.form) == spec.params
        assert dense or (rank >= request.min_rank and rank % request.multiple_of == 0)


@given(requests, st.sampled_from([name for name in RULES if name != "uniform"]))
@settings(deadline=None)
def test_less_than_one_step_of_the_budget_is_left(request: Request, name: str) -> None:
    assume(reachable(request))
    ranks = allocate(name, request)
    step = max(spec.cost for spec in request.linears) * request.multiple_of
    assert request.budget - cost(request, ranks) < step or all(
        spec.rank_cost(rank, request.form) == spec.params for spec, rank in zip(request.linears, ranks, strict=True)
    )


@pytest.mark.parametrize("remove", [0.1, 0.4, 0.7])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("form", FORMS)
def test_at_least_99_percent_of_the_budget_is_used(form: Form, name: str, remove: float) -> None:
    request = request_of(1, 4, remove, scale=24, form=form)
    assert cost(request, allocate(name, request)) >= 0.99 * request.budget


@given(
    st.integers(0, 1000), st.floats(0.0, 0.85), st.floats(0.0, 0.85), st.sampled_from(MONOTONE), st.sampled_from(FORMS)
)
@settings(deadline=None)
def test_a_larger_budget_never_lowers_a_rank(seed: int, one: float, other: float, name: str, form: Form) -> None:
    more, less = sorted((one, other))
    large = allocate(name, request_of(seed, 3, more, form=form))
    small = allocate(name, request_of(seed, 3, less, form=form))
    assert all(a >= b for a, b in zip(large, small, strict=True))


@given(requests, st.integers(0, 100), st.sampled_from(RULES))
@settings(deadline=None)
def test_the_order_of_the_linears_does_not_matter_without_ties(request: Request, seed: int, name: str) -> None:
    assume(reachable(request))
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
    plain = replace(request, energies=energies, settings=ScoreSettings(), min_rank=1, multiple_of=1)
    first, second = (replace(plain, linears=tuple(linears)) for linears in (request.linears, shuffled))
    ranks = [
        {spec.name: min(rank, spec.dense_rank(r.form)) for spec, rank in zip(r.linears, allocate(name, r), strict=True)}
        for r in (first, second)
    ]
    if name in TIED:
        # Matrices of one target may differ by the one step that is left.
        assert all(abs(ranks[0][key] - ranks[1][key]) <= 1 for key in ranks[0])
    else:
        assert ranks[0] == ranks[1]


def test_ties_go_to_the_earlier_linear_and_threads_do_not_matter() -> None:
    specs = tuple(LinearSpec(f"l.{i}", 0, "mlp", "x", 8, 8) for i in range(4))
    energies = {spec.name: torch.ones(8, dtype=torch.float64) for spec in specs}
    cosines = [{key: CosineStat(5.0, 5.0, 10) for key in ("attention", "mlp", "block")}]
    request = make_request(list(specs), energies, cosines, 0.5)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            # 128 parameters: the floor takes 4 x 16; of the 64 left, the first linear needs 48 to be dense (8 x 8).
            assert allocate("unirank", request) == [8, 2, 1, 1]
    finally:
        torch.set_num_threads(before)


def test_nothing_removed_keeps_everything_dense() -> None:
    for multiple_of, form in itertools.product((1, 3), FORMS):
        request = request_of(0, 3, 0.0, multiple_of=multiple_of, form=form)
        for name in RULES:
            assert allocate(name, request) == [spec.k for spec in request.linears], name


def test_uniform_is_the_floor_of_the_formula() -> None:
    request = request_of(0, 2, 0.4)
    ranks, threshold = allocator("uniform").allocate(request)
    assert ranks == [int(0.6 * m * n / (m + n)) for _ in range(2) for m, n in SHAPES.values()]
    assert threshold is None


def test_uniform_in_the_pivoted_form_is_the_largest_rank_that_fits() -> None:
    for remove in (0.05, 0.4, 0.9):
        request = request_of(0, 1, remove, form="pivoted")
        for spec, rank in zip(request.linears, allocator("uniform").allocate(request)[0], strict=True):
            budget = budget_of(remove, spec.params)
            assert rank * (spec.m + spec.n - rank) <= budget < (rank + 1) * (spec.m + spec.n - rank - 1)


def test_the_pivoted_form_keeps_more_ranks_for_the_same_budget() -> None:
    for name in RULES:
        factors, pivoted = (sum(allocate(name, request_of(3, 4, 0.4, scale=4, form=form))) for form in FORMS)
        assert pivoted > factors, name


def test_an_unreachable_min_rank_says_both_numbers() -> None:
    request = request_of(0, 2, 0.8, min_rank=12)
    for name in RULES:
        with pytest.raises(InputError, match=rf"min_rank = 12 .* parameters and the budget is {request.budget}"):
            allocate(name, request)


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
    request = make_request(specs, energies, cosines, 0.6, settings=ScoreSettings(local="global-only"))
    assert allocate("unirank", request) == [40, 80, 120]  # 0.4 * 3 * 400 * 400 / 800 = 240 components, as 1 : 2 : 3


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
        ('"form": "factors"', '"form": "pivots"'),
        ('"form": "factors"', '"form": "pivoted"'),  # 3 of 8 x 8 costs 39 there, not 48
    ):
        with pytest.raises(InputError):
            RankPlan.from_json(plan.to_json().replace(old, new))
    old = {key: value for key, value in json.loads(plan.to_json()).items() if key != "form"}
    assert RankPlan.from_json(json.dumps(old)) == plan  # as versions without forms wrote it
    for text in ("", "[]", "{}", "null", plan.to_json()[:-20]):
        with pytest.raises(InputError, match="rank plan"):
            RankPlan.from_json(text)


# -- on a store -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tokenizer, text_file: Path) -> AnalysisStore:
    """A tiny Llama, analyzed with gradients."""
    calibration = unirank.Calibration(text=str(text_file), windows=4, window=16, batch=2, gradient_windows=2)
    loaded = unirank.describe(build("llama"), tokenizer)
    return unirank.analyze(loaded, tmp_path_factory.mktemp("gradients") / "store", calibration=calibration)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("form", FORMS)
def test_every_rule_plans_on_a_store_with_gradients(form: Form, name: str, store: AnalysisStore) -> None:
    plan = unirank.plan(store, 0.3, allocator=name, form=form)
    assert plan.form == form
    assert 0.9 * plan.budget <= plan.used <= plan.budget
    assert plan.allocator == name
    assert allocator(name).options.items() <= plan.settings.items()
    assert set(unirank.plan(store, 0.0, allocator=name).ranks.values()) == {DENSE}


def test_rules_differ(store: AnalysisStore) -> None:
    rules = [name for name in RULES if name != "tied"]  # which differs from `unirank` by experts alone
    plans = {tuple(unirank.plan(store, 0.3, allocator=name).ranks.values()) for name in rules}
    assert len(plans) == len(rules)


def test_without_gradients_a_rule_that_needs_them_says_so(make_model, calibration, tmp_path: Path) -> None:
    store = unirank.analyze(make_model(), tmp_path / "store", calibration=calibration)
    for name in RULES:
        if allocator(name).gradients:
            with pytest.raises(InputError, match=f"{name} needs gradients"):
                unirank.plan(store, 0.3, allocator=name)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("typed", {"ration": 3.0}, "typed has no option 'ration'; it takes ratio"),
        ("bi", {"ratio": 3.0}, "bi has no option 'ratio'; it takes none"),
        ("typed", {"ratio": -1.0}, "it must be at least 0"),
        ("typed", {"ratio": math.nan}, "finite"),
        ("softmax", {"temperature": 0.0}, "temperature = 0.0 of softmax is not legal"),
        ("d-rank", {"beta": 1.5}, "at least 0 and at most 1"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(name: str, options: dict[str, float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        unirank.compress("no-such-model", 0.2, allocator=name, options=options)


def test_rules_by_projection_refuse_fused_projections_before_the_analysis(make_model, monkeypatch) -> None:
    monkeypatch.setattr("unirank.api.analyze", lambda *_, **__: pytest.fail("analyzed"))
    for name, words in (("typed", "h.0.attn.c_attn is none of them"), ("d-rank", "layer 0 has no k and no q and no v")):
        with pytest.raises(InputError, match=words):
            unirank.compress(make_model("gpt2"), 0.2, allocator=name)
