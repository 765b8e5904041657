"""`unirank.quantize`: by torchao, saved as plain tensors, loaded again bit for bit, refused where it makes no sense."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import unirank
from tests.support.tiny import build
from unirank import CompressedModel, InputError, LowRankLinear
from unirank.compression.checkpoint import read_record
from unirank.models.bits import unpack
from unirank.models.low_rank import count_parameters, count_target
from unirank.models.quantizing import quantized_linears, quantized_of, stored_bytes

IDS = torch.arange(2, 22)[None]
READ = """
import sys, torch, unirank
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
for path in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    with torch.no_grad():
        save_file({"logits": model(torch.arange(2, 22)[None]).logits}, sys.argv[1] + "/" + path.split("/")[-1])
"""
# name: architecture, scheme, form and dtype
CASES: dict[str, tuple[str, str, Any, torch.dtype]] = {
    "llama": ("llama", "whiten", "factors", torch.float32),
    "afm": ("llama", "afm", "pivoted", torch.bfloat16),
    "bias": ("llama-bias", "afm", "factors", torch.float16),
    "conv1d": ("gpt2", "whiten", "pivoted", torch.float32),
}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def ranks_of(model: nn.Module) -> dict[str, Any]:
    """Ranks that are hard to quantise: 1, odd ones, some that groups divide; the last linear of a layer stays dense."""
    loaded_linears = [name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")]
    inside = [name for name in loaded_linears if "lm_head" not in name]
    cycle: list[Any] = [1, 7, 16, "dense", 5]
    return {name: cycle[index % len(cycle)] for index, name in enumerate(inside)}


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer, text_file: Path) -> tuple[Path, dict[str, CompressedModel]]:
    """Checkpoints NAME, and what is made of them with 8 and 4 bits, in memory and saved as NAME-8 and NAME-4."""
    root = tmp_path_factory.mktemp("quantised")
    calibration = unirank.Calibration(text=str(text_file), windows=4, window=16, batch=2)
    models = {}
    for name, (architecture, scheme, form, dtype) in CASES.items():
        model = build(architecture, intermediate_size=64).to(dtype)
        asked: dict[str, Any] = {"tokenizer": tokenizer, "scheme": scheme, "calibration": calibration, "form": form}
        unirank.compress(model, ranks=ranks_of(model), **asked).save(root / name)
        for bits in (8, 4):
            models[f"{name}-{bits}"] = unirank.quantize(root / name, bits, device="cpu")
            models[f"{name}-{bits}"].save(root / f"{name}-{bits}")
    return root, models


def test_a_new_process_computes_the_same_logits_bit_for_bit(made, tmp_path: Path) -> None:
    root, models = made
    paths = [str(root / name) for name in models]
    done = subprocess.run([sys.executable, "-c", READ, tmp_path, *paths], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name, compressed in models.items():
        assert torch.equal(load_file(tmp_path / name)["logits"], logits(compressed.model)), name
        opened = unirank.open_compressed(root / name, device="cpu")
        assert torch.equal(logits(opened.model), logits(compressed.model)), name
        assert opened.quantized == compressed.quantized


def test_every_matrix_of_the_decoder_is_quantised_and_nothing_else(made) -> None:
    root, models = made
    for name, compressed in models.items():
        model, bits = compressed.model, int(name[-1])
        expected = set()
        for target, rank in compressed.plan.ranks.items():
            expected |= {target} if rank == "dense" else {f"{target}.left", f"{target}.right"}
        assert quantized_linears(model).keys() == expected
        before = unirank.open_compressed(root / name[:-2], device="cpu").model
        state, floats = model.state_dict(), before.state_dict()
        for key, tensor in floats.items():
            if not any(key == f"{linear}.weight" for linear in expected):
                assert torch.equal(state[key], tensor), key
        assert all(
            linear.bits == bits or (bits == 4 and linear.in_features % 16)
            for linear in quantized_linears(model).values()
        )
        assert {linear.bits for linear in quantized_linears(model).values()} == {8, bits}
        assert count_parameters(model) == count_parameters(before)
        assert (
            sum(count_target(model.get_submodule(target)) for target in compressed.plan.ranks) == compressed.plan.used
        )


def test_files_hold_the_numbers_and_scales_of_torchao(made) -> None:
    """Read without unirank: `number * scale` is within half a step of the weight, and the numbers are torchao's own."""
    (root, _), seen_groups = made, False
    for name, (*_, dtype) in CASES.items():
        pivoted = unirank.open_compressed(root / name, device="cpu").plan.form == "pivoted"
        floats = load_file(root / name / "model.safetensors")
        for bits in (8, 4):
            stored = load_file(root / f"{name}-{bits}" / "model.safetensors")
            names = [key.removesuffix(".quantized") for key in stored if key.endswith(".quantized")]
            assert len(names) > 15
            for key in names:
                numbers, scale = stored[f"{key}.quantized"], stored[f"{key}.scale"]
                own = 8 if numbers.dtype == torch.int8 else 4
                assert stored[f"{key}.weight"].tolist() == [own]
                assert scale.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
                weight = floats[f"{key}.weight"].float()
                if name == "conv1d" and not key.endswith((".left", ".right")):
                    weight = weight.T  # GPT-2 stores the transpose
                if own == 4:
                    low, high = numbers & 15, numbers >> 4
                    numbers = torch.stack((low, high), -1).flatten(1).int() - 8
                    assert weight.shape[1] % scale.shape[1] == 0
                else:
                    assert scale.shape[1] == 1 or (pivoted and weight.shape[1] // scale.shape[1] in (16, 32))
                    seen_groups |= scale.shape[1] > 1
                assert numbers.shape == weight.shape
                steps = scale.float().repeat_interleave(weight.shape[1] // scale.shape[1], 1)
                if key.endswith(".left"):
                    continue  # fitted to the other one before
                # A scale is what the largest weight asks for, rounded to 16 bits, so the largest is a little beyond.
                slack = 0.51 if own == 8 and dtype != torch.bfloat16 else 1.01
                assert (numbers * steps - weight).abs().le(slack * steps + 1e-12).all(), key
    assert seen_groups


@pytest.mark.parametrize("bits", [8, 4])
def test_a_linear_is_what_torchao_makes_of_it(bits: Any) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 40)
    x = torch.randn(3, 5, 64)
    own = quantized_of(linear, bits, 32 if bits == 4 else None)
    config: Any = Int8WeightOnlyConfig() if bits == 8 else IntxWeightOnlyConfig(torch.int4, PerGroup(32))
    quantize_(linear, config)
    weight: Any = linear.weight
    numbers = own.quantized if bits == 8 else unpack(own.quantized, 64)
    assert torch.equal(numbers, weight.qdata)
    assert torch.equal(own.scale, weight.scale)
    with torch.no_grad():
        assert torch.equal(own(x), linear(x))
        assert torch.equal(own.dense_weight(torch.float32), weight.dequantize())


@torch.no_grad()
def test_left_is_fitted_to_right_as_it_was_stored(made) -> None:
    """So the products are nearer to those of the floats than if both were quantised by themselves."""
    root, models = made
    for name in ("llama", "conv1d"):
        fitted, alone, count = 0.0, 0.0, 0
        for path, module in unirank.open_compressed(root / name, device="cpu").model.named_modules():
            if isinstance(module, LowRankLinear) and module.rank > 1:
                wanted = module.dense_weight()
                low: Any = models[f"{name}-8"].model.get_submodule(path)
                fitted += float((low.dense_weight() - wanted).square().sum())
                left, right = (quantized_of(inner, 8, None) for inner in (module.left, module.right))
                module.put_quantized(left, right)
                alone += float((module.dense_weight() - wanted).square().sum())
                count += 1
        assert count > 5
        assert fitted < 0.92 * alone, (name, fitted / alone)


@torch.no_grad()
def test_groups_with_8_bits_are_nearer_than_rows(made, tmp_path: Path) -> None:
    root, models = made
    grouped = unirank.quantize(root / "llama", 8, group_size=16, device="cpu")
    linears = quantized_linears(grouped.model)
    assert {linear.scale.shape[1] for linear in linears.values()} == {1, 2, 4}  # of rows of 16 and odd ones, of 32, 64
    grouped.save(tmp_path / "grouped")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "grouped", dtype="auto")
    assert torch.equal(logits(opened), logits(grouped.model))
    assert "8 bits, one scale for up to 16 weights" in (tmp_path / "grouped" / "README.md").read_text()
    floats = unirank.open_compressed(root / "llama", device="cpu").model
    for name, linear in linears.items():
        if linear.scale.shape[1] > 1:
            rows: Any = models["llama-8"].model.get_submodule(name)
            weight: Any = floats.get_submodule(name).weight
            grouped_error, error = ((one.dense_weight(torch.float32) - weight).norm() for one in (linear, rows))
            assert grouped_error < error


def test_outputs_stay_near_those_of_the_floats(made) -> None:
    root, models = made
    for name, compressed in models.items():
        floats = logits(unirank.open_compressed(root / name[:-2], device="cpu").model).float()
        error = (logits(compressed.model).float() - floats).norm() / floats.norm()
        assert error < (0.04 if name.endswith("8") else 0.5), (name, error)


def test_float16_does_not_overflow_where_the_sum_of_whole_numbers_would() -> None:
    linear = nn.Linear(256, 8, dtype=torch.float16)
    with torch.no_grad():
        linear.weight.fill_(0.01)
    x = torch.full((1, 256), 30.0, dtype=torch.float16)  # 30 * 127 * 256 is far beyond the range, 76.8 is not
    with torch.no_grad():
        for bits in (8, 4):
            torch.testing.assert_close(quantized_of(linear, bits, None)(x), linear(x), rtol=0.08, atol=0.0)


def test_saved_again_by_anyone_it_is_the_same(made, tmp_path: Path) -> None:
    root, models = made
    for name in models:
        unirank.open_compressed(root / name, device="cpu").save(tmp_path / name)
        ours, theirs = (load_file(folder / name / "model.safetensors") for folder in (root, tmp_path))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
        assert (tmp_path / name / "config.json").read_text() == (root / name / "config.json").read_text()
    for name in ("llama-4", "afm-8"):
        model = AutoModelForCausalLM.from_pretrained(root / name, dtype="auto")
        model.save_pretrained(tmp_path / "theirs")
        assert torch.equal(
            logits(AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype="auto")), logits(model)
        )
        record = read_record(root / name)
        models[name].tokenizer.save_pretrained(tmp_path / "theirs")
        again = read_record(tmp_path / "theirs")
        assert (again.quantized, again.report) == (record.quantized, record.report)
        assert dict(again.plan.ranks) == dict(record.plan.ranks)
        shutil.rmtree(tmp_path / "theirs")


def test_the_same_bytes_for_any_number_of_threads(made, tmp_path: Path) -> None:
    root, models = made
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            made_now = unirank.quantize(root / "afm", 4, device="cpu")
            theirs = models["afm-4"].model.state_dict()
            assert all(torch.equal(tensor, theirs[key]) for key, tensor in made_now.model.state_dict().items())
    finally:
        torch.set_num_threads(before)


def test_card_config_and_records_say_bits_and_bytes(made) -> None:
    root, models = made
    card = (root / "llama-8" / "README.md").read_text()
    report = models["llama-8"].quantized
    assert report.bytes_after == stored_bytes(models["llama-8"].model) < report.bytes_before
    before = unirank.open_compressed(root / "llama", device="cpu").model
    assert abs(report.bytes_before - stored_bytes(before)) <= 8 * report.matrices  # the guards
    assert f"| quantised | 8 bits, one scale a row (torchao); {report.bytes_before:,} to " in card
    four = models["llama-4"].quantized
    assert four.bytes_after < report.bytes_after
    assert (
        f"({four.of_8_bits} of {four.matrices} matrices, which have 8 bits)"
        in (root / "llama-4" / "README.md").read_text()
    )
    told = json.loads((root / "llama-4" / "config.json").read_text())["quantization_config"]
    assert (told["bits"], told["group_size"], len(told["whole"])) == (4, 128, four.matrices - 2 * len(told["ranks"]))
    plain = json.loads((root / "llama" / "config.json").read_text())["quantization_config"]
    assert plain.keys() == {"quant_method", "ranks"}
    sizes = [(root / f"llama{end}" / "model.safetensors").stat().st_size for end in ("", "-8", "-4")]
    assert sizes == sorted(sizes, reverse=True)


def test_it_is_evaluated_and_opens_as_body_and_under_other_heads(made, text_file: Path) -> None:
    root, models = made
    report = unirank.evaluate(
        models["llama-8"].model, models["llama-8"].tokenizer, text=str(text_file), window=32, limit=4
    )
    before = unirank.open_compressed(root / "llama", device="cpu")
    floats = unirank.evaluate(before.model, before.tokenizer, text=str(text_file), window=32, limit=4)
    assert abs(report.perplexity / floats.perplexity - 1) < 0.05
    assert report.parameters == floats.parameters
    body = AutoModel.from_pretrained(root / "llama-8", dtype="auto")
    whole: Any = models["llama-8"].model
    assert torch.equal(body(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)
    headed = AutoModelForSequenceClassification.from_pretrained(root / "llama-8", dtype="auto")
    assert quantized_linears(headed).keys() == quantized_linears(whole).keys()


def test_densify_makes_floats_of_it(made) -> None:
    root, models = made
    for name in models:
        model = unirank.open_compressed(root / name, device="cpu").model
        wanted = logits(model).float()
        dense = unirank.densify(model)
        assert not quantized_linears(dense)
        assert not any(isinstance(module, LowRankLinear) for module in dense.modules())
        error = (logits(dense).float() - wanted).norm() / wanted.norm()
        assert error < (1e-4 if dense.dtype == torch.float32 else 0.05), (name, error)


def test_casts_compile_and_another_dtype_at_loading(made) -> None:
    root, models = made
    for name in ("llama-8", "llama-4"):
        model = AutoModelForCausalLM.from_pretrained(root / name, dtype="auto")
        wanted = logits(model)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.allclose(logits(compiled), wanted, atol=1e-5)
        half = logits(model.to(torch.bfloat16))
        assert half.dtype == torch.bfloat16
        assert (half.float() - wanted).norm() < 0.05 * wanted.norm()
    wide = AutoModelForCausalLM.from_pretrained(root / "afm-8", dtype=torch.float32)
    assert {linear.scale.dtype for linear in quantized_linears(wide).values()} == {torch.float32}
    wanted = logits(models["afm-8"].model).float()
    assert (logits(wide) - wanted).norm() < 0.05 * wanted.norm()


REFUSED: dict[str, tuple[Callable[[Path, CompressedModel, Path], object], str]] = {
    "twice": (lambda path, model, work: unirank.quantize(path, 4), "is quantised and cannot be quantised again"),
    "other bits": (lambda path, model, work: unirank.quantize(path, 6), r"bits = 6 is not legal; legal values: 8, 4"),
    "other groups": (lambda path, model, work: unirank.quantize(path, group_size=48), "group_size = 48 is not legal"),
    "streamed": (
        lambda path, model, work: unirank.open_compressed(path, stream=True),
        "is quantised and is read as a whole; leave stream=True out",
    ),
    "fused": (lambda path, model, work: unirank.fuse(model.model), "is quantised and cannot be fused"),
    "tuned": (
        lambda path, model, work: unirank.finetune(path, "no text", work=work),
        "quantised and cannot be trained",
    ),
    "healed": (lambda path, model, work: unirank.heal(path, work=work), "quantised and cannot be trained"),
    "compressed": (lambda path, model, work: unirank.load(path), "is compressed already"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused(case: str, made, tmp_path: Path) -> None:
    root, _ = made
    call, match = REFUSED[case]
    model = unirank.open_compressed(root / "llama-8", device="cpu")
    with pytest.raises(InputError, match=match):
        call(root / "llama-8", model, tmp_path / "work")
    assert not list(tmp_path.iterdir())


def test_a_dense_and_a_streamed_model_are_refused(made) -> None:
    root, _ = made
    dense = unirank.open_compressed(root / "llama", device="cpu")
    unirank.densify(dense.model)
    with pytest.raises(InputError, match="no low-rank layers; quantise a dense model with torchao itself"):
        unirank.quantize(dense)
    with pytest.raises(InputError, match="opened with stream=True cannot be quantised"):
        unirank.quantize(unirank.open_compressed(root / "llama", device="cpu", stream=True))


def test_without_torchao_the_extra_is_named(made, monkeypatch: pytest.MonkeyPatch) -> None:
    root, _ = made
    monkeypatch.delitem(sys.modules, "torchao.quantization")
    monkeypatch.setitem(sys.modules, "torchao", None)
    for call in (
        lambda: unirank.quantize(root / "llama"),
        lambda: unirank.open_compressed(root / "llama-8"),
        lambda: AutoModelForCausalLM.from_pretrained(root / "llama-8"),
    ):
        with pytest.raises(InputError, match=r"need torchao; install the extra: pip install 'unirank\[quantize\]'"):
            call()


def harmed(root: Path, name: str, place: Path, **config: Any) -> Path:
    """A copy of a checkpoint without the record of its checksums."""
    shutil.copytree(root / name, place)
    (place / "provenance.json").unlink()
    told = json.loads((place / "config.json").read_text())
    told["quantization_config"] |= config
    (place / "config.json").write_text(json.dumps(told))
    return place


def test_weights_that_are_missing_or_of_other_bits_never_load(made, tmp_path: Path) -> None:
    """Nor does a version of unirank read them that knows no bits: the same as a configuration that names none."""
    root, _ = made
    place = harmed(root, "llama-8", tmp_path / "old")
    told = json.loads((place / "config.json").read_text())
    for key in ("bits", "whole"):
        del told["quantization_config"][key]
    (place / "config.json").write_text(json.dumps(told))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(place)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(harmed(root, "llama-8", tmp_path / "four", bits=4))
    for config, match in (
        ({"bits": 5}, r"quantization_config\.bits = 5 is not legal"),
        ({"group_size": 48}, r"quantization_config\.group_size = 48 is not legal"),
        ({"whole": ["model.layers.0.self_attn.q_proj"]}, r"quantization_config\.whole must be a list"),
        ({"whole": ["model.layers.0.nothing"]}, r"no linear model\.layers\.0\.nothing"),
        ({"whole": ["model.norm"]}, r"not a linear, so it cannot be quantised"),
    ):
        place = harmed(root, "llama-8", tmp_path / "config", **config)
        with pytest.raises(InputError, match=match):
            AutoModelForCausalLM.from_pretrained(place)
        shutil.rmtree(place)
    place = harmed(root, "llama-8", tmp_path / "missing")
    tensors = load_file(place / "model.safetensors")
    gone = next(key.removesuffix(".quantized") for key in tensors if key.endswith(".left.quantized"))
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(f"{gone}.")}
    save_file(kept, place / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"found no weights of 8 bits for {gone}"):
        AutoModelForCausalLM.from_pretrained(place)
    with pytest.raises(InputError, match=r"lacks the weights|found no weights"):
        unirank.open_compressed(place, device="cpu")


@pytest.mark.parametrize(
    "record",
    [{"bits": 5}, {"bits": 8, "group_size": 48}, {"matrices": -1}, {"bytes_after": "many"}, {"of_8_bits": None}, 3],
)
def test_a_record_that_is_damaged_is_said_to_be(record: Any, made, tmp_path: Path) -> None:
    root, _ = made
    shutil.copytree(root / "llama-8", tmp_path / "damaged")
    file = tmp_path / "damaged" / "provenance.json"
    known = json.loads(file.read_text())
    known["quantized"] = known["quantized"] | record if isinstance(record, dict) else record
    file.write_text(json.dumps(known))
    with pytest.raises(InputError, match=r"provenance\.json is missing or damaged"):
        read_record(tmp_path / "damaged")


def test_a_fused_model_is_quantised_and_forgets_that_it_was_fused(made) -> None:
    root, models = made
    opened = unirank.open_compressed(root / "llama", device="cpu")
    unirank.fuse(opened.model)
    opened = dataclasses.replace(opened, evaluations=({"report": {}},))
    quantised = unirank.quantize(opened)
    assert quantised.model is opened.model
    assert quantised.evaluations == ()
    assert torch.equal(logits(quantised.model), logits(models["llama-8"].model))


@pytest.mark.smollm2
def test_smollm2_with_8_bits_is_as_good_within_1_percent(smollm2: str) -> None:
    """Two of its linears low-rank by their SVD, the other 208 as they are; all of them quantised."""
    loaded = unirank.load(smollm2, device="cpu")
    ranks: dict[str, Any] = {spec.name: "dense" for spec in loaded.linears}
    for spec in loaded.linears:
        if spec.layer == 7 and spec.kind in ("self_attn.q_proj", "mlp.up_proj"):
            ranks[spec.name] = 384
    compressed = truncated(loaded, ranks)
    tokens: dict[str, Any] = {"window": 256, "limit": 4}
    before = unirank.evaluate(compressed.model, compressed.tokenizer, **tokens)
    quantised = unirank.quantize(compressed)
    report = quantised.quantized
    assert report is not None
    assert report.bytes_after < 0.52 * report.bytes_before
    after = unirank.evaluate(quantised.model, quantised.tokenizer, **tokens)
    assert abs(after.perplexity / before.perplexity - 1) < 0.01
    assert after.parameters == before.parameters


def truncated(loaded: unirank.LoadedModel, ranks: dict[str, Any]) -> CompressedModel:
    """The model with the truncated SVD of its weights in the place of those that have a rank."""
    from unirank.models.low_rank import make_low_rank
    from unirank.models.structure import weight_of

    before = count_parameters(loaded.model)
    for name, rank in ranks.items():
        if rank != "dense":
            left, sigma, right = torch.linalg.svd(
                weight_of(loaded.model.get_submodule(name)).detach(), full_matrices=False
            )
            make_low_rank(loaded.model, name, rank).set_product(left[:, :rank] * sigma[:rank], right[:rank])
    used = sum(spec.rank_cost(ranks[spec.name]) for spec in loaded.linears)
    total = sum(spec.params for spec in loaded.linears)
    shapes = {spec.name: (spec.m, spec.n) for spec in loaded.linears}
    plan = unirank.RankPlan(ranks, shapes, 1 - used / total, used, used, None, "none", "svd")
    low = sum(rank != "dense" for rank in ranks.values())
    report = unirank.TruncateReport(total, used, before, count_parameters(loaded.model), low, len(ranks) - low)
    return CompressedModel(loaded.model, loaded.tokenizer, plan, report, None, loaded.source)
