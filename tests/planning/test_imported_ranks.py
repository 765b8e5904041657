"""Ranks from elsewhere: taken exactly, or refused with what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import unirank
from unirank import RankPlan, import_plan
from unirank.analysis.store import AnalysisStore
from unirank.errors import InputError
from unirank.types import DENSE


@pytest.fixture
def store(make_model, calibration, tmp_path: Path) -> AnalysisStore:
    return unirank.analyze(make_model(), tmp_path / "store", calibration=calibration)


@pytest.fixture
def plan(store: AnalysisStore) -> RankPlan:
    return unirank.plan(store, 0.3)


def test_a_plan_of_the_same_store_is_taken_as_it_is(store: AnalysisStore, plan: RankPlan) -> None:
    assert import_plan(store, plan.to_json()) == plan


def test_of_a_plan_of_another_store_only_the_ranks_are_taken(
    store: AnalysisStore, make_model, calibration, tmp_path: Path
) -> None:
    other = unirank.analyze(make_model(), tmp_path / "svd", scheme="svd", calibration=calibration)
    plan = unirank.plan(other, 0.3, allocator="uniform")
    taken = import_plan(store, plan.to_json())
    assert taken.ranks == plan.ranks
    assert (taken.budget, taken.used, taken.allocator, taken.scheme) == (plan.used, plan.used, "imported", "whiten")
    assert taken.remove == 1 - plan.used / plan.total
    assert taken.settings == {"from_allocator": "uniform", "from_scheme": "svd", "from_analysis": other.digest}
    loaded = make_model()
    assert unirank.apply(loaded, store, taken).report.targets_after == plan.used
    assert RankPlan.from_json(taken.to_json()) == taken


def test_bare_ranks_are_the_same_in_both_forms_and_dense_where_that_is_cheaper(
    store: AnalysisStore, plan: RankPlan
) -> None:
    for ranks in (dict(plan.ranks), {"ranks": dict(plan.ranks)}):
        taken = import_plan(store, json.dumps(ranks))
        assert taken.ranks == plan.ranks
        assert taken.used == taken.budget == plan.used
    whole = import_plan(store, json.dumps({spec.name: spec.k for spec in store.linears}))
    assert set(whole.ranks.values()) == {DENSE}
    assert whole.remove == 0


def test_a_plan_of_this_store_with_a_rank_beyond_break_even_is_made_canonical(
    store: AnalysisStore, plan: RankPlan
) -> None:
    spec = store.linears[0]
    edited = json.loads(plan.to_json())
    edited["used"] += spec.params - plan.rank_cost(spec.name)
    edited["budget"] = edited["used"]
    edited["ranks"][spec.name] = spec.k
    taken = import_plan(store, json.dumps(edited))
    assert taken.ranks[spec.name] == DENSE
    assert taken.allocator == "imported"


def test_what_is_wrong_is_one_sentence(store: AnalysisStore, plan: RankPlan) -> None:
    name, last = store.linears[0].name, store.linears[-1].name
    good = dict(plan.ranks)
    cases = [
        ("{", "not JSON"),
        ("[]", "JSON object of linear names and ranks"),
        ('{"ranks": 3}', "unknown linear 'ranks'"),
        (json.dumps({**good, "model.head": 3}), "unknown linear 'model.head'; .*such as 'model.layers.0"),
        (json.dumps({key: rank for key, rank in good.items() if key != last}), f"missing linear '{last}'"),
        (json.dumps({name: 1}), f"and {len(good) - 2} more"),
        (plan.to_json().replace(f'"used": {plan.used}', '"used": 1'), "not sound"),
        (plan.to_json().replace('"format": 1', '"format": 7'), "not a unirank rank plan"),
    ]
    cases += [
        (json.dumps({**good, name: rank}), rf"The rank {rank!r} of {name} is not legal; legal are 1 to 32 and 'dense'")
        for rank in (0, -1, 33, 2.0, True, "8", None, [3])
    ]
    for text, words in cases:
        with pytest.raises(InputError, match=words.replace("[3]", r"\[3\]")) as error:
            import_plan(store, text)
        assert str(error.value).count("\n") == 0
