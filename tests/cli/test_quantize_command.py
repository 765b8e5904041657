"""`unirank quantize`: the command, what reads its checkpoint, and what refuses it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import unirank
from tests.support.command_line import Run

IDS = torch.arange(2, 22)[None]


@pytest.fixture
def small(model_dir: Path, calibration: unirank.Calibration, tmp_path: Path) -> Path:
    """A tiny Llama, 40 % removed."""
    return unirank.compress(model_dir, 0.4, calibration=calibration, device="cpu").save(tmp_path / "small")


def test_it_quantises_and_every_command_reads_the_result(
    run_unirank: Run, small: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "small-8"
    code, said, err = run_unirank("quantize", small, "-o", out, "--device", "cpu")
    assert (code, err) == (0, "")
    assert "8 bits, one scale a row (torchao)" in " ".join(said.split())
    assert "from_pretrained" in said
    data = ["--text", text_file, "--window", 32, "--limit", 4, "--device", "cpu"]
    code, said, err = run_unirank("eval", out, "--against", small, *data, "--card", "--json")
    assert (code, err) == (0, "")
    floats, quantised = (row["perplexity"] for row in json.loads(said)["rows"])
    assert abs(quantised / floats - 1) < 0.05
    card = (out / "README.md").read_text()
    assert "| quantised | 8 bits" in card
    assert "| perplexity on |" in card
    assert run_unirank("report", out, "-o", tmp_path / "page.html")[::2] == (0, "")
    assert "8 bits, one scale a row" in (tmp_path / "page.html").read_text()
    assert run_unirank("densify", out, "-o", tmp_path / "plain", "--device", "cpu")[::2] == (0, "")
    plain, quantised = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "plain", out))
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS).logits, quantised(IDS).logits, rtol=1e-4, atol=1e-4)


def test_4_bits_in_json(run_unirank: Run, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "small-4"
    code, said, err = run_unirank("quantize", small, "-o", out, "--bits", 4, "--group-size", 16, "--json")
    assert (code, err) == (0, "")
    record = json.loads(said)
    assert record["out"] == str(out)
    assert (record["quantized"]["bits"], record["quantized"]["group_size"]) == (4, 16)
    assert record["quantized"]["bytes_after"] < 0.6 * record["quantized"]["bytes_before"]


def test_what_is_refused(run_unirank: Run, small: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "small-8"
    assert run_unirank("quantize", small, "-o", out, "--device", "cpu")[0] == 0
    other, tuning = tmp_path / "other", ["--text", text_file, "--device", "cpu"]
    for arguments, sentence in (
        (["quantize", small, "-o", other, "--bits", 2], "bits = 2 is not legal; legal values: 8, 4."),
        (["quantize", small, "-o", other, "--group-size", 8], "group_size = 8 is not legal; legal values: 128"),
        (["quantize", small, "-o", out], "pass --overwrite"),
        (["quantize", small, "-o", small, "--overwrite"], "is the checkpoint that is quantised; choose another"),
        (["quantize", out, "-o", other, "--bits", 4], "quantised and cannot be quantised again"),
        (["finetune", out, "-o", other, *tuning], "quantised and cannot be trained"),
        (["heal", out, "-o", other, "--device", "cpu"], "quantised and cannot be trained"),
        (["heal", out, "-o", other, "--stream", "--device", "cpu"], "read as a whole; leave --stream out"),
    ):
        code, _, err = run_unirank(*arguments)
        assert code == 2, err
        assert sentence in " ".join(err.split()), err
        assert not other.exists()
