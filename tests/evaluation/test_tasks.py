"""Tasks of lm-eval on dense and compressed models, without a network."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import unirank
from tests.support.tiny import build
from unirank import InputError, NonFiniteError, Tasks, run_tasks
from unirank.cli.main import main

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "data" / "tasks"
TASK = "unirank_next_word"
LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """lm-eval, reading the task's documents from the repository; without it skips, or fails under its REQUIRE."""
    if find_spec("lm_eval") is None:
        if os.environ.get("UNIRANK_REQUIRE_LM_EVAL") == "1":
            pytest.fail("UNIRANK_REQUIRE_LM_EVAL=1, but lm-eval is not installed")
        pytest.skip("lm-eval is not installed")
    import datasets

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def documents() -> list[dict]:
    return [json.loads(line) for line in (FOLDER / "next_word.jsonl").read_text().splitlines()]


@torch.no_grad()
def likelihoods(model, tokenizer, document: dict) -> list[float]:
    """Of each choice after the start, computed here and not by lm-eval."""
    found = []
    for choice in document["choices"]:
        ids = tokenizer(f"{document['start']} {choice}", return_tensors="pt")["input_ids"]
        found.append(float(model(input_ids=ids).logits[0, -2].log_softmax(-1)[ids[0, -1]]))
    return found


def test_the_task_names_a_file_of_the_repository() -> None:
    """Also where lm-eval is not installed, and every other test here is skipped."""
    named = re.findall(r"\S+\.jsonl", (FOLDER / "next_word.yaml").read_text())
    assert [ROOT / name for name in named] == [FOLDER / "next_word.jsonl"]
    assert (FOLDER / "next_word.jsonl").is_file()


def test_accuracy_is_that_of_likelihoods_computed_here(lm_eval, tokenizer, documents) -> None:
    model = build("llama")
    right = [
        likelihood.index(max(likelihood)) == document["answer"]
        for document in documents
        for likelihood in [likelihoods(model, tokenizer, document)]
    ]
    report = run_tasks(model, tokenizer, Tasks([TASK], include=FOLDER))
    accuracy = report.results[0]
    assert (accuracy.task, accuracy.metric, accuracy.filter) == (TASK, "acc", "none")
    assert accuracy.value == pytest.approx(sum(right) / len(right))
    assert 0 < sum(right) < len(right)
    assert accuracy.n == len(documents) == 12
    # Of a mean of n zeros and ones, with n - 1.
    assert accuracy.stderr == pytest.approx(math.sqrt(accuracy.value * (1 - accuracy.value) / 11))
    assert (accuracy.fewshot, accuracy.task_version) == (0, "1")


def test_limit_fewshot_and_seeds(lm_eval, tokenizer) -> None:
    model, seen = build("llama"), []
    tasks = Tasks([TASK], include=FOLDER)
    options = {"fewshot": 2, "limit": 5}
    first = run_tasks(model, tokenizer, tasks, **options, progress=lambda *step: seen.append(step))
    assert [(r.n, r.fewshot) for r in first.results] == [(5, 2), (5, 2)]
    assert first == run_tasks(model, tokenizer, tasks, **options)
    assert first.limit == 5
    assert ("running loglikelihood requests", 20, 20) in seen


def test_the_terminal_is_left_alone(lm_eval, tokenizer, capfd) -> None:
    run_tasks(build("llama"), tokenizer, Tasks([TASK], include=FOLDER), limit=3, fewshot=1)
    assert capfd.readouterr() == ("", "")


def test_an_unknown_task_is_refused_with_what_is_near(lm_eval) -> None:
    with pytest.raises(InputError, match=f"'unirank_next_wrod' does not exist in lm-eval .*{TASK}"):
        Tasks(["unirank_next_wrod"], include=FOLDER)


@pytest.mark.parametrize(("names", "include", "words"), [([], FOLDER, "No task"), (["x"], "none", "does not exist")])
def test_bad_requests_are_refused(names, include, words: str, lm_eval) -> None:
    with pytest.raises(InputError, match=words):
        Tasks(names, include=include)


@pytest.mark.parametrize("wrong", [{"fewshot": -1}, {"limit": 0}, {"batch": 0}])
def test_bad_numbers_are_refused(wrong: dict[str, int]) -> None:
    (name,) = wrong
    with pytest.raises(InputError, match=f"{name} = "):
        run_tasks(None, None, [TASK], **wrong)  # type: ignore[arg-type]


def test_documents_that_cannot_be_read_are_one_sentence(lm_eval, tokenizer, tmp_path) -> None:
    text = (FOLDER / "next_word.yaml").read_text()
    (tmp_path / "gone.yaml").write_text(text.replace(TASK, "gone").replace("next_word.jsonl", "gone.jsonl"))
    with pytest.raises(InputError, match=r"documents of the task 'gone' cannot be read"):
        run_tasks(build("llama"), tokenizer, Tasks(["gone"], include=tmp_path))


def test_a_damaged_model_stops_with_the_task(lm_eval, tokenizer) -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match=TASK):
        run_tasks(model, tokenizer, Tasks([TASK], include=FOLDER))


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unirank.evaluation.tasks.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install 'unirank\[eval\]'"):
        Tasks([TASK])


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`command(*arguments) -> (exit code, stdout, stderr)` of `unirank eval`."""
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["unirank", "eval", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), *capsys.readouterr()

    return run


def test_the_command_puts_dense_and_compressed_side_by_side(
    lm_eval, command, model_dir: Path, calibration, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    unirank.compress(model_dir, 0.5, calibration=calibration, device="cpu").save(small)
    options = ["--tasks", TASK, "--include-path", FOLDER, "--against", model_dir, "--device", "cpu"]
    code, out, err = command(small, *options, "--json")
    assert (code, err) == (0, "")
    dense, compressed = json.loads(out)["rows"]
    assert (dense["model"], compressed["model"]) == (str(model_dir), str(small))
    assert dense["lm_eval"] == compressed["lm_eval"]
    network, tokenizer = unirank.models.loading.load_pretrained(str(small), device="cpu")
    again = run_tasks(network, tokenizer, Tasks([TASK], include=FOLDER))
    assert [r["value"] for r in compressed["results"]] == [r.value for r in again.results]

    code, out, err = command(small, *options)
    assert (code, err) == (0, "")
    assert "acc_norm" in out
    assert "±" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--fewshot", 1], "--fewshot needs --tasks"),
        (["--batch", 1], "--batch needs --tasks"),
        (["--tasks", TASK, "--window", 8], "--window is of perplexity"),
        (["--tasks", TASK, "--prompt", "a"], "--prompt is of perplexity"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options, words: str, command, model_dir: Path) -> None:
    code, out, err = command(model_dir, *options)
    assert (code, out) == (2, "")
    assert words in err


@pytest.fixture
def compressed(make_model, calibration, tmp_path: Path) -> Path:
    return unirank.compress(make_model(), 0.4, calibration=calibration).save(tmp_path / "small")


def run_program(tmp_path: Path, *command: object) -> str:
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "datasets"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_lm_eval_itself_reads_a_compressed_checkpoint(lm_eval, compressed: Path, tmp_path: Path) -> None:
    ours = run_tasks(
        *unirank.models.loading.load_pretrained(str(compressed), device="cpu"), Tasks([TASK], include=FOLDER)
    )
    harness = ["lm_eval", "--model", "hf", "--model_args", f"pretrained={compressed},dtype=float32", "--tasks", TASK]
    harness += ["--include_path", FOLDER, "--device", "cpu", "--output_path", tmp_path / "result.json"]
    run_program(tmp_path, "-m", "unirank.run", *harness)
    (file,) = tmp_path.glob("**/result*.json")
    result = json.loads(file.read_text())["results"][TASK]
    assert result["acc,none"] == ours.results[0].value
    assert result["acc,none"] > 0


def test_the_ecosystem_script(lm_eval, compressed: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    command = ["examples/ecosystem.py", compressed, "--text", text_file, "--save", out, "--task", TASK]
    printed = run_program(tmp_path, *command, "--include-path", FOLDER, "--steps", 2, "--window", 24)
    for word in ("loaded: LlamaForCausalLM", "generated:", "evaluated: {'acc", "tuned:", "the same logits: {'acc"):
        assert word in printed
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    again = AutoModelForCausalLM.from_pretrained(out / "merged")
    assert isinstance(again.get_submodule(LAYER), unirank.LowRankLinear)
