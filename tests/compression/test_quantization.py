"""`unirank.quantize`: by torchao, saved as plain tensors, loaded again bit for bit, refused where it makes no sense."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import unirank
from tests.support.quantised import CASES, IDS, logits, truncated
from unirank import LowRankLinear
from unirank.compression.checkpoint import read_record
from unirank.models.bits import unpack
from unirank.models.low_rank import count_parameters, count_target
from unirank.models.quantizing import quantized_linears, quantized_of, stored_bytes

READ = """
import sys, torch, unirank
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
for path in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    with torch.no_grad():
        save_file({"logits": model(torch.arange(2, 22)[None]).logits}, sys.argv[1] + "/" + path.split("/")[-1])
"""


def test_a_new_process_computes_the_same_logits_bit_for_bit(quantised_checkpoints, tmp_path: Path) -> None:
    root, models = quantised_checkpoints
    paths = [str(root / name) for name in models]
    done = subprocess.run([sys.executable, "-c", READ, tmp_path, *paths], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name, compressed in models.items():
        assert torch.equal(load_file(tmp_path / name)["logits"], logits(compressed.model)), name
        opened = unirank.open_compressed(root / name, device="cpu")
        assert torch.equal(logits(opened.model), logits(compressed.model)), name
        assert opened.quantized == compressed.quantized


def test_every_matrix_of_the_decoder_is_quantised_and_nothing_else(quantised_checkpoints) -> None:
    root, models = quantised_checkpoints
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


def test_files_hold_the_numbers_and_scales_of_torchao(quantised_checkpoints) -> None:
    """Read without unirank: `number * scale` is within half a step of the weight, and the numbers are torchao's own."""
    (root, _), seen_groups = quantised_checkpoints, False
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
def test_left_is_fitted_to_right_as_it_was_stored(quantised_checkpoints) -> None:
    """So the products are nearer to those of the floats than if both were quantised by themselves."""
    root, models = quantised_checkpoints
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
def test_groups_with_8_bits_are_nearer_than_rows(quantised_checkpoints, tmp_path: Path) -> None:
    root, models = quantised_checkpoints
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


def test_outputs_stay_near_those_of_the_floats(quantised_checkpoints) -> None:
    root, models = quantised_checkpoints
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


def test_saved_again_by_anyone_it_is_the_same(quantised_checkpoints, tmp_path: Path) -> None:
    root, models = quantised_checkpoints
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


def test_the_same_bytes_for_any_number_of_threads(quantised_checkpoints, tmp_path: Path) -> None:
    root, models = quantised_checkpoints
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            made_now = unirank.quantize(root / "afm", 4, device="cpu")
            theirs = models["afm-4"].model.state_dict()
            assert all(torch.equal(tensor, theirs[key]) for key, tensor in made_now.model.state_dict().items())
    finally:
        torch.set_num_threads(before)


def test_card_config_and_records_say_bits_and_bytes(quantised_checkpoints) -> None:
    root, models = quantised_checkpoints
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


def test_it_is_evaluated_and_opens_as_body_and_under_other_heads(quantised_checkpoints, text_file: Path) -> None:
    root, models = quantised_checkpoints
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


def test_densify_makes_floats_of_it(quantised_checkpoints) -> None:
    root, models = quantised_checkpoints
    for name in models:
        model = unirank.open_compressed(root / name, device="cpu").model
        wanted = logits(model).float()
        dense = unirank.densify(model)
        assert not quantized_linears(dense)
        assert not any(isinstance(module, LowRankLinear) for module in dense.modules())
        error = (logits(dense).float() - wanted).norm() / wanted.norm()
        assert error < (1e-4 if dense.dtype == torch.float32 else 0.05), (name, error)


def test_casts_compile_and_another_dtype_at_loading(quantised_checkpoints) -> None:
    root, models = quantised_checkpoints
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
