"""Allocators that run the model: the model comes back as it was, and what they measure is so."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest
import torch

import unirank
from tests.support.allocating import Found, request_of
from tests.support.command_line import Run
from unirank.errors import InputError, NonFiniteError, StoreError
from unirank.evaluation.perplexity import total_nll
from unirank.planning.allocator import curves, lems, swift
from unirank.planning.allocator.knapsack import knapsack, lower_hull
from unirank.planning.allocator.measure import divergences, low_rank_of, replaced, truncated
from unirank.rank_plan import budget_of
from unirank.types import DENSE, LinearSpec

MEASURED = ("swift", "lems", "ara")
SHORT = {"swift": {"windows": 1}, "lems": {"windows": 1, "tokens": 12}, "ara": {"steps": 3, "tokens": 12}}


@pytest.mark.parametrize("allocator", MEASURED)
@pytest.mark.parametrize(
    ("name", "scheme"), [("llama", "whiten"), ("llama-bias", "afm"), ("gpt2", "afm"), ("gemma3", "svd")]
)
def test_the_model_comes_back_and_the_budget_holds(bench, allocator: str, name: str, scheme: str) -> None:
    store, workbench = bench(name, scheme)
    model = workbench.loaded.model
    model.train()
    next(model.parameters()).requires_grad_(False)
    found, random = Found(workbench.loaded), torch.get_rng_state()
    for remove, multiple_of in ((0.0, 1), (0.3, 1), (0.6, 2)):
        plan = unirank.plan(
            store,
            remove,
            allocator=allocator,
            multiple_of=multiple_of,
            options=SHORT[allocator],
            workbench=workbench,
        )
        assert plan.used <= plan.budget
        assert plan.budget - plan.used < multiple_of * max(spec.cost for spec in store.linears)
        assert all(rank == DENSE or rank % multiple_of == 0 for rank in plan.ranks.values())
        assert remove > 0 or set(plan.ranks.values()) == {DENSE}
        assert unirank.RankPlan.from_json(plan.to_json()) == plan
    assert found.unchanged()
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("allocator", MEASURED)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_model_comes_back_after_an_error_and_ctrl_c(bench, allocator: str, error: type[BaseException]) -> None:
    store, workbench = bench()
    found = Found(workbench.loaded)
    calls = itertools.count()

    def interrupt(*_: object) -> None:
        if next(calls) == 40:  # in the middle: some linears are measured, some windows done
            raise error

    # The last norm runs in every forward, behind the replaced linears.
    handle = workbench.loaded.model.get_submodule("model.norm").register_forward_hook(interrupt)
    options = {"swift": {"windows": 6}, "lems": {"windows": 2}, "ara": {"steps": 50}}[allocator]
    with pytest.raises(error):
        unirank.plan(store, 0.3, allocator=allocator, options=options, workbench=workbench)
    handle.remove()
    assert found.unchanged()


@pytest.mark.parametrize("allocator", MEASURED)
def test_one_seed_gives_one_plan(bench, allocator: str) -> None:
    store, workbench = bench()

    def plan(**options: float) -> unirank.RankPlan:
        return unirank.plan(store, 0.4, allocator=allocator, options=SHORT[allocator] | options, workbench=workbench)

    assert plan() == plan()
    if allocator == "ara":
        assert plan().settings["history"] != plan(seed=1).settings["history"]


@pytest.mark.parametrize(("name", "scheme"), [("llama", "whiten"), ("llama-bias", "afm"), ("gpt2", "afm")])
def test_a_model_truncated_for_measuring_is_the_truncated_model(bench, name: str, scheme: str) -> None:
    store, workbench = bench(name, scheme)
    plan = unirank.plan(store, 0.4)
    ranks = [spec.k if plan.ranks[spec.name] == DENSE else plan.ranks[spec.name] for spec in store.linears]
    model = workbench.loaded.model
    with truncated(request_of(store, workbench, swift.ALLOCATOR, 0.4), ranks):
        lent_to = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        loss = total_nll(model, workbench.windows)
    unirank.truncate(workbench.loaded, store, plan)
    assert lent_to.keys() == model.state_dict().keys()
    assert all(torch.equal(lent_to[key], tensor) for key, tensor in model.state_dict().items())
    assert total_nll(model, workbench.windows) == loss


def test_swift_takes_the_best_of_its_eleven_candidates(bench) -> None:
    store, workbench = bench()
    plan = unirank.plan(store, 0.5, allocator="swift", options={"windows": 3}, workbench=workbench)
    losses = plan.settings["nll"]
    assert list(losses) == [f"{step / 10}" for step in range(11)]
    assert len(set(losses.values())) > 1
    assert losses[str(plan.settings["a"])] == min(losses.values())
    windows = workbench.windows[:3]
    unirank.truncate(workbench.loaded, store, plan)
    measured = total_nll(workbench.loaded.model, windows) / (windows.numel() - len(windows))
    assert measured == pytest.approx(losses[str(plan.settings["a"])])


def test_swift_shares_by_importance_tail_and_size_and_caps_at_dense(bench) -> None:
    store, workbench = bench()
    request = request_of(store, workbench, swift.ALLOCATOR, 0.4)
    halves = [budget_of(0.4, spec.params) / spec.cost / 2 for spec in request.linears]
    pool = request.budget - sum(half * spec.cost for half, spec in zip(halves, request.linears, strict=True))
    for power in (0.0, 0.3, 1.0):
        wanted = swift.wanted_ranks(request, power).tolist()
        spent = [(rank - half) * spec.cost for rank, half, spec in zip(wanted, halves, request.linears, strict=True)]
        assert sum(spent) == pytest.approx(pool)
        weights = [
            (1 - request.cosines[spec.layer]["block"].mean) ** power
            * math.log(math.e + float(request.energies[spec.name][int(half) :].sum())) ** (1 - power)
            for half, spec in zip(halves, request.linears, strict=True)
        ]
        whole = [
            rank * spec.cost >= spec.params * (1 - 1e-9) for rank, spec in zip(wanted, request.linears, strict=True)
        ]
        units = {
            round(share / weight / spec.params, 9)
            for share, weight, spec, dense in zip(spent, weights, request.linears, whole, strict=True)
            if not dense
        }
        assert len(units) == 1
    assert swift._share(10.0, [6.0, 3.0, 1.0], [3.0, 100.0, 100.0]) == pytest.approx([3.0, 5.25, 1.75])
    assert swift._share(10.0, [1.0, 1.0], [3.0, 3.0]) == pytest.approx([3.0, 3.0])


@pytest.mark.parametrize(("name", "scheme"), [("llama", "whiten"), ("gemma3", "svd"), ("gpt-neox", "whiten")])
def test_the_divergence_of_a_linear_is_that_of_the_whole_model(bench, name: str, scheme: str) -> None:
    store, workbench = bench(name, scheme)
    loaded, windows = workbench.loaded, workbench.windows[:2, :20]
    request = request_of(store, workbench, lems.ALLOCATOR, 0.4, windows=2, tokens=20)
    found = lems.allocate(request)[2]["kl"]
    assert list(found) == [spec.name for spec in store.linears]
    for spec in store.linears[::4]:
        rank = curves.measured_rank(spec, request.energies[spec.name], 0.1)
        assert rank == max(1, int(0.1 * spec.params / spec.cost))
        low = low_rank_of(store, spec, loaded.model.get_submodule(spec.name), rank)
        with torch.no_grad():
            dense = loaded.model(input_ids=windows).logits.double().log_softmax(-1)
            with replaced(loaded.model, {spec.name: low}):
                compressed = loaded.model(input_ids=windows).logits.double().log_softmax(-1)
        expected = float((dense.exp() * (dense - compressed)).sum(-1).mean())
        assert expected > 0
        assert found[spec.name] == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_lems_errors_pass_through_the_measured_point_and_a_plan_is_no_worse_than_uniform(bench) -> None:
    store, workbench = bench()
    request = request_of(store, workbench, lems.ALLOCATOR, 0.4, fraction=0.3)
    ranks, _, learned = lems.allocate(request)

    def error(numbers: list[int]) -> float:
        total = 0.0
        for spec, rank in zip(request.linears, numbers, strict=True):
            tail = curves.relative_tail(request.energies[spec.name])
            point = curves.measured_rank(spec, request.energies[spec.name], 0.3)
            if rank * spec.cost < spec.params:
                total += learned["kl"][spec.name] * float(tail[rank] / tail[point])
        return total

    assert error(ranks) < error([int(budget_of(0.4, spec.params) / spec.cost) for spec in request.linears])


def test_lems_measures_once_for_all_budgets_and_names_a_damaged_file(bench) -> None:
    store, workbench = bench()
    steps: list[str] = []
    watched = dataclasses.replace(workbench, progress=lambda stage, _done, _total: steps.append(stage))
    options = SHORT["lems"]
    ranks, _, learned = lems.allocate(request_of(store, watched, lems.ALLOCATOR, 0.4, **options))
    assert "measure each linear" in steps
    steps.clear()
    assert lems.allocate(request_of(store, watched, lems.ALLOCATOR, 0.4, **options)) == (ranks, None, learned)
    lems.allocate(request_of(store, watched, lems.ALLOCATOR, 0.2, **options))
    assert steps == []
    lems.allocate(request_of(store, watched, lems.ALLOCATOR, 0.4, **options | {"tokens": 11}))
    lems.allocate(request_of(store, watched, lems.ALLOCATOR, 0.4, **options | {"fraction": 0.4}))
    files = sorted(store.path.glob("measured-lems-*.json"))
    assert len(files) == 3
    for damaged in ("{", json.dumps({"values": {"elsewhere": 1.0}}), "[]"):
        for file in files:
            file.write_text(damaged)
        with pytest.raises(StoreError, match=r"measured-lems-.* is missing or damaged .*; delete it and plan again\."):
            lems.allocate(request_of(store, watched, lems.ALLOCATOR, 0.4, **options))


def test_lems_measures_where_a_matrix_of_low_rank_still_has_a_tail() -> None:
    spec = LinearSpec("l", 0, "mlp", "x", 100, 100)
    energy = torch.zeros(100, dtype=torch.float64)
    for count, expected in ((0, 1), (1, 1), (3, 2), (100, 5)):
        energy[:count] = 1.0
        assert curves.measured_rank(spec, energy, 0.1) == expected


@pytest.mark.parametrize("seed", range(30))
def test_the_knapsack_is_within_one_segment_of_the_optimum(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    costs, errors = [], []
    for _ in range(5):
        costs.append(torch.randint(1, 12, (6,), generator=generator).cumsum(0))
        errors.append(torch.rand(6, generator=generator, dtype=torch.float64).sort(descending=True).values)
    least, most = (sum(int(cost[i]) for cost in costs) for i in (0, -1))
    budget = least + int((most - least) * float(torch.rand((), generator=generator)))
    taken = knapsack(costs, errors, budget)

    def total(values: list[torch.Tensor], choice) -> float:
        return sum(float(value[i]) for value, i in zip(values, choice, strict=True))

    assert total(costs, taken) <= budget
    best = min(
        total(errors, choice) for choice in itertools.product(range(6), repeat=5) if total(costs, choice) <= budget
    )
    hulls = [lower_hull(cost.tolist(), error.tolist()) for cost, error in zip(costs, errors, strict=True)]
    segment = max(
        float(error[a] - error[b])
        for error, hull in zip(errors, hulls, strict=True)
        for a, b in itertools.pairwise(hull)
    )
    assert best <= total(errors, taken) + 1e-12
    assert total(errors, taken) < best + segment
    # Nothing that still fits is left lying.
    for cost, i in zip(costs, taken, strict=True):
        assert i == 5 or total(costs, taken) - int(cost[i]) + int(cost[i + 1]) > budget


def test_the_hull_keeps_the_ends_and_skips_what_lies_above() -> None:
    assert lower_hull([0, 1, 2, 3, 4], [10.0, 9.5, 4.0, 3.9, 0.0]) == [0, 2, 4]
    assert lower_hull([5], [0.0]) == [0]


@pytest.mark.parametrize(
    ("allocator", "options"),
    [
        ("swift", {"windows": 0}),
        ("swift", {"windows": 1.5}),
        ("lems", {"tokens": 1}),
        ("lems", {"fraction": 1.0}),
        ("ara", {"steps": 0}),
        ("ara", {"near": 1.0}),
        ("ara", {"lr": 0.0}),
        ("ara", {"lambda2": -1.0}),
        ("ara", {"seed": -1}),
    ],
)
def test_an_option_that_is_not_legal_is_refused(bench, allocator: str, options: dict[str, float]) -> None:
    store, workbench = bench()
    with pytest.raises(InputError, match=f"{next(iter(options))} = .* is not legal"):
        unirank.plan(store, 0.4, allocator=allocator, options=options, workbench=workbench)


def test_a_non_finite_output_names_the_linear(bench) -> None:
    store, workbench = bench()
    spec = store.linears[5]

    def compressed(target: LinearSpec):
        low = low_rank_of(store, target, workbench.loaded.model.get_submodule(target.name), 2)
        if target == spec:
            low.left.weight.data.fill_(math.inf)
        return low

    with pytest.raises(NonFiniteError, match=spec.name):
        divergences(workbench.loaded, workbench.windows[0], compressed, lambda _: None)


def test_a_workbench_of_other_text_or_another_model_is_refused(
    bench, make_model, text_file: Path, tmp_path: Path
) -> None:
    store, workbench = bench()
    with pytest.raises(InputError, match="knows by name only"):
        unirank.make_workbench(workbench.loaded, store)
    other = tmp_path / "words.txt"
    other.write_text("w1 " + text_file.read_text())
    with pytest.raises(InputError, match="does not give the calibration windows"):
        unirank.make_workbench(workbench.loaded, store, text=str(other))
    with pytest.raises(InputError, match="another model"):
        unirank.make_workbench(make_model("gpt2"), store, text=str(text_file))
    with pytest.raises(InputError, match="needs the dense model; give it with against="):
        unirank.plan(store, 0.3, allocator="lems")


def test_compress_measures_by_itself(make_model, calibration) -> None:
    result = unirank.compress(make_model(), 0.4, allocator="swift", calibration=calibration)
    assert result.report.targets_after == result.plan.used <= result.plan.budget
    assert 0 <= result.plan.settings["a"] <= 1


def test_the_command_line_measures(run_unirank: Run, model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    small = ["--windows", 4, "--window", 24, "--device", "cpu"]
    store = tmp_path / "store"
    out = tmp_path / "out"
    common = ["-r", 0.4, "--allocator", "lems", "--json"]
    assert (
        run_unirank("compress", model_dir, "-o", out, "--store", store, "--calib", text_file, *small, *common)[0] == 0
    )
    kept = json.loads((out / "rank_plan.json").read_text())
    code, text, err = run_unirank("plan", store, "--model", model_dir, "--calib", text_file, "--device", "cpu", *common)
    assert (code, err) == (0, "")
    assert json.loads(text) == kept
    code, _, err = run_unirank("plan", store, *common)
    assert code == 2
    assert "--against" in err
    code, _, err = run_unirank("plan", store, "--model", model_dir, *common)
    assert code == 2
    assert "--calib" in err
