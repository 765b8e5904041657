"""`unirank heal`: the command that refines a checkpoint, and what it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import unirank
from tests.support.command_line import Run
from tests.support.tiny import WORDS


@pytest.fixture
def command(model_dir: Path, text_file: Path, calibration: unirank.Calibration, tmp_path: Path) -> list[object]:
    """`heal` of a tiny Llama, 40 % removed."""
    unirank.compress(model_dir, 0.4, calibration=calibration, device="cpu").save(tmp_path / "small")
    data = ["--calib", text_file, "--windows", 20, "--window", 24, "--batch", 4, "--device", "cpu", "--lr", "3e-3"]
    return ["heal", tmp_path / "small", "--against", model_dir, *data]


@pytest.mark.slow
def test_it_heals_says_so_and_clears_its_layers_away(command, tmp_path: Path, run_unirank: Run) -> None:
    second = tmp_path / "second.txt"
    second.write_text(" ".join(WORDS[2 + i * i % 94] for i in range(1000)))
    before = sorted(path.name for path in tmp_path.iterdir())
    code, out, err = run_unirank(*command, "-o", tmp_path / "healed", "--text", second, "--passes", 2)
    assert (code, err) == (0, "")
    said = " ".join(out.split())
    assert "on 2 held-out windows of words.txt and as many of second.txt" in said
    assert "3 of 3 layers got better" in said
    assert "from_pretrained" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "healed"])
    code, _, err = run_unirank(*command, "-o", tmp_path / "healed")
    assert code == 2
    assert "pass --overwrite" in err
    kept = ["--overwrite", "--work", tmp_path / "work", "--json", "--stream", "--mix", 1, "--precision", "float32"]
    code, out, err = run_unirank(*command, "-o", tmp_path / "healed", *kept)
    assert (code, err) == (0, "")
    record = json.loads(out)
    assert record["training"]["settings"]["mix"] == 1.0
    assert record["seconds"] > 0
    assert (tmp_path / "work" / "layer-00002.safetensors").is_file()
    assert record["training"]["distilled"] is None
    code, out, err = run_unirank(*command, "-o", tmp_path / "more", "--passes", 1, "--distill-steps", 4)
    assert (code, err) == (0, "")
    assert "Distillation of the whole model: divergence from the dense model on held-out windows" in " ".join(
        out.split()
    )
    # Streamed, it writes what the same run writes that has the whole model in memory.
    code, _, err = run_unirank(*command, "-o", tmp_path / "whole", "--mix", 1)
    assert (code, err) == (0, "")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("healed", "whole"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--mix", "2"], "mix = 2.0 is not legal; it must be at least 0 and at most 1"),
        (["--windows", "1"], "--windows = 1 is not legal here: the text words.txt gives 1"),
        (["--against", "nowhere"], "The dense model cannot be loaded; name it with --against:"),
        (["--calib", "nowhere.txt"], "'nowhere.txt' is not a file"),
        (["--stream", "--distill-steps", "4"], "--distill-steps needs the whole model in memory"),
        (["-o", "small"], "is the checkpoint that is healed; choose another"),
    ],
)
def test_it_refuses_in_the_words_of_the_command_line(
    changes: list[str], words: str, command, tmp_path: Path, run_unirank: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    code, _, err = run_unirank(*command, "-o", tmp_path / "healed", "--overwrite", *changes)
    assert code == 2
    assert words in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before
