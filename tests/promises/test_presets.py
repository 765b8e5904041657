"""Every preset, from a dense model to a saved checkpoint, and what it says of itself on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import unirank
from tests.support.command_line import Run
from tests.support.tiny import build

IDS = torch.arange(2, 22)[None]


@pytest.fixture(scope="module")
def dense(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    build("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("name", unirank.presets())
def test_a_preset_from_the_command_line(
    name: str, dense: Path, tmp_path: Path, text_file: Path, run_unirank: Run
) -> None:
    asked = ("--calib", text_file, "--windows", "6", "--window", "16", "--batch", "2")
    out = tmp_path / "out"
    code, stdout, stderr = run_unirank("compress", dense, "-r", "0.4", "--preset", name, "-o", out, *asked)
    assert code == 0, stderr
    assert "form pivoted" in stdout if name != "unirank" else "form factors" in stdout
    opened = unirank.open_compressed(out)
    recipe = unirank.recipe(name)
    assert opened.plan.form == recipe.form
    assert opened.plan.used <= opened.plan.budget
    assert (opened.training is not None) == (recipe.heal is not None)
    assert not (tmp_path / "out-healing").exists()
    again = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits(again), logits(opened.model))
    if recipe.heal is not None:
        assert opened.training["kind"] == "heal"
        assert (opened.training["distilled"] is not None) == (recipe.heal.distill_steps > 0)


def test_a_preset_in_the_form_of_two_factors(dense: Path, tmp_path: Path, text_file: Path, run_unirank: Run) -> None:
    asked = ("--calib", text_file, "--windows", "6", "--window", "16", "--batch", "2", "--form", "factors")
    code, stdout, stderr = run_unirank("compress", dense, "-r", "0.4", "--preset", "fast", "-o", tmp_path / "a", *asked)
    assert code == 0, stderr
    assert "form factors" in stdout
    assert unirank.open_compressed(tmp_path / "a").plan.form == "factors"


def test_healing_leaves_a_model_in_memory_dense(tokenizer, text_file: Path) -> None:
    model = build("llama")
    before = logits(model)
    calibration = unirank.Calibration(text=str(text_file), windows=6, window=16, batch=2)
    asked = {"tokenizer": tokenizer, "calibration": calibration, "heal": unirank.Heal(passes=2)}
    plain = unirank.compress(model, 0.4, tokenizer=tokenizer, calibration=calibration, copy=True)
    healed = unirank.compress(model, 0.4, **asked)
    assert torch.equal(logits(model), before)
    assert healed.plan.ranks == plain.plan.ranks
    assert not torch.equal(logits(healed.model), logits(plain.model))
    layers = healed.training["layers"]
    assert sum(layer["after"] for layer in layers) < sum(layer["before"] for layer in layers)


def test_what_a_plan_of_a_preset_does_not_hold_is_said(
    dense: Path, tmp_path: Path, text_file: Path, run_unirank: Run
) -> None:
    asked = ("--calib", text_file, "--windows", "4", "--window", "16", "--batch", "2", "--gradients", "2")
    store = tmp_path / "store"
    code, _, stderr = run_unirank("analyze", dense, "-o", store, "--preset", "distilled", *asked)
    assert code == 0, stderr
    said = ("--remove", "0.4", "--preset", "distilled", "--against", dense, "--calib", text_file)
    code, stdout, stderr = run_unirank("plan", store, *said)
    assert code == 0, stderr
    assert "--refine 0.5" in stdout
    assert "unirank heal COMPRESSED -o OUT --distill-steps 200" in stdout


def test_healing_and_streaming_do_not_go_together_yet(dense: Path, text_file: Path) -> None:
    with pytest.raises(unirank.InputError, match="healing would run the whole model"):
        unirank.compress(str(dense), 0.4, heal=unirank.Heal(), stream=True, calibration=str(text_file))
