"""Fine-tuning keeps ranks, merges exactly, resumes to the same bits, and refuses what it cannot use."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import unirank
from tests.support.command_line import Run
from tests.support.tiny import WORDS, build
from unirank.compression.checkpoint import PLAN_FILE, PROVENANCE_FILE
from unirank.errors import InputError, NonFiniteError
from unirank.finetuning import loop
from unirank.finetuning.adapters import adapted, attach, merge
from unirank.models.low_rank import LowRankLinear
from unirank.text.training_windows import pack, read_corpus

pytestmark = pytest.mark.slow

QUICK = unirank.Finetune(steps=12, batch=4, window=24, lr=5e-3, rank=3, evaluate_every=3, held_out=0.1)
CHILD = """
import sys, warnings
import unirank
settings = unirank.Finetune(**{settings!r})
tuned = unirank.finetune({model!r}, {data!r}, settings, work={work!r}, device="cpu")
tuned.save({out!r})
"""


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words that count in steps of 7: a pattern that is learned quickly."""
    path = tmp_path_factory.mktemp("text") / "counting.txt"
    path.write_text(" ".join(WORDS[2 + 7 * i % 94] for i in range(3000)))
    return path


@pytest.fixture(scope="module")
def compressed(counting: Path, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with biases, 40 % removed, on disk beside the dense one."""
    folder = tmp_path_factory.mktemp("compressed")
    build("llama-bias").save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    calibration = unirank.Calibration(text=str(counting), windows=6, window=24, batch=2)
    unirank.compress(folder / "dense", 0.4, calibration=calibration, device="cpu").save(folder / "small")
    return folder / "small"


def tuned(compressed: Path, counting: Path, work: Path, settings: unirank.Finetune = QUICK, **options: Any):
    return unirank.finetune(compressed, str(counting), settings, work=work, device="cpu", **options)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"schedule": "left-then-right"},
        {"distill": 0.5, "temperature": 2.0},
        {"dense": True},
        {"gradient_checkpointing": True, "micro_batch": 2},
        {"precision": "bfloat16"},
        {"precision": "bfloat16", "distill": 0.3},
    ],
    ids=lambda changes: ",".join(changes) or "joint",
)
def test_the_loss_falls_and_ranks_and_size_stay(compressed: Path, counting: Path, changes: dict, tmp_path) -> None:
    before = unirank.open_compressed(compressed, device="cpu")
    shapes = {name: tensor.shape for name, tensor in before.model.state_dict().items()}
    after = tuned(compressed, counting, tmp_path / "work", dataclasses.replace(QUICK, **changes))
    assert {name: tensor.shape for name, tensor in after.model.state_dict().items()} == shapes
    assert after.plan == before.plan
    assert after.training is not None
    assert after.training["held_out_after"] < after.training["held_out_before"] - 0.02
    assert after.training["merge_difference"] < 1e-5
    expected = {name for name, module in before.model.named_modules() if isinstance(module, LowRankLinear)}
    changed = set()
    for name, tensor in after.model.state_dict().items():
        if not torch.equal(tensor, before.model.state_dict()[name]):
            changed.add(name.removesuffix(".weight").removesuffix(".left").removesuffix(".right"))
    dense = {name for name, rank in before.plan.ranks.items() if rank == "dense"}
    assert dense  # or the case "dense" would show nothing
    assert changed == (expected | dense if changes.get("dense") else expected)


def test_each_phase_of_left_then_right_trains_its_factor(compressed: Path, counting: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(QUICK, schedule="left-then-right", steps=7)
    after = tuned(compressed, counting, tmp_path, settings)
    assert after.training is not None
    steps = [(entry["phase"], entry["step"]) for entry in after.training["log"] if "eval_loss" in entry]
    assert steps == [(1, 3), (1, 4), (2, 3)]
    first, both = (load_file(tmp_path / f"{folder}/adapters.safetensors") for folder in ("1-left", "2-right"))
    for name in first:
        if "lora_B" in name:  # A starts random, B at 0
            assert bool(first[name].any()) == (".left." in name)
            assert bool(both[name].any())
        if ".left." in name:
            assert torch.equal(first[name], both[name])


def test_the_merged_factors_are_the_formula(compressed: Path) -> None:
    model = unirank.open_compressed(compressed, device="cpu").model
    name, module = next((n, m) for n, m in model.named_modules() if isinstance(m, LowRankLinear))
    left, right = module.left.weight.clone(), module.right.weight.clone()
    peft = attach(model, adapted(model), rank=3, alpha=6.0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    side = {s: peft.get_submodule(f"base_model.model.{name}.{s}") for s in ("left", "right")}
    expected = {
        s: base + 2.0 * side[s].lora_B["default"].weight @ side[s].lora_A["default"].weight
        for s, base in (("left", left), ("right", right))
    }
    merged = merge(peft).get_submodule(name)
    assert isinstance(merged, LowRankLinear)
    assert type(merged.left) is torch.nn.Linear
    torch.testing.assert_close(merged.left.weight, expected["left"])
    torch.testing.assert_close(merged.right.weight, expected["right"])


def test_the_result_is_saved_with_its_recipe_and_can_be_tuned_again(
    compressed: Path, counting: Path, tmp_path: Path
) -> None:
    after = tuned(compressed, counting, tmp_path / "work")
    out = after.save(tmp_path / "out")
    training_record = json.loads((out / PROVENANCE_FILE).read_text())["training"]
    assert training_record["settings"]["rank"] == 3
    assert "12 steps of 4 x 24 tokens of `counting.txt`" in (out / "README.md").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.config.use_cache  # the Trainer trains without; a saved model that says so would generate slowly
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, after.model.state_dict()[name])
    again = tuned(out, counting, tmp_path / "again", dataclasses.replace(QUICK, seed=1))
    assert again.training is not None
    assert again.training["before_that"] == training_record
    assert again.training["held_out_before"] == pytest.approx(training_record["held_out_after"], rel=1e-5)


def child(compressed: Path, counting: Path, work: Path, out: Path, settings: unirank.Finetune) -> list[str]:
    code = CHILD.format(
        settings=dataclasses.asdict(settings), model=str(compressed), data=str(counting), work=str(work), out=str(out)
    )
    return [sys.executable, "-c", code]


@pytest.mark.parametrize("schedule", ["joint", "left-then-right"])
def test_a_killed_run_resumes_to_the_same_weights(compressed: Path, counting: Path, tmp_path: Path, schedule) -> None:
    settings = dataclasses.replace(QUICK, steps=60, evaluate_every=4, schedule=schedule, patience=20)
    expected = weights(tuned(compressed, counting, tmp_path / "undisturbed", settings).model)
    work = tmp_path / "work"
    command = child(compressed, counting, work, tmp_path / "out", settings)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 120
        while not list(work.glob("*/checkpoint-8/trainer_state.json")) and time.monotonic() < until:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    subprocess.run(command, check=True, capture_output=True)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_a_checkpoint_that_was_cut_off_is_not_resumed(compressed: Path, counting: Path, tmp_path: Path) -> None:
    expected = weights(tuned(compressed, counting, tmp_path / "one").model)
    work = tmp_path / "two"
    tuned(compressed, counting, work)
    (work / "1-joint" / "adapters.safetensors").unlink()
    for path in (work / "1-joint").glob("checkpoint-*"):
        if path.name == "checkpoint-12":
            (path / "trainer_state.json").unlink()
    again = weights(tuned(compressed, counting, work).model)
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_adapters(
    compressed: Path, counting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop._Trainer.compute_loss

    def poisoned(self, model, inputs, *args: Any, **options: Any):
        if model.training and self.state.global_step == 5:
            weight = next(p for n, p in model.named_parameters() if "layernorm" in n)
            kept = weight.detach().clone()
            weight.data.fill_(math.nan)
            try:
                return original(self, model, inputs, *args, **options)
            finally:
                weight.data.copy_(kept)
        return original(self, model, inputs, *args, **options)

    monkeypatch.setattr(loop._Trainer, "compute_loss", poisoned)
    with pytest.raises(NonFiniteError, match=r"The loss is nan at step 6; .* before that step are in .*last-good"):
        tuned(compressed, counting, tmp_path / "work")
    monkeypatch.undo()
    kept = load_file(tmp_path / "work" / "1-joint" / "last-good" / "adapter_model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in kept.values())
    # The same command goes on from the checkpoint behind step 3, and ends where an undisturbed run does.
    resumed = weights(tuned(compressed, counting, tmp_path / "work").model)
    expected = weights(tuned(compressed, counting, tmp_path / "undisturbed").model)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


def test_a_gradient_that_is_not_finite_stops_too(compressed: Path, counting: Path, tmp_path: Path, monkeypatch) -> None:
    original = loop._Trainer.compute_loss

    def poisoned(self, model, inputs, *args: Any, **options: Any):
        loss = original(self, model, inputs, *args, **options)
        if model.training and self.state.global_step == 2:
            loss.register_hook(lambda gradient: gradient * math.inf)
        return loss

    monkeypatch.setattr(loop._Trainer, "compute_loss", poisoned)
    with pytest.raises(NonFiniteError, match=r"The gradient of .*lora_.* is NaN or infinity at step 3"):
        tuned(compressed, counting, tmp_path)


def test_patience_ends_a_run_that_does_not_improve(compressed: Path, counting: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(QUICK, lr=1e-12, evaluate_every=1, patience=2)
    after = tuned(compressed, counting, tmp_path, settings)
    assert after.training is not None
    assert max(entry["step"] for entry in after.training["log"]) < settings.steps


def test_another_run_does_not_take_the_directory(compressed: Path, counting: Path, tmp_path: Path) -> None:
    tuned(compressed, counting, tmp_path / "work")
    with pytest.raises(InputError, match=r"another fine-tuning; it differs in settings.lr \(there: 0.005, now: 0.1\)"):
        tuned(compressed, counting, tmp_path / "work", dataclasses.replace(QUICK, lr=0.1))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="was not made by unirank"):
        tuned(compressed, counting, tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["notes.txt"]


def test_what_cannot_be_used_is_refused_before_anything_is_made(compressed, counting, tmp_path, tokenizer) -> None:
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_text(" \n")
    short.write_text("w1 " * 30)
    work = tmp_path / "work"
    cases = [
        (compressed, empty, {}, "is empty"),
        (compressed, tmp_path / "nothing", {}, "is not a file; legal are"),
        (compressed, short, {}, r"fills 1 window of 24 tokens; at least 2"),
        (compressed, short, {"window": 64}, r"too short: it has 30 tokens, windows of 64 need at least 64"),
        (compressed.parent / "dense", counting, {}, f"is not a compressed checkpoint: it has no {PLAN_FILE}"),
        (tmp_path / "nowhere", counting, {}, "does not exist"),
    ]
    for model, data, changes, words in cases:
        with pytest.raises(InputError, match=words):
            unirank.finetune(model, str(data), dataclasses.replace(QUICK, **changes), work=work, device="cpu")
        assert not work.exists()
    with pytest.raises(InputError, match="With distill = 0 the model of against= would not be used"):
        tuned(compressed, counting, work, against="dense")
    with pytest.raises(InputError, match="The teacher cannot be loaded"):
        tuned(compressed, counting, work, dataclasses.replace(QUICK, distill=0.5), against=str(tmp_path / "nowhere"))
    other = build("llama", vocab_size=50)
    with pytest.raises(InputError, match="The teacher has 50 tokens and the compressed model 96"):
        tuned(compressed, counting, work, dataclasses.replace(QUICK, distill=0.5), against=other)


def test_a_text_that_is_read_over_and_over_is_said(compressed: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text(" ".join(WORDS[2 + 7 * i % 94] for i in range(6 * 24)))
    settings = dataclasses.replace(QUICK, steps=6, batch=4)
    said = r"gives 5 windows of 24 tokens to train on, and 6 steps of 4 read them 4\.8 times; beyond 4 times"
    with pytest.warns(unirank.UnirankWarning, match=said):
        tuned(compressed, short, tmp_path / "work", settings)
    tuned(compressed, short, tmp_path / "other", dataclasses.replace(settings, steps=5))  # exactly 4 times


def test_a_model_without_low_rank_layers_is_refused(compressed: Path) -> None:
    with pytest.raises(InputError, match="no low-rank layers"):
        adapted(build("llama"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "steps = 0 is not legal; it must be at least 1"),
        ({"lr": math.nan}, "lr = nan is not legal"),
        ({"distill": 1.5}, "distill = 1.5 is not legal"),
        ({"held_out": 0.0}, "held_out = 0.0 is not legal"),
        ({"batch": 4, "micro_batch": 3}, "micro_batch = 3 is not legal; it must be a divisor of batch = 4"),
        ({"schedule": "right"}, "schedule = 'right' is not legal; it must be joint or left-then-right"),
        ({"steps": 1, "schedule": "left-then-right"}, "at least 2 with left-then-right"),
        ({"precision": "fp8"}, "precision = 'fp8' is not legal"),
        ({"evaluate_every": 0}, "evaluate_every = 0 is not legal"),
    ],
)
def test_settings_that_are_not_legal_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        unirank.Finetune(**changes)


def test_documents_are_packed_with_eos_between(make_model, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    lines = tmp_path / "data.jsonl"
    lines.write_text("\n".join(json.dumps({"text": text}) for text in ("w1 w2 w3", "w4", "w5 w6 w7 w8")))
    windows = pack(read_corpus(str(lines), tokenizer), tokenizer, make_model().model, window=4)
    words = [[WORDS[i] for i in row] for row in windows.tolist()]
    assert words == [["w1", "w2", "w3", "<eos>"], ["w4", "<eos>", "w5", "w6"]]


def test_the_command_tunes_and_clears_its_checkpoints_away(
    run_unirank: Run,
    compressed: Path,
    counting: Path,
    tmp_path: Path,
) -> None:
    command = ["finetune", compressed, "--data", counting, "-o", tmp_path / "out", "--steps", 6, "--window", 24]
    command += ["--lr", "5e-3", "--rank", 3, "--device", "cpu"]
    code, out, err = run_unirank(*command)
    assert (code, err) == (0, "")
    assert "before" in out
    assert "from_pretrained" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    code, _, err = run_unirank(*command)
    assert code == 2
    assert "pass --overwrite" in err
    code, out, err = run_unirank(*command, "--overwrite", "--work", tmp_path / "work", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["training"]["settings"]["steps"] == 6
    assert (tmp_path / "work").is_dir()
    code, _, err = run_unirank(*command[:-2], "-o", compressed, "--overwrite", "--device", "cpu")
    assert code == 2
    assert "choose another" in err


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_stock_peft_needs_no_help_from_us(compressed: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    shutil.copytree(compressed, tmp_path / "small")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    ids = torch.arange(2, 20)[None]
    config = LoraConfig(r=2, target_modules=["left", "right"], task_type="CAUSAL_LM", init_lora_weights=False)
    peft = get_peft_model(model, config).eval()
    with torch.no_grad():
        expected = peft(ids).logits
        peft.save_pretrained(tmp_path / "adapter")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
        again = PeftModel.from_pretrained(base, tmp_path / "adapter")
        assert torch.equal(again.eval()(ids).logits, expected)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(saved(ids).logits, merged(ids).logits)


def test_the_command_densifies(run_unirank: Run, compressed: Path, tmp_path: Path) -> None:
    out = tmp_path / "dense"
    code, printed, err = run_unirank("densify", compressed, "-o", out, "--device", "cpu")
    assert (code, err) == (0, "")
    assert "needs no unirank to load" in printed
    code = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
    code += "; assert 'unirank' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, out], check=True, capture_output=True)
    for command, words in (
        (["densify", compressed, "-o", out], "pass --overwrite"),
        (["densify", compressed, "-o", compressed, "--overwrite"], "is the checkpoint itself"),
        (["densify", out, "-o", tmp_path / "other"], f"it has no {PLAN_FILE}"),
    ):
        exit_code, _, err = run_unirank(*command, "--device", "cpu")
        assert exit_code == 2
        assert words in err
