"""What ranks are multiples of where nobody says so: 16 with most presets, less where the budget has no room for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import unirank
from tests.support.components import SHAPES, allocate, cost, request_of
from tests.support.tiny import build
from unirank.analysis.store import AnalysisStore
from unirank.errors import InputError
from unirank.planning.allocator import allocator
from unirank.planning.ranks import fitting_multiple
from unirank.rank_plan import budget_of
from unirank.types import DENSE, FORMS, Form, LinearSpec

RULES = [name for name in unirank.allocators() if not allocator(name).measures]
SMOLLM2 = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)}
SMOLLM2 |= {"gate": (1536, 576), "up": (1536, 576), "down": (576, 1536)}


def layers_of(shapes: dict[str, tuple[int, int]], count: int = 1) -> list[LinearSpec]:
    return [LinearSpec(f"{i}.{key}", i, "mlp", key, *shape) for i in range(count) for key, shape in shapes.items()]


@pytest.mark.parametrize(
    ("remove", "expected"), [(0.0, 16), (0.2, 16), (0.4, 16), (0.8, 16), (0.9, 8), (0.95, 4), (0.99, 1)]
)
def test_a_real_model_has_multiples_of_16_until_the_budget_has_no_room(remove: float, expected: int) -> None:
    assert fitting_multiple(layers_of(SMOLLM2, 30), remove, 16) == expected


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=6),
    st.floats(0.0, 0.99),
    st.integers(1, 40),
    st.integers(1, 20),
    st.sampled_from(FORMS),
)
@settings(deadline=None)
def test_it_is_the_largest_half_that_leaves_room(
    shapes: list[tuple[int, int]], remove: float, wanted: int, min_rank: int, form: Form
) -> None:
    linears = layers_of({str(i): shape for i, shape in enumerate(shapes)})
    budget = budget_of(remove, sum(m * n for m, n in shapes))

    def cost_at(rank: int) -> int:
        return sum(spec.rank_cost(min(rank, spec.k), form) for spec in linears)

    halves = [wanted >> i for i in range(wanted.bit_length())]
    fits = [m for m in halves if 4 * cost_at(m) <= budget and cost_at(-(-min_rank // m) * m) <= budget]
    found = fitting_multiple(linears, remove, wanted, min_rank=min_rank, form=form)
    assert found == (fits[0] if fits else 1)


def test_without_linears_nothing_is_known_and_nothing_is_lowered() -> None:
    assert fitting_multiple([], 0.4, 16) == 16


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", RULES)
def test_every_rule_keeps_the_floor_of_one_multiple_and_the_budget_within_a_step(name: str, form: Form) -> None:
    request = request_of(1, 4, 0.4, scale=12, multiple_of=16, form=form)
    ranks = allocate(name, request)
    low = [
        (spec, rank) for spec, rank in zip(request.linears, ranks, strict=True) if rank < spec.dense_rank(request.form)
    ]
    assert low
    assert all(rank >= 16 and rank % 16 == 0 for _, rank in low)
    # In the pivoted form M - R rows are stored beside R.
    assert all((spec.m - rank) % 16 == 0 for spec, rank in low if spec.m % 16 == 0)
    # `uniform` rounds every matrix down by itself, the others leave less than one step.
    steps = [16 * spec.cost for spec in request.linears]
    assert 0 <= request.budget - cost(request, ranks) < (sum(steps) if name == "uniform" else max(steps))


def test_a_matrix_of_fewer_components_than_the_multiple_stays_dense() -> None:
    shapes = {key: (m * 12, n * 12) for key, (m, n) in SHAPES.items()} | {"router": (8, 384)}
    linears = layers_of(shapes)
    assert fitting_multiple(linears, 0.4, 16) == 16
    request = request_of(0, 1, 0.4, scale=12)
    energies = dict(zip([spec.name for spec in linears], request.energies.values(), strict=False))
    energies[linears[-1].name] = energies[linears[0].name][:8]
    made = {"linears": tuple(linears), "energies": energies, "multiple_of": 16}
    made["budget"] = budget_of(0.4, sum(spec.params for spec in linears))
    assert allocate("unirank", type(request)(**{**vars(request), **made}))[-1] == 8


# -- on a store -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tokenizer, text_file: Path) -> AnalysisStore:
    """Two layers of a Llama that is wide enough for ranks of 16."""
    calibration = unirank.Calibration(text=str(text_file), windows=16, window=32, batch=2)
    return unirank.analyze(
        wide(tokenizer), tmp_path_factory.mktemp("wide") / "store", scheme="afm", calibration=calibration
    )


def wide(tokenizer) -> unirank.LoadedModel:
    model = build("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_key_value_heads=4)
    return unirank.describe(model, tokenizer)


@pytest.mark.parametrize("form", FORMS)
def test_a_preset_plans_in_multiples_of_16_unless_it_is_told_otherwise(
    form: Form, store: AnalysisStore, tokenizer, text_file: Path
) -> None:
    workbench = unirank.make_workbench(wide(tokenizer), store, text=str(text_file))

    def plan(**asked) -> unirank.RankPlan:
        return unirank.plan(store, 0.4, preset="fast", form=form, workbench=workbench, **asked)

    default, paper = plan(), plan(multiple_of=1)
    low = [rank for rank in default.ranks.values() if rank != DENSE]
    assert low
    assert all(rank % 16 == 0 for rank in low)
    assert default.settings["multiple_of"] == 16
    assert default == plan(multiple_of=16)
    assert default.budget - default.used < 16 * max(spec.cost for spec in store.linears)
    assert paper.settings["multiple_of"] == 1
    assert any(rank % 16 for rank in paper.ranks.values() if rank != DENSE)
    assert unirank.plan(store, 0.4).settings["multiple_of"] == 1  # the paper
    assert plan(min_rank=17).settings["multiple_of"] == 16
    assert all(rank >= 32 for rank in plan(min_rank=17).ranks.values() if rank != DENSE)


def test_less_room_means_a_smaller_multiple_and_what_was_asked_for_is_never_lowered(
    store: AnalysisStore, tokenizer, text_file: Path
) -> None:
    workbench = unirank.make_workbench(wide(tokenizer), store, text=str(text_file))
    made = unirank.plan(store, 0.9, preset="fast", workbench=workbench)
    assert made.settings["multiple_of"] == fitting_multiple(store.linears, 0.9, 16, form="pivoted") == 2
    assert all(rank % 2 == 0 for rank in made.ranks.values() if rank != DENSE)
    with pytest.raises(InputError, match="multiple_of = 32 already needs"):
        unirank.plan(store, 0.9, preset="fast", workbench=workbench, multiple_of=32)


def test_a_compression_by_a_preset_has_them_too(store: AnalysisStore, tokenizer, text_file: Path) -> None:
    asked = {"preset": "fast", "store": store.path, "calibration": str(text_file)}
    made = unirank.compress(wide(tokenizer), 0.4, **asked)
    assert made.plan.settings["multiple_of"] == 16
    assert all(rank % 16 == 0 for rank in made.plan.ranks.values() if rank != DENSE)
    paper = unirank.compress(wide(tokenizer), 0.4, multiple_of=1, **asked)
    assert paper.plan.settings["multiple_of"] == 1


@pytest.mark.smollm2
def test_smollm2_has_room_for_16_at_every_ratio_of_the_docs(smollm2: str) -> None:
    linears = unirank.load(smollm2, stream=True).linears
    assert len(linears) == 210
    for remove in (0.05, 0.1, 0.2, 0.4, 0.6, 0.8):
        assert {fitting_multiple(linears, remove, 16, form=form) for form in FORMS} == {16}
