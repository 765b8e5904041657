"""The allocator `ara`: staircases, masked factors, and the training that turns them into ranks."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import unirank
from tests.support.allocating import Found, request_of
from tests.support.tiny import WORDS
from unirank.analysis.store import AnalysisStore
from unirank.errors import NonFiniteError
from unirank.evaluation.perplexity import total_nll
from unirank.layerwise.lending import lent
from unirank.planning.allocator import ara, swift
from unirank.planning.allocator.base import Workbench
from unirank.planning.allocator.masks import Staircase
from unirank.planning.allocator.measure import replaced, truncated
from unirank.planning.allocator.targets import real_rank
from unirank.types import DENSE, FORMS, LinearSpec, LoadedModel


def test_a_staircase_starts_at_its_rank_and_falls() -> None:
    spec = LinearSpec("l", 0, "mlp", "x", 100, 60)
    for keep, form in itertools.product((0.2, 0.5, 0.9), FORMS):
        wanted = real_rank(spec, keep * spec.params, form)
        mask = Staircase.start(spec, 16, wanted, form, torch.device("cpu")).mask().detach()
        assert mask.shape == (spec.dense_rank(form),)
        assert float(mask.sum()) == pytest.approx(wanted)
        assert float(mask[0]) == pytest.approx(1)
        assert bool((mask.diff() <= 0).all())
        assert float(mask.min()) >= 0


def test_full_masks_give_the_dense_model_and_one_hot_ones_the_truncated(bench) -> None:
    store, workbench = bench("llama-bias", "afm")
    model = workbench.loaded.model
    ids = workbench.windows[:1]
    modules = {
        spec.name: ara.masked_factors(store, spec, "factors", model.get_submodule(spec.name)) for spec in store.linears
    }
    with torch.no_grad():
        dense = model(ids).logits
        with replaced(model, modules):
            for spec in store.linears:
                mask = torch.ones(spec.max_rank, dtype=torch.float64)
                modules[spec.name].set(mask, torch.tensor(1.0))
            assert torch.allclose(model(ids).logits, dense, atol=1e-5)
            for spec in store.linears:
                mask = (torch.arange(spec.max_rank) < 4).double()
                modules[spec.name].set(mask, torch.tensor(0.0))
            masked = model(ids).logits
        with truncated(request_of(store, workbench, ara.ALLOCATOR, 0.5), [4] * len(store.linears)):
            assert torch.allclose(model(ids).logits, masked, atol=1e-5)
    assert not torch.allclose(masked, dense, atol=0.1)


def test_windows_through_leaves_give_the_gradient_of_the_whole_loss(bench) -> None:
    store, workbench = bench()
    model, windows = workbench.loaded.model, workbench.windows[:2, :12]
    request = request_of(store, workbench, ara.ALLOCATOR, 0.25, lambda1=3.0, lambda2=0.5, near=0.7, lr=1e-3)
    staircases = {
        spec.name: Staircase.start(spec, 8, 0.8 * spec.params / spec.cost, "factors", model.device)
        for spec in store.linears
    }
    modules = {
        spec.name: ara.masked_factors(store, spec, "factors", model.get_submodule(spec.name)) for spec in store.linears
    }
    with lent(model), replaced(model, modules):
        loss, total = torch.zeros((), dtype=torch.float64), sum(spec.params for spec in store.linears)
        kept = torch.zeros((), dtype=torch.float64)
        for spec in store.linears:
            module = modules[spec.name]
            mask = staircases[spec.name].mask()
            ratio = mask.sum() * spec.cost / spec.params
            assert 0.7 < ratio.item() < 1
            module.mask, module.gate = mask.float(), ((ratio - 0.7) / 0.3).float()
            kept = kept + ratio * spec.params / total
            loss = loss + 0.5 * (1 - ratio) * spec.params / total
        loss = loss + 3.0 * (kept - 0.75) ** 2
        logits = model(input_ids=windows).logits[:, :-1]
        loss = loss + F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).double()
        thetas = [staircase.theta for staircase in staircases.values()]
        expected = torch.autograd.grad(loss, thetas)
        found = ara._Trainer(request, staircases).step(model, modules, windows, 0)
    assert found == pytest.approx(loss.item(), rel=1e-6)
    for theta, gradient in zip(thetas, expected, strict=True):
        assert torch.allclose(theta.grad, gradient, rtol=1e-3, atol=1e-6)
        assert float(gradient.abs().max()) > 1e-4


HALVES = [torch.bfloat16, torch.float16]


def in_dtype(loaded: LoadedModel, dtype: torch.dtype, folder: Path, text: Path) -> tuple[AnalysisStore, Workbench]:
    """A store and a workbench of the model, which now has `dtype`."""
    loaded.model.to(dtype)
    calibration = unirank.Calibration(text=str(text), windows=6, window=24, batch=2)
    store = unirank.analyze(loaded, folder / str(dtype), calibration=calibration)
    return store, unirank.make_workbench(loaded, store, text=str(text))


def leaves_of(store: AnalysisStore, model: torch.nn.Module, mask: float, gate: float):
    """Masked factors with one value in every mask and gate, and the leaves that gather their gradients."""
    modules = {
        spec.name: ara.masked_factors(store, spec, "factors", model.get_submodule(spec.name)) for spec in store.linears
    }
    values = (torch.full((spec.max_rank,), mask, dtype=torch.float64) for spec in store.linears)
    pairs = [
        modules[spec.name].set(value, torch.tensor(gate)) for spec, value in zip(store.linears, values, strict=True)
    ]
    return modules, [leaf for pair in pairs for _, leaf in pair]


@pytest.mark.parametrize("dtype", HALVES)
def test_masks_of_a_model_in_half_precision_take_steps_that_its_dtype_does_not_have(
    dtype: torch.dtype, make_model, text_file: Path, tmp_path: Path
) -> None:
    store, workbench = in_dtype(make_model(), dtype, tmp_path, text_file)
    modules, _ = leaves_of(store, workbench.loaded.model, mask=1 - 1e-5, gate=0.3 + 1e-5)
    for module in modules.values():
        assert module.mask.tolist() == pytest.approx([1 - 1e-5] * len(module.mask), abs=1e-7)
        assert float(module.gate.detach()) == pytest.approx(0.3 + 1e-5, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_gradients_of_masks_do_not_vanish_among_many_windows(
    dtype: torch.dtype, make_model, text_file: Path, tmp_path: Path
) -> None:
    store, workbench = in_dtype(make_model(num_hidden_layers=1), dtype, tmp_path, text_file)
    model, ids = workbench.loaded.model, workbench.windows[0, :8]
    found = {}
    with lent(model):
        # One window of few, one of so many that its share of a gradient is below what float16 has, and many windows:
        # a sum in bfloat16 stands still at 256 times what is added.
        for name, parts, times in (("few", 1, 1), ("shared", 2**20, 1), ("many", 1, 400)):
            modules, leaves = leaves_of(store, model, mask=0.7, gate=0.2)
            with replaced(model, modules):
                for _ in range(times):
                    ara._cross_entropy(model, ids, leaves, parts)
            found[name] = torch.cat([leaf.grad.double().flatten() for leaf in leaves]) * parts / times
    assert bool((found["few"] != 0).all())
    for other in ("shared", "many"):
        torch.testing.assert_close(found[other], found["few"], rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_trains_the_ranks_of_float32(dtype: torch.dtype, make_model, text_file, tmp_path: Path) -> None:
    plans = []
    for kind in (torch.float32, dtype):
        loaded = make_model()
        loaded.model.to(dtype)  # so that both have the same weights
        store, workbench = in_dtype(loaded, kind, tmp_path, text_file)
        options = {"steps": 15, "batch": 6, "lr": 0.2, "patience": 0}
        plans.append(unirank.plan(store, 0.4, allocator="ara", options=options, workbench=workbench))
    wanted, found = plans
    assert found.settings["history"] == pytest.approx(wanted.settings["history"], rel=1e-2)
    assert found.settings["expected_kept"] == pytest.approx(wanted.settings["expected_kept"], abs=2e-3)
    kept = [[plan.rank_cost(name) / math.prod(plan.shapes[name]) for name in plan.ranks] for plan in plans]
    assert kept[1] == pytest.approx(kept[0], abs=0.1)


def trained(loaded: LoadedModel, names: tuple[str, ...], steps: int = 60) -> None:
    """Fit the parameters whose names hold one of `names` to a text in which each word gives the next."""
    model = loaded.model
    taken = [parameter for name, parameter in model.named_parameters() if any(part in name for part in names)]
    adam = torch.optim.Adam(taken, lr=1e-2)
    for _ in range(steps):
        ids = chain(8, 24, 0)
        loss = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        adam.zero_grad()
        loss.backward()
        adam.step()
    model.zero_grad(set_to_none=True)


def chain(windows: int, window: int, seed: int) -> torch.Tensor:
    start = torch.randint(0, 94, (windows, 1), generator=torch.Generator().manual_seed(seed))
    return 2 + (start * 7 + 11 * torch.arange(window)) % 94


def calibrated(loaded: LoadedModel, folder: Path) -> tuple[AnalysisStore, Workbench]:
    """A store and a workbench on the text that the model has learned."""
    text = folder / "chain.txt"
    text.write_text(" ".join(WORDS[i] for i in chain(40, 48, 1).flatten().tolist()))
    calibration = unirank.Calibration(text=str(text), windows=8, window=24, batch=4)
    store = unirank.analyze(loaded, folder / "chained", calibration=calibration)
    return store, unirank.make_workbench(loaded, store, text=str(text))


def loss_of(store: AnalysisStore, workbench: Workbench, plan: unirank.RankPlan) -> float:
    ranks = [spec.k if plan.ranks[spec.name] == DENSE else plan.ranks[spec.name] for spec in store.linears]
    with truncated(request_of(store, workbench, swift.ALLOCATOR, plan.remove), ranks):
        return total_nll(workbench.loaded.model, workbench.windows)


def test_the_loss_of_ara_falls_and_its_ranks_beat_uniform(make_model, tmp_path: Path) -> None:
    loaded = make_model()
    trained(loaded, ("",))
    store, workbench = calibrated(loaded, tmp_path)
    seen: list[tuple[int, int]] = []
    watched = Workbench(workbench.loaded, workbench.windows, lambda stage, done, total: seen.append((done, total)))
    options = {"steps": 40, "batch": 8, "lr": 0.2, "patience": 0}
    plan = unirank.plan(store, 0.4, allocator="ara", options=options, workbench=watched)
    history = plan.settings["history"]
    assert seen == [(step, 40) for step in range(41)]
    assert len(history) == 40
    assert all(math.isfinite(loss) for loss in history)
    assert history[-1] < 0.9 * history[0]
    assert plan.settings["expected_kept"] == pytest.approx(0.6, abs=0.05)
    assert loss_of(store, workbench, plan) < loss_of(store, workbench, unirank.plan(store, 0.4, allocator="uniform"))


def test_ara_gives_rank_to_the_matrix_that_matters(make_model, tmp_path: Path) -> None:
    loaded = make_model()
    chosen = "model.layers.1.mlp.down_proj"
    for spec in loaded.linears:
        if spec.kind in ("self_attn.o_proj", "mlp.down_proj") and spec.name != chosen:
            loaded.model.get_submodule(spec.name).weight.data *= 1e-3
    trained(loaded, (chosen,))  # the only sublayer that moves the stream has learned the text
    store, workbench = calibrated(loaded, tmp_path)
    options = {"steps": 40, "batch": 8, "lr": 0.2, "patience": 0}
    plan = unirank.plan(store, 0.5, allocator="ara", options=options, workbench=workbench)
    kept = {name: plan.rank_cost(name) / math.prod(plan.shapes[name]) for name in plan.ranks}
    assert kept[chosen] > max(kept[spec.name] for spec in store.linears if spec.layer != 1)
    assert loss_of(store, workbench, plan) < loss_of(store, workbench, unirank.plan(store, 0.5, allocator="uniform"))


def test_ara_stops_early_without_progress(bench) -> None:
    store, workbench = bench()
    options = {"steps": 60, "batch": 1, "lr": 1e-9, "patience": 4}
    history = unirank.plan(store, 0.4, allocator="ara", options=options, workbench=workbench).settings["history"]
    assert 4 < len(history) < 60


def test_a_loss_that_is_not_finite_stops_ara_with_the_step(bench) -> None:
    store, workbench = bench()
    found = Found(workbench.loaded)
    with pytest.raises(NonFiniteError, match=r"of ara is .* at step 0"):
        unirank.plan(store, 0.4, allocator="ara", options={"lr": 1e308, "lambda1": 1e308}, workbench=workbench)
    assert found.unchanged()
