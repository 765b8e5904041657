"""The search of `lems`: what counts, curves inside of a plan, the depth factor, and swaps."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import unirank
from tests.support.allocating import Found, request_of
from tests.support.curves import curve_of
from tests.support.tiny import build
from unirank.analysis.store import AnalysisStore
from unirank.errors import InputError
from unirank.planning.allocator import allocator as allocator_of
from unirank.planning.allocator import curves, depth, divergence, held_out, lems, probing, swaps
from unirank.planning.allocator.base import Workbench
from unirank.planning.allocator.divergence import Counted, Window, token_divergences
from unirank.planning.allocator.measure import divergences, low_rank_of, replaced, truncated_modules
from unirank.types import DENSE, FORMS

ALL_PARTS = {
    "windows": 2,
    "tokens": 10,
    "first": 6,
    "temperature": 0.6,
    "rounds": 2,
    "round_windows": 2,
    "depth": 4,
    "swaps": 22,
    "held_out": 2,
}


@pytest.fixture(scope="module")
def analyzed(tokenizer, text_file: Path, tmp_path_factory: pytest.TempPathFactory):
    """`analyzed("llama") -> (store, workbench)` of a tiny model, made once; tests leave both as they are."""
    made: dict[str, tuple[AnalysisStore, Workbench]] = {}
    calibration = unirank.Calibration(text=str(text_file), windows=6, window=24, seed=0, batch=2)

    def make(name: str) -> tuple[AnalysisStore, Workbench]:
        if name not in made:
            loaded = unirank.describe(build(name), tokenizer, source=f"tiny-{name}")
            store = unirank.analyze(loaded, tmp_path_factory.mktemp("stores") / name, calibration=calibration)
            made[name] = store, unirank.make_workbench(loaded, store, text=str(text_file))
        return made[name]

    return make


@pytest.fixture
def bench(analyzed, tmp_path: Path):
    """`bench("llama") -> (store, workbench)`; the store is a copy of the test's own."""

    def make(name: str = "llama") -> tuple[AnalysisStore, Workbench]:
        store, workbench = analyzed(name)
        path = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        return unirank.open_store(shutil.copytree(store.path, path)), workbench

    return make


def of_whole(loaded, modules, windows, counted: Counted = divergence.ALL) -> torch.Tensor:
    """By token, from logits of the whole model in float64: `[W, T - first]`."""
    with torch.no_grad():
        dense = loaded.model(input_ids=windows).logits[:, counted.first :].double()
        with replaced(loaded.model, modules):
            other = loaded.model(input_ids=windows).logits[:, counted.first :].double()
    log_p, log_q = ((logits / counted.temperature).log_softmax(-1) for logits in (dense, other))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_with_all_its_parts_it_keeps_the_budget_and_the_model(bench, name: str, form) -> None:
    store, workbench = bench(name)
    found, random = Found(workbench.loaded), torch.get_rng_state()
    for remove, min_rank, multiple_of in ((0.3, 2, 1), (0.5, 1, 2))[:: 1 if name == "llama" else 2]:
        plan = unirank.plan(
            store,
            remove,
            allocator="lems",
            options=ALL_PARTS,
            min_rank=min_rank,
            multiple_of=multiple_of,
            form=form,
            workbench=workbench,
        )
        assert plan.used <= plan.budget
        assert plan.used == sum(spec.rank_cost(plan.ranks[spec.name], form) for spec in store.linears)
        low = [rank for rank in plan.ranks.values() if rank != DENSE]
        assert low
        assert all(rank >= min_rank and rank % multiple_of == 0 for rank in low)
        assert len(plan.settings["depth_tried"]) == 4
        assert unirank.RankPlan.from_json(plan.to_json()) == plan
    assert found.unchanged()
    assert torch.equal(torch.get_rng_state(), random)


def test_one_seed_gives_one_plan_for_any_number_of_threads(bench) -> None:
    plans, before = [], torch.get_num_threads()
    options = ALL_PARTS | {"windows": 1, "rounds": 1, "swaps": 10}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            store, workbench = bench()
            plans.append(unirank.plan(store, 0.4, allocator="lems", options=options, workbench=workbench))
        finally:
            torch.set_num_threads(before)
    assert plans[0] == plans[1]


def test_a_second_plan_runs_nothing_and_a_killed_one_goes_on(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    store, workbench = bench()
    made: Counter[str] = Counter()
    stage = "none"
    original = Window.__init__

    def counting(self: Window, *args: Any, **kwargs: Any) -> None:
        made[stage] += 1
        original(self, *args, **kwargs)

    def watch(now: str, done: int, total: int) -> None:
        nonlocal stage
        stage = now
        if now == stop[0] and total and done >= stop[1]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Window, "__init__", counting)
    watched = dataclasses.replace(workbench, progress=watch)
    count = len(store.linears)
    stop = ("never", 0)
    # In the second window, in the second part of the first round, in the second file of swaps.
    kills = ("measure each linear", count + 3), ("measure in plan 1, above", count + 3), ("swap ranks", 21)
    for kill in kills:
        stop = kill
        with pytest.raises(KeyboardInterrupt):
            unirank.plan(store, 0.4, allocator="lems", options=ALL_PARTS, workbench=watched)
    windows = made.copy()
    assert windows["measure each linear"] == 3  # two, and the second again
    stop = ("never", 0)
    plan = unirank.plan(store, 0.4, allocator="lems", options=ALL_PARTS, workbench=watched)
    assert made["measure each linear"] == windows["measure each linear"]
    assert made["measure in plan 1, above"] == windows["measure in plan 1, above"]
    made.clear()
    stage = "second plan"
    assert unirank.plan(store, 0.4, allocator="lems", options=ALL_PARTS, workbench=watched) == plan
    assert not made
    fresh, other = bench()
    assert unirank.plan(fresh, 0.4, allocator="lems", options=ALL_PARTS, workbench=other) == plan


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("size", [0.01, 1.0, 300.0])
def test_divergences_of_tokens_are_those_of_float64(temperature: float, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    dense = 5 * torch.randn(7, 300, generator=generator)
    other = dense + 40 + size * torch.randn(7, 300, generator=generator)
    log_p = (dense / temperature).log_softmax(-1)
    exact = (dense.double() / temperature).log_softmax(-1)
    expected = (exact.exp() * (exact - (other.double() / temperature).log_softmax(-1))).sum(-1)
    assert torch.allclose(token_divergences(log_p, other, temperature), expected, rtol=1e-3)
    assert float(token_divergences(log_p, dense + 7, temperature).max()) < 1e-6
    other[3, 5] = math.nan
    assert token_divergences(log_p, other).isfinite().tolist() == [True] * 3 + [False] + [True] * 3


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "gemma3"])
def test_only_counted_positions_count_and_only_they_reach_the_head(bench, name: str) -> None:
    _, workbench = bench(name)
    loaded, ids = workbench.loaded, workbench.windows[0]
    shapes: list[tuple[int, ...]] = []
    head = loaded.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _module, inputs, _output: shapes.append(tuple(inputs[0].shape[:-1])))
    counted = Counted(0.6, 17)
    specs = loaded.linears[::3]

    def compressed(spec):
        return low_rank(spec) if spec in specs else None

    def low_rank(spec):
        torch.manual_seed(spec.layer)
        module = torch.nn.Linear(spec.n, spec.m)
        return module.requires_grad_(False)

    found = divergences(loaded, ids, compressed, lambda _: None, counted=counted)
    handle.remove()
    assert {math.prod(shape) for shape in shapes} == {len(ids) - 17}
    assert list(found) == [spec.name for spec in specs]
    for spec in specs:
        expected = of_whole(loaded, {spec.name: low_rank(spec)}, ids[None], counted)[0]
        assert torch.allclose(found[spec.name], expected, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt-neox"])
def test_linears_that_run_together_give_what_they_give_alone(bench, name: str, monkeypatch) -> None:
    store, workbench = bench(name)

    def compressed(spec):
        return low_rank_of(store, spec, workbench.loaded.model.get_submodule(spec.name), 2)

    together = divergences(workbench.loaded, workbench.windows[0], compressed, lambda _: None)
    monkeypatch.setattr(divergence, "_STREAM_BYTES", 1)
    alone = divergences(workbench.loaded, workbench.windows[0], compressed, lambda _: None)
    assert together.keys() == alone.keys()
    for key, value in alone.items():
        assert torch.allclose(together[key], value, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_inside_of_a_plan_the_rest_of_the_model_is_compressed(bench, form) -> None:
    store, workbench = bench()
    request = dataclasses.replace(request_of(store, workbench, lems.ALLOCATOR, 0.4, **ALL_PARTS), form=form)
    probe = probing.probe_of(request)
    base = [max(1, spec.dense_rank(form) // 2) for spec in store.linears]
    base[2] = store.linears[2].k
    points = {spec.name: 3 for spec in store.linears[::2]} | {store.linears[1].name: store.linears[1].k}
    found = probing.probed(request, probe, "stage", points, base)
    assert found.keys() == points.keys()
    loaded = workbench.loaded
    modules = truncated_modules(request, base)
    without = of_whole(loaded, modules, probe.windows, probe.counted).mean()
    for spec in store.linears:
        if spec.name in points:
            dense = loaded.model.get_submodule(spec.name)
            low = dense if points[spec.name] == spec.k else low_rank_of(store, spec, dense, 3)
            changed = of_whole(loaded, modules | {spec.name: low}, probe.windows, probe.counted).mean()
            assert found[spec.name] == pytest.approx(float(changed - without), rel=1e-2, abs=1e-5)


def test_windows_end_where_the_error_is_small_enough(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    store, workbench = bench()
    steady, noisy = store.linears[0], store.linears[1]
    generator = torch.Generator().manual_seed(0)
    asked: list[list[str]] = []

    def fake(loaded, ids, compressed, measured, **_: object) -> dict[str, torch.Tensor]:
        names = [spec.name for spec in (steady, noisy) if compressed(spec) is not None]
        asked.append(names)
        values = 5 + torch.randn(len(ids), generator=generator, dtype=torch.float64)
        found = {steady.name: torch.full_like(values, len(asked)), noisy.name: values.exp()}
        return {name: found[name] for name in names}

    monkeypatch.setattr(probing, "divergences", fake)
    points = {steady.name: 2, noisy.name: 2}
    for precision, windows, runs in ((0.01, 1, 6), (0.0, 5, 5)):  # the second time, the first window is kept
        asked.clear()
        request = request_of(store, workbench, lems.ALLOCATOR, 0.4, windows=6, tokens=24, precision=precision)
        found = probing.probed(request, probing.probe_of(request), f"stage {precision}", points)
        assert [steady.name in names for names in asked] == [True] * windows + [False] * (runs - windows)
        assert all(noisy.name in names for names in asked)
        assert len(asked) == runs
        assert found[steady.name] == (1.0 if precision else pytest.approx((1 + 1 + 2 + 3 + 4 + 5) / 6))


def test_of_the_powers_of_the_scales_the_best_on_held_out_windows_is_taken(bench) -> None:
    store, workbench = bench()
    options = ALL_PARTS | {"depth": 0, "swaps": 0, "rounds": 1}
    plan = unirank.plan(store, 0.5, allocator="lems", options=options, workbench=workbench)
    before = unirank.plan(store, 0.5, allocator="lems", options=options | {"rounds": 0}, workbench=workbench)
    found = plan.settings["inside_1"]
    assert found["power"] == (0.0, 0.25, 0.5, 1.0)[found["tried"].index(min(found["tried"]))]
    assert set(found["below"]) <= {spec.name for spec in store.linears}
    request = request_of(store, workbench, lems.ALLOCATOR, 0.5, **options)
    held = held_out.HeldOut(request, held_out.held_out_of(request, probing.probe_of(request)))

    def divergence_of(made: unirank.RankPlan) -> float:
        return held.divergence([spec.k if (r := made.ranks[spec.name]) == DENSE else int(r) for spec in store.linears])

    assert divergence_of(plan) == min(found["tried"])
    assert divergence_of(before) == found["tried"][0]


def test_the_depth_factor_is_the_formula_and_the_best_candidate_is_taken(bench) -> None:
    factors = depth.depth_factors(4, 1.0, 2.0)
    sums = [1 + 1 / 2 + 1 / 3 + 1 / 4, 1 / 2 + 1 / 3 + 1 / 4, 1 / 3 + 1 / 4, 1 / 4]
    assert factors == pytest.approx([1 + 2 * value / sums[0] for value in sums])
    assert depth.depth_factors(3, 2.0, 0.0) == [1.0, 1.0, 1.0]
    store, workbench = bench()
    request = request_of(store, workbench, lems.ALLOCATOR, 0.5)
    equal = [curve_of(2.0) for _ in store.linears]
    request = dataclasses.replace(request, budget=200 * len(equal))

    class Early(held_out.HeldOut):  # the more the first block keeps, the better
        def divergence(self, ranks) -> float:
            kept = [rank for rank, spec in zip(ranks, store.linears, strict=True) if spec.layer == 0]
            return 1000.0 - sum(kept)

    held = Early(request, probing.probe_of(request))
    _, none = depth.with_depth(request, equal, held, 1)
    assert (none["alpha"], none["gamma"]) == (0, 0)
    chosen, found = depth.with_depth(request, equal, held, 12)
    values = [entry[0] for entry in found["depth_tried"]]
    assert len(values) == 12
    assert min(values) < values[0]
    assert all(0 <= alpha <= 3 and 0 <= gamma <= 7 for _, alpha, gamma in found["depth_tried"])
    assert [found["alpha"], found["gamma"]] == found["depth_tried"][values.index(min(values))][1:]
    assert held.divergence(curves.solved(request, chosen)) == min(values)


@pytest.mark.parametrize("form", FORMS)
def test_swaps_lower_the_held_out_divergence_by_what_they_say(bench, form) -> None:
    store, workbench = bench()
    request = request_of(store, workbench, lems.ALLOCATOR, 0.5, windows=2, tokens=20, held_out=3)
    request = dataclasses.replace(request, form=form)
    probe = probing.probe_of(request)
    windows = held_out.held_out_of(request, probe)
    assert torch.equal(windows.windows, workbench.windows[2:5, :20])
    held = held_out.HeldOut(request, windows)
    points = {spec.name: 1 for spec in store.linears}
    table = curves.curves_through(request, points, probing.probed(request, probe, "stage", points))
    start = allocator_of("uniform").allocate(request)[0]
    measured = [held.divergence(start)]
    for tried in (20, 50):
        ranks, found = swaps.swapped(request, table, start, held, tried, seed=0)
        costs = [spec.rank_cost(rank, form) for spec, rank in zip(store.linears, ranks, strict=True)]
        assert sum(costs) <= request.budget
        assert found["swaps_kept"] > 0
        measured.append(float(of_whole(workbench.loaded, truncated_modules(request, ranks), windows.windows).mean()))
        assert found["held_out_divergence"] == pytest.approx(measured[-1], rel=1e-3)
    assert measured[2] <= measured[1] < 0.95 * measured[0]
    other = swaps.swapped(request, table, start, held, 20, seed=1)
    assert other[1] != swaps.swapped(request, table, start, held, 20, seed=0)[1]


def test_a_walk_that_goes_back_leaves_what_it_found(bench) -> None:
    store, workbench = bench()
    request = request_of(store, workbench, lems.ALLOCATOR, 0.4, held_out=2, tokens=20)
    held = held_out.HeldOut(request, held_out.held_out_of(request, probing.probe_of(request)))
    model = workbench.loaded.model
    ranks = [3 for _ in store.linears]
    dense = {spec.name: model.get_submodule(spec.name) for spec in store.linears}
    first, middle = store.linears[0], store.linears[8]
    better = [20, *ranks[1:8], middle.k, *ranks[9:]]
    before, after = held.divergence(ranks), held.divergence(better)
    assert after < before
    with replaced(model, dense):
        walk = held_out.Walk(request, held, ranks)
        assert walk.divergence == pytest.approx(before)
        change, error, kept = walk.try_ranks({first: 1, middle: 1})
        assert (change > 0, error > 0, kept) == (True, True, False)
        assert walk.divergence == pytest.approx(before)
        changes = [walk.try_ranks({middle: middle.k}), walk.try_ranks({first: 20})]
        assert all(kept and change < 0 for change, _, kept in changes)
        assert walk.divergence == pytest.approx(after)
        assert sum(change for change, _, _ in changes) == pytest.approx(after - before)
    assert all(model.get_submodule(name) is module for name, module in dense.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature = 0.0 is not legal"),
        ({"precision": -1.0}, "precision = -1.0 is not legal"),
        ({"first": 24}, "calibration windows have 24 tokens"),
        ({"first": 1.5}, "first = 1.5 is not legal"),
        ({"rounds": -1}, "rounds = -1 is not legal"),
        ({"depth": 3, "held_out": 5}, "need 5 calibration windows"),
        ({"rounds": 1, "held_out": 5}, "need 5 calibration windows"),
        ({"swaps": 3, "held_out": 0}, "held_out = 0 is not legal"),
    ],
)
def test_an_option_that_is_not_legal_is_refused_before_anything_runs(bench, options, message, monkeypatch) -> None:
    store, workbench = bench()
    monkeypatch.setattr(Window, "__init__", None)
    with pytest.raises(InputError, match=message):
        unirank.plan(store, 0.4, allocator="lems", options=options, workbench=workbench)
