"""The model card says what was measured, where a person and the hub read it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import unirank
from tests.support.command_line import Run
from unirank.compression.card import EVALUATIONS_FILE
from unirank.compression.checkpoint import add_evaluation, read_record
from unirank.evaluation.perplexity import EvalReport
from unirank.report.gather import gather
from unirank.report.page import page

REPORT = EvalReport(42.123456, 3.74, 'some "text".txt', "ab", 24, 3, 69, True, "float32", 1000)


@pytest.fixture
def small(make_model, calibration: unirank.Calibration, tmp_path: Path) -> Path:
    return unirank.compress(make_model(), 0.4, calibration=calibration).save(tmp_path / "small")


def test_a_perplexity_reaches_the_card_the_hub_and_the_report(small: Path, tmp_path: Path) -> None:
    before = (small / "README.md").read_text()
    assert "perplexity" not in before
    add_evaluation(small, REPORT, dense=dataclasses.replace(REPORT, perplexity=29.18))
    card = ModelCard.load(small / "README.md")
    assert '| `some "text".txt` | 3 of 24 tokens, each behind a BOS, float32 | 29.18 | 42.12 |' in card.text
    data: Any = card.data
    (result,) = data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ('some "text".txt', "perplexity", 42.1235)
    html = page(gather(small, None, None))
    assert "perplexity on some &quot;text&quot;.txt" in html
    assert "42.12 (dense 29.18), 3 windows of 24 tokens" in html
    # It stays with the weights that it is of.
    again = unirank.open_compressed(small, device="cpu").save(tmp_path / "again")
    assert (again / "README.md").read_bytes() == (small / "README.md").read_bytes()
    assert (again / EVALUATIONS_FILE).read_bytes() == (small / EVALUATIONS_FILE).read_bytes()


def test_the_same_windows_are_measured_once_and_others_added(small: Path) -> None:
    add_evaluation(small, REPORT)
    add_evaluation(small, dataclasses.replace(REPORT, perplexity=41.0))
    add_evaluation(small, dataclasses.replace(REPORT, text="other.txt", text_sha256="cd", bos=False))
    lines = [line for line in (small / "README.md").read_text().splitlines() if "measured |" in line]
    assert lines == [
        '| `some "text".txt` | 3 of 24 tokens, each behind a BOS, float32 | not measured | 41.00 |',
        "| `other.txt` | 3 of 24 tokens, float32 | not measured | 42.12 |",
    ]


def test_it_says_which_texts_calibrated_and_which_evaluated(small: Path, calibration: unirank.Calibration) -> None:
    def row(title: str) -> str:
        (line,) = [line for line in (small / "README.md").read_text().splitlines() if line.startswith(f"| {title} |")]
        return line

    assert "6 windows of 24 tokens of `words.txt`" in row("calibration")
    assert "none here; what it costs on your text is not known" in row("evaluation")
    add_evaluation(small, REPORT)
    assert 'on `some "text".txt`; what it costs on text of another kind is not known' in row("evaluation")
    model = unirank.open_compressed(small, device="cpu")
    add_evaluation(small, model.evaluate(calibration.text, window=24, limit=2))
    assert 'on `some "text".txt`; on `words.txt`, which calibrated too; what' in row("evaluation")


def test_the_command(run_unirank: Run, small: Path, model_dir: Path, text_file: Path) -> None:
    on = ["--text", text_file, "--window", 24, "--limit", 2, "--device", "cpu"]
    code, out, _ = run_unirank("eval", small, "--against", model_dir, *on, "--card", "--json")
    assert code == 0
    rows = json.loads(out)["rows"]
    (entry,) = read_record(small).evaluations
    assert entry["dense"] == rows[0]["perplexity"]
    assert entry["report"]["perplexity"] == rows[1]["perplexity"]
    code, _, err = run_unirank("eval", model_dir, *on, "--card")
    assert code == 2
    assert "is not a compressed checkpoint" in err
    code, _, err = run_unirank("eval", small, "--tasks", "x", "--card")
    assert "--card is of perplexity; leave out --tasks." in err


@pytest.mark.parametrize("content", ["{", "{}", '{"evaluations": [{"dense": 1}]}', '{"evaluations": [3]}'])
def test_a_damaged_file_is_named(small: Path, content: str) -> None:
    (small / EVALUATIONS_FILE).write_text(content)
    with pytest.raises(unirank.InputError, match=r"evaluations\.json is damaged"):
        read_record(small)


def test_settings_that_hold_a_value_a_linear_are_counted_and_not_listed(
    make_model, calibration, tmp_path: Path
) -> None:
    """Presets that measure keep a divergence of every linear in the plan: 210 of them for SmolLM2."""
    out = unirank.compress(make_model(), 0.4, preset="fast", calibration=calibration).save(tmp_path / "fast")
    plan = read_record(out).plan
    assert max(len(value) for value in plan.settings.values() if isinstance(value, dict)) == 21
    (line,) = [line for line in (out / "README.md").read_text().splitlines() if line.startswith("| settings |")]
    assert "= 21 values" in line
    assert "model.layers" not in line
    assert len(line) < 500
    assert "= 21 values" in page(gather(out, None, None))
