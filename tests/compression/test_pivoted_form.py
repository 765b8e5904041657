"""A model whose low-rank matrices are stored in the pivoted form: everything that the form of two factors does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import unirank
from tests.support.stores import contents
from tests.support.tiny import build
from unirank import CompressedModel, InputError, LowRankLinear, StoreError
from unirank.compression.densified import save_dense
from unirank.models.low_rank import count_target

IDS = torch.arange(2, 22)[None]
READ = """
import sys, torch, unirank
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
for path in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        save_file({"logits": model(torch.arange(2, 22)[None]).logits}, sys.argv[1] + "/" + path.split("/")[-1])
"""
# name: architecture and scheme
CASES = {
    "llama": ("llama", "whiten"),
    "afm": ("llama", "afm"),
    "afm-bias": ("llama-bias", "afm"),
    "conv1d": ("gpt2", "whiten"),
    "parallel": ("gpt-neox", "afm"),
}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def low_rank(model: torch.nn.Module) -> dict[str, LowRankLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer, text_file: Path) -> tuple[Path, dict[str, CompressedModel]]:
    """Checkpoints in the pivoted form, and the models that they were saved from."""
    root = tmp_path_factory.mktemp("pivoted")
    calibration = unirank.Calibration(text=str(text_file), windows=8, window=16, batch=2)
    models = {}
    for name, (architecture, scheme) in CASES.items():
        asked: dict[str, Any] = {"tokenizer": tokenizer, "scheme": scheme, "calibration": calibration}
        models[name] = unirank.compress(build(architecture), 0.4, form="pivoted", store=root / f"{name}-store", **asked)
        models[name].save(root / name)
    return root, models


def test_the_modules_hold_what_the_plan_counted(made) -> None:
    for compressed in made[1].values():
        plan, model = compressed.plan, compressed.model
        assert plan.form == "pivoted"
        assert 0.97 * plan.budget <= plan.used <= plan.budget
        assert sum(count_target(model.get_submodule(name)) for name in plan.ranks) == plan.used
        pivoted = low_rank(model)
        assert pivoted
        # Ranks beyond the break-even of two factors, which cost less than the dense matrix here.
        assert any(low.rank * (low.in_features + low.out_features) >= low.in_features * low.out_features
                   for low in pivoted.values())  # fmt: skip
        assert all(low.form == "pivoted" for low in pivoted.values())


def test_a_new_process_computes_the_same_logits_bit_for_bit(made, tmp_path: Path) -> None:
    root, models = made
    paths = [str(root / name) for name in models]
    done = subprocess.run([sys.executable, "-c", READ, tmp_path, *paths], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    for name, compressed in models.items():
        assert torch.equal(load_file(tmp_path / name)["logits"], logits(compressed.model)), name


def test_both_forms_of_one_plan_are_the_same_map(made, tokenizer, text_file: Path) -> None:
    root, models = made
    for name, (architecture, _) in CASES.items():
        store = unirank.open_store(root / f"{name}-store")
        ranks = dict(models[name].plan.ranks)
        loaded = unirank.describe(build(architecture), tokenizer)
        plan = unirank.import_plan(store, json.dumps(ranks))
        assert plan.form == "factors"
        factors = {key: value for key, value in plan.ranks.items() if value != "dense"}
        pivoted = unirank.import_plan(store, json.dumps(plan.ranks), form="pivoted")
        assert {key: value for key, value in pivoted.ranks.items() if value != "dense"} == factors
        assert pivoted.used < plan.used
        one = unirank.apply(loaded, store, plan, copy=True)
        other = unirank.apply(loaded, store, pivoted, copy=True)
        assert torch.allclose(logits(one.model), logits(other.model), rtol=1e-4, atol=1e-4)


def test_densify_fuse_and_compile_keep_the_outputs(made, tmp_path: Path) -> None:
    root, models = made
    for name, compressed in models.items():
        before = logits(compressed.model)
        fused = AutoModelForCausalLM.from_pretrained(root / name)
        assert unirank.fuse(fused) or name in ("conv1d", "parallel")  # no two of their linears read one tensor
        assert torch.allclose(logits(fused), before, atol=1e-5)
        dense = unirank.densify(AutoModelForCausalLM.from_pretrained(root / name))
        assert not low_rank(dense)
        assert torch.allclose(logits(dense), before, rtol=1e-4, atol=1e-4)
    compiled = torch.compile(models["afm"].model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(logits(compiled), logits(models["afm"].model), atol=1e-5)


def test_streaming_writes_the_same_tensors_and_densifies_them(made, tmp_path: Path, tokenizer) -> None:
    root, models = made
    for name in ("afm-bias", "conv1d"):
        architecture = CASES[name][0]
        build(architecture).save_pretrained(tmp_path / architecture)
        tokenizer.save_pretrained(tmp_path / architecture)
        loaded = unirank.load(str(tmp_path / architecture), stream=True)
        compressed = unirank.apply(loaded, unirank.open_store(root / f"{name}-store"), models[name].plan)
        compressed.save(tmp_path / name)
        whole = load_file(root / name / "model.safetensors")
        streamed = load_file(tmp_path / name / "model.safetensors")
        assert whole.keys() == streamed.keys()
        assert all(torch.equal(whole[key], streamed[key]) for key in whole)
        opened = unirank.open_compressed(tmp_path / name, stream=True)
        unirank.densify(opened.model, pages=opened.pages)
        save_dense(opened, tmp_path / f"{name}-dense")
        dense = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-dense")
        assert torch.allclose(logits(dense), logits(models[name].model), rtol=1e-4, atol=1e-4)


def test_the_second_pass_fits_in_the_form(made, tokenizer, text_file: Path) -> None:
    loaded = unirank.describe(build("llama"), tokenizer)
    store = unirank.open_store(made[0] / "llama-store")
    workbench = unirank.make_workbench(loaded, store, text=str(text_file))
    arguments: dict[str, Any] = {"refine": unirank.Refine(centred=True), "windows": workbench.windows, "copy": True}
    pivoted = unirank.apply(loaded, store, made[1]["llama"].plan, **arguments)
    ranks = json.dumps(dict(made[1]["llama"].plan.ranks))
    factors = unirank.apply(loaded, store, unirank.import_plan(store, ranks), **arguments)
    assert all(low.form == "pivoted" and low.output_bias is not None for low in low_rank(pivoted.model).values())
    shared = {name for name, low in low_rank(factors.model).items() if low.rank == low_rank(pivoted.model)[name].rank}
    assert shared
    if len(shared) == len(low_rank(pivoted.model)):
        assert torch.allclose(logits(pivoted.model), logits(factors.model), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("allocator", ["swift", "lems", "ara"])
def test_allocators_that_measure_plan_in_the_form(allocator: str, made, tokenizer, text_file: Path) -> None:
    loaded = unirank.describe(build("llama"), tokenizer)
    store = unirank.open_store(made[0] / "llama-store")
    options = {"ara": {"steps": 4, "tokens": 16}, "lems": {"tokens": 16}, "swift": {"windows": 2}}[allocator]
    workbench = unirank.make_workbench(loaded, store, text=str(text_file))
    plans = [
        unirank.plan(store, 0.4, allocator=allocator, options=options, workbench=workbench, form=form)
        for form in ("factors", "pivoted")
    ]
    assert plans[0].budget == plans[1].budget
    for plan in plans:
        assert 0.93 * plan.budget <= plan.used <= plan.budget
    assert plans[0].ranks != plans[1].ranks


def test_fine_tuning_keeps_form_and_rank(made, tmp_path: Path, text_file: Path) -> None:
    root, models = made
    settings = unirank.Finetune(steps=3, batch=2, window=16, rank=2, lr=1e-3, held_out=0.25)
    tuned = unirank.finetune(root / "afm", str(text_file), settings, work=tmp_path / "work")
    before, after = low_rank(models["afm"].model), low_rank(tuned.model)
    assert {name: (low.rank, low.form) for name, low in before.items()} == {
        name: (low.rank, low.form) for name, low in after.items()
    }
    assert any(not torch.equal(low.left.weight, after[name].left.weight) for name, low in before.items())
    assert all(torch.equal(low.place, after[name].place) for name, low in before.items())
    tuned.save(tmp_path / "tuned")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")), logits(tuned.model))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_peft_adapts_the_inner_linears(made) -> None:
    model = AutoModelForCausalLM.from_pretrained(made[0] / "llama")
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["left", "right"]))
    loss = peft(input_ids=IDS, labels=IDS).loss
    loss.backward()
    gradients = [p.grad for name, p in peft.named_parameters() if "lora_B" in name]
    assert gradients
    assert all(gradient is not None and bool(gradient.any()) for gradient in gradients)


def test_in_bfloat16_it_opens_and_is_near(made, tmp_path: Path, tokenizer, text_file: Path) -> None:
    calibration = unirank.Calibration(text=str(text_file), windows=8, window=16, batch=2)
    model = build("llama").to(torch.bfloat16)
    compressed = unirank.compress(model, 0.3, tokenizer=tokenizer, form="pivoted", calibration=calibration)
    assert {p.dtype for p in compressed.model.parameters()} == {torch.bfloat16}
    compressed.save(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    kept, written = again.state_dict(), compressed.model.state_dict()
    assert kept.keys() == written.keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in written.items())
    assert all(low.place.dtype == torch.int32 for low in low_rank(again).values())


def test_a_store_of_an_earlier_version_says_that_its_factors_end_too_early(made, tmp_path: Path) -> None:
    store = unirank.open_store(made[0] / "llama-store")
    for file in store.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((tmp_path / "analysis.json").read_text())
    manifest["format"] = 4
    (tmp_path / "analysis.json").write_text(json.dumps(manifest))
    for layer in range(store.layer_count):
        file = tmp_path / f"layer-{layer:04d}.safetensors"
        tensors = load_file(file)
        for spec in store.linears:
            if spec.layer == layer:
                tensors[f"{spec.name}.left"] = tensors[f"{spec.name}.left"][:, : spec.max_rank].contiguous()
                tensors[f"{spec.name}.right"] = tensors[f"{spec.name}.right"][: spec.max_rank].contiguous()
        header = json.loads(_metadata(file)["unirank"])
        save_file(tensors, file, metadata={"unirank": json.dumps(header)})
    old = unirank.open_store(tmp_path)
    assert not old.full
    assert unirank.plan(old, 0.4).ranks == unirank.plan(store, 0.4).ranks
    with pytest.raises(StoreError, match="factors end at break-even"):
        unirank.plan(old, 0.4, form="pivoted")
    with pytest.raises(StoreError, match="factors end at break-even"):
        unirank.import_plan(old, made[1]["llama"].plan.to_json())


def _metadata(file: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return opened.metadata()


def test_a_form_that_does_not_exist_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(InputError, match="form = 'pivots' is not legal; legal values: factors, pivoted"):
        unirank.compress("no-such-model", 0.2, form="pivots")  # pyright: ignore[reportArgumentType]


def test_the_plan_and_the_configuration_carry_the_form(made, tmp_path: Path) -> None:
    root, models = made
    assert json.loads((root / "llama" / "rank_plan.json").read_text())["form"] == "pivoted"
    config = json.loads((root / "llama" / "config.json").read_text())
    assert config["quantization_config"]["form"] == "pivoted"
    assert "pivoted" in (root / "llama" / "README.md").read_text()
    record = unirank.open_compressed(root / "llama")
    assert record.plan == models["llama"].plan
    config["quantization_config"]["form"] = "pivots"
    for name, data in contents(root / "llama").items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"quantization_config\.form = 'pivots'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
