"""A mixture of experts from the analysis to the checkpoint and back: each expert's matrices have ranks of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import unirank
from tests.support.stores import contents
from tests.support.tiny import build
from unirank.analysis.needs import dry_run
from unirank.cli.endings import after_looking
from unirank.cli.views import plan_table
from unirank.compression.densified import densify, save_dense
from unirank.compression.truncation import truncate
from unirank.layerwise import expert_moments
from unirank.models.low_rank import count_parameters
from unirank.models.low_rank_experts import LowRankExperts
from unirank.planning.imported_ranks import import_plan
from unirank.planning.score import score
from unirank.rank_plan import described_ranks
from unirank.serving.members import refuse_experts
from unirank.tradeoff.sizes import Sizes
from unirank.tradeoff.swapping import Swapping, on_loan
from unirank.types import DENSE, FORMS, ExpertSpec, Form, LoadedModel, Rank

IDS = torch.arange(2, 18)[None]
pytestmark = pytest.mark.filterwarnings("ignore::unirank.UnirankWarning")  # of few tokens


@pytest.fixture
def loaded(make_model) -> LoadedModel:
    return make_model("mixtral")


@pytest.fixture
def dense(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A checkpoint whose files have a matrix for each expert, as Mixtral's do."""
    build("mixtral").save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    tokenizer.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_targets_are_the_matrices_of_every_expert_and_no_router(loaded: LoadedModel) -> None:
    experts = [spec for spec in loaded.linears if isinstance(spec, ExpertSpec)]
    assert len(experts) == 3 * 4 * 2
    spec = next(spec for spec in experts if spec.name == "model.layers.1.mlp.experts.down_proj.3")
    assert (spec.kind, spec.sublayer, spec.m, spec.n) == ("mlp.experts.down_proj", "mlp", 32, 48)
    assert not any("gate." in spec.name or spec.name.endswith("gate") for spec in loaded.linears)


@pytest.mark.parametrize(("form", "scheme"), [("factors", "whiten"), ("pivoted", "afm")])
def test_compress_save_load_and_densify(
    form: Form, scheme: str, loaded: LoadedModel, calibration: unirank.Calibration, tmp_path: Path
) -> None:
    compressed = unirank.compress(loaded, 0.3, calibration=calibration, scheme=scheme, form=form)
    plan = compressed.plan
    ranks = [plan.ranks[spec.name] for spec in loaded.linears if isinstance(spec, ExpertSpec)]
    assert len(set(ranks)) > 2
    assert plan.used <= plan.budget
    assert compressed.report.targets_after == plan.used
    low: Any = compressed.model.get_submodule("model.layers.0.mlp.experts")
    assert isinstance(low, LowRankExperts)
    again = AutoModelForCausalLM.from_pretrained(compressed.save(tmp_path / "out"))
    assert torch.equal(logits(again), logits(compressed.model))
    opened = unirank.open_compressed(tmp_path / "out")
    assert opened.plan == plan
    assert torch.equal(logits(opened.model), logits(compressed.model))
    generate: Any = opened.model.generate
    out = generate(IDS, max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 20)
    if scheme == "afm":
        with pytest.raises(unirank.InputError, match="has no place for the biases of the experts at"):
            densify(opened.model)
        return
    before = logits(opened.model)
    plain = densify(opened.model)
    torch.testing.assert_close(logits(plain), before, rtol=1e-4, atol=1e-6)
    plain.save_pretrained(tmp_path / "plain")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")), logits(plain))


def test_a_checkpoint_without_unirank_does_not_load_into_random_weights(
    loaded: LoadedModel, calibration: unirank.Calibration, tmp_path: Path
) -> None:
    compressed = unirank.compress(loaded, 0.3, calibration=calibration)
    compressed.save(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError):  # a shape mismatch, at the guard
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_importance_is_the_sublayers_times_the_routers_share(
    loaded: LoadedModel, calibration: unirank.Calibration, tmp_path: Path
) -> None:
    store = unirank.analyze(loaded, tmp_path / "store", calibration=calibration)
    shares = store.shares()
    assert shares.keys() == {spec.name for spec in loaded.linears if isinstance(spec, ExpertSpec)}
    components = score(store.linears, store.energies(), store.cosines(), shares=shares)
    for spec, first, last in zip(store.linears, components.offsets, components.offsets[1:], strict=False):
        importance = 1 - store.cosines()[spec.layer][spec.sublayer].mean
        total = float(components.value[first:last].sum())
        assert total == pytest.approx(importance * shares.get(spec.name, 1.0), rel=1e-9)


@pytest.mark.parametrize("room", [1, None])
def test_streamed_and_resumed_analyses_have_the_same_bytes(
    room: int | None, dense: Path, calibration: unirank.Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unirank.layerwise import statistics

    monkeypatch.setitem(statistics.calibrate_parts.__wrapped__.__kwdefaults__, "room", room)
    made = {}
    for kind in ("whole", "streamed"):
        loaded = unirank.load(dense, device="cpu", stream=kind == "streamed")
        store = unirank.analyze(loaded, tmp_path / f"{kind}-store", calibration=calibration)
        if kind == "streamed":
            store.layer_file(2).unlink()  # what a killed run would lack, but for the stream
            store = unirank.analyze(loaded, store.path, calibration=calibration)
        plan = unirank.plan(store, 0.3)
        compressed = unirank.apply(loaded, store, plan)
        compressed.save(tmp_path / f"{kind}-out")
        densify(compressed.model, pages=loaded.pages)
        save_dense(compressed, tmp_path / f"{kind}-dense")
        made[kind] = [contents(tmp_path / f"{kind}-{what}") for what in ("store", "out", "dense")]
    assert made["whole"] == made["streamed"]


def test_a_dry_run_works_on_a_layer_of_experts(
    dense: Path, calibration: unirank.Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    plain = expert_moments.ExpertMoments.finish
    monkeypatch.setattr(
        expert_moments.ExpertMoments, "finish", lambda self, *args: seen.append(len(args[0])) or plain(self, *args)
    )
    needs = dry_run(unirank.load(dense, device="cpu", stream=True), tmp_path / "store", calibration=calibration)
    assert needs.layers == 3
    assert set(seen) == {8}
    with pytest.raises(unirank.InputError, match=r"is not available for mixtures of experts"):
        unirank.dry_run(dense, tmp_path / "store", preset="fast", calibration=calibration, remove=0.3, device="cpu")


def test_what_experts_cannot_have_is_refused_before_any_work(
    loaded: LoadedModel, calibration: unirank.Calibration, tmp_path: Path
) -> None:
    refused: Any = ({"preset": "fast"}, {"preset": "best"}, {"scheme": "kfac"}, {"allocator": "lems"})
    for options in refused:
        with pytest.raises(unirank.InputError, match=r"is not available for mixtures of experts.*experts\).*\.$"):
            unirank.compress(loaded, 0.3, calibration=calibration, store=tmp_path / "store", **options)
        assert not (tmp_path / "store").exists()
    compressed = unirank.compress(loaded, 0.3, calibration=calibration)
    for work in (
        lambda: unirank.heal(compressed, calibration, work=tmp_path / "work"),
        lambda: unirank.finetune(compressed, "builtin", work=tmp_path / "work"),
        lambda: unirank.quantize(compressed, 8),
    ):
        with pytest.raises(unirank.InputError, match="is not available for mixtures of experts"):
            work()


def test_a_plan_that_keeps_an_experts_matrix_dense_stores_it_beside_the_factors(
    loaded: LoadedModel, calibration: unirank.Calibration, tmp_path: Path
) -> None:
    store = unirank.analyze(loaded, tmp_path / "store", calibration=calibration)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    ranks = {spec.name: "dense" for spec in loaded.linears} | {f"{name}.2": 5}
    before = loaded.model.get_parameter(name)[3].clone()
    truncate(loaded, store, import_plan(store, json.dumps(ranks)))
    experts: Any = loaded.model.get_submodule("model.layers.0.mlp.experts")
    assert experts.factors("gate_up_proj").ranks == (None, None, 5, None)
    assert torch.equal(experts.factors("gate_up_proj").dense_weight(3), before)
    assert experts.factors("down_proj") is None


def test_tied_ranks_are_one_for_a_stack_and_within_the_budget(
    loaded: LoadedModel, calibration: unirank.Calibration, tmp_path: Path
) -> None:
    store = unirank.analyze(loaded, tmp_path / "store", calibration=calibration)
    for form in FORMS:
        tied = unirank.plan(store, 0.3, allocator="tied", form=form)
        stacks: dict[str, set[object]] = {}
        for spec in store.linears:
            if isinstance(spec, ExpertSpec):
                stacks.setdefault(f"{spec.module}.{spec.parameter}", set()).add(tied.ranks[spec.name])
        assert [len(ranks) for ranks in stacks.values()] == [1] * 6
        assert 0.9 * tied.budget < tied.used <= tied.budget


def test_the_size_of_a_checkpoint_is_known_before_it_is_written(
    loaded: LoadedModel, calibration: unirank.Calibration, tmp_path: Path
) -> None:
    sizes = Sizes.of(loaded)
    kinds: list[tuple[str, Form]] = [("whiten", "pivoted"), ("afm", "factors")]
    for scheme, form in kinds:
        compressed = unirank.compress(loaded, 0.3, calibration=calibration, scheme=scheme, form=form, copy=True)
        ranks, adds = compressed.plan.ranks, scheme == "afm"
        state = compressed.model.state_dict().values()
        assert sizes.weight_bytes(ranks, form, "float32", adds_bias=adds) == sum(tensor.nbytes for tensor in state)
        assert sizes.parameters_at(ranks, form, adds_bias=adds) == count_parameters(compressed.model)


def test_a_loan_is_given_back_dense(loaded: LoadedModel, calibration: unirank.Calibration, tmp_path: Path) -> None:
    store = unirank.analyze(loaded, tmp_path / "store", calibration=calibration)
    dense, before = dict(loaded.model.named_modules()), logits(loaded.model)
    swapping = Swapping(loaded)
    for removed in (0.2, 0.4):
        plan = unirank.plan(store, removed)
        with on_loan(loaded):
            swapping.put(store, plan)
            found = logits(loaded.model)
        assert torch.equal(found, logits(unirank.apply(loaded, store, plan, copy=True).model))
        assert dict(loaded.model.named_modules()) == dense
        assert torch.equal(logits(loaded.model), before)


def test_vllm_is_told_that_it_cannot_serve_low_rank_experts() -> None:
    refuse_experts(["model.layers.0.mlp.down_proj"])
    with pytest.raises(unirank.InputError, match=r"vLLM cannot serve low-rank experts.*experts\.down_proj\.3\)"):
        refuse_experts(["model.layers.0.mlp.experts.down_proj.3"])


def test_a_stack_is_one_column_of_what_people_see(
    loaded: LoadedModel, calibration: unirank.Calibration, tmp_path: Path
) -> None:
    store = unirank.analyze(loaded, tmp_path / "store", calibration=calibration)
    plan = unirank.plan(store, 0.3)
    table = plan_table(plan)
    assert [str(column.header) for column in table.columns][-2:] == ["gate_up_proj", "down_proj"]
    ranks: list[Rank] = [plan.ranks[f"model.layers.0.mlp.experts.down_proj.{expert}"] for expert in range(4)]
    assert next(iter(table.columns[-1].cells)) == described_ranks(ranks)
    assert described_ranks([5, DENSE, 3]) == "3-5, 1 dense"
    assert described_ranks([4, 4]) == "4"
    assert described_ranks([DENSE]) == "dense"
    assert plan.heat_map().count("model.layers.0.mlp.experts.down_proj") == 1
    unirank.apply(loaded, store, plan).save(tmp_path / "out")
    assert "report" in after_looking(str(tmp_path / "out"), "dense", 1.1).plain
