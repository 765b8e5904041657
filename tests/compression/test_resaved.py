"""A compressed checkpoint that transformers or peft saved again is gone on with; what is not known of it is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

import unirank
from tests.support.tiny import build
from unirank import InputError
from unirank.compression.card import GONE, UNKNOWN
from unirank.compression.checkpoint import add_evaluation, check_weights, read_record
from unirank.evaluation.perplexity import EvalReport
from unirank.models.low_rank import LowRankLinear
from unirank.report.gather import gather
from unirank.report.page import page

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks
IDS = torch.arange(2, 22)[None]
RECORDS = ("rank_plan.json", "provenance.json")
MADE = {"llama": ("whiten", "factors"), "gpt2": ("whiten", "factors"), "afm": ("afm", "pivoted")}


def by_transformers(out: Path, again: Path) -> None:
    AutoModelForCausalLM.from_pretrained(out).save_pretrained(again)


def in_shards(out: Path, again: Path) -> None:
    AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).save_pretrained(again, max_shard_size="20KB")


def by_peft(out: Path, again: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(out)
    targets = LoraConfig(r=2, target_modules=["left", "right"], task_type="CAUSAL_LM")
    merged: Any = get_peft_model(model, targets).merge_and_unload()
    merged.save_pretrained(again)


def by_the_trainer(out: Path, again: Path) -> None:
    arguments = TrainingArguments(output_dir=str(again), report_to=[], use_cpu=True)
    Trainer(AutoModelForCausalLM.from_pretrained(out), arguments).save_model(str(again))


def as_a_body(out: Path, again: Path) -> None:
    AutoModel.from_pretrained(out).save_pretrained(again)


WAYS = (by_transformers, in_shards, by_peft, by_the_trainer, as_a_body)


@pytest.fixture(scope="module")
def root(tmp_path_factory, tokenizer: PreTrainedTokenizerFast, text_file: Path) -> Path:
    """ "NAME-base", dense, and "NAME", compressed from it, for every name in MADE."""
    root = tmp_path_factory.mktemp("made")
    for name, (scheme, form) in MADE.items():
        build("llama" if name == "afm" else name).save_pretrained(root / f"{name}-base")
        tokenizer.save_pretrained(root / f"{name}-base")
        calibration = unirank.Calibration(text=str(text_file), windows=8, window=16, batch=2)
        options: dict[str, Any] = {"scheme": scheme, "form": form, "calibration": calibration, "device": "cpu"}
        unirank.compress(root / f"{name}-base", 0.4, **options).save(root / name)
    return root


@pytest.fixture
def again(root: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Callable[..., Path]:
    def save(way: Callable[[Path, Path], None] = by_transformers, name: str = "llama") -> Path:
        way(root / name, tmp_path / "again")
        tokenizer.save_pretrained(tmp_path / "again")
        assert not any((tmp_path / "again" / record).exists() for record in RECORDS)
        return tmp_path / "again"

    return save


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_ranks_and_sizes_are_those_of_the_weights(way, stream: bool, root: Path, again) -> None:
    folder = again(way)
    opened = unirank.open_compressed(folder, device="cpu", stream=stream)
    before = unirank.open_compressed(root / "llama", device="cpu")
    assert opened.plan.ranks == before.plan.ranks
    assert opened.plan.shapes == before.plan.shapes
    assert (opened.plan.used, opened.plan.budget) == (before.plan.used, before.plan.used)
    assert opened.report == before.report
    assert (opened.identity, opened.source, opened.training) == (None, "", None)
    assert (opened.plan.scheme, opened.plan.allocator) == (UNKNOWN, UNKNOWN)
    if not stream and way is not in_shards:
        assert torch.equal(logits(opened.model), logits(before.model))


@pytest.mark.parametrize("name", MADE)
def test_it_is_saved_again_by_us_and_read_back(name: str, root: Path, again, tmp_path: Path) -> None:
    folder = again(name=name)
    opened = unirank.open_compressed(folder, device="cpu")
    assert opened.report == unirank.open_compressed(root / name, device="cpu").report
    out = opened.save(tmp_path / "ours")
    back = unirank.open_compressed(out, device="cpu")
    assert (back.plan, back.report, back.identity, back.source) == (opened.plan, opened.report, None, "")
    assert json.loads((out / "provenance.json").read_text())["analysis"] is None
    assert GONE in (out / "README.md").read_text()
    assert torch.equal(logits(back.model), logits(unirank.open_compressed(root / name, device="cpu").model))


def test_every_command_goes_on_from_it(root: Path, again, text_file, tmp_path: Path, run_unirank, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = again(by_peft)
    base, text, heal = str(root / "llama-base"), str(text_file), ["--windows", "4", "--window", "16", "--passes", "1"]
    short = ["--text", text, "--window", "16", "--limit", "2"]

    commands = [
        ["densify", str(folder), "-o", "dense"],
        ["finetune", str(folder), "--text", text, "-o", "tuned", "--steps", "1", "--window", "16", "--batch", "2"],
        ["heal", str(folder), "-o", "healed", "--against", base, "--calib", text, *heal],
        ["heal", str(folder), "-o", "healed-streamed", "--against", base, "--calib", text, "--stream", *heal],
        ["report", str(folder), "-o", "page.html", "--against", base],
        ["eval", str(folder), *short, "--card"],
        ["eval", str(folder), *short, "--card", "--against", base],  # over the card of the last one
    ]
    for command in commands:
        code, _, said = run_unirank(*command, "--device", "cpu")
        assert code == 0, said
    for out in ("tuned", "healed", "healed-streamed"):
        made = unirank.open_compressed(out, device="cpu")
        assert made.plan.used == made.report.targets_after
        assert made.identity is None
        assert made.training is not None
    plain = AutoModelForCausalLM.from_pretrained("dense")
    assert not any(isinstance(module, LowRankLinear) for module in plain.modules())
    torch.testing.assert_close(
        logits(plain), logits(AutoModelForCausalLM.from_pretrained(folder)), rtol=1e-4, atol=1e-4
    )
    assert "perplexity on" in (folder / "README.md").read_text()
    for command in (
        ["heal", str(folder), "-o", "more", "--calib", text, *heal],
        ["finetune", str(folder), "--text", text, "-o", "more", "--window", "16", "--distill", "0.5"],
    ):
        code, _, said = run_unirank(*command, "--device", "cpu")
        assert code == 2
        assert "does not say which dense model it was made from" in said
        assert "--against" in said


def test_card_and_page_say_what_is_not_known(again) -> None:
    text = page(gather(again(), None, None))
    assert GONE in text
    assert "How it was made is not known." in text
    assert "<pre>unirank compress" not in text


def test_a_store_is_not_shown_beside_it(root: Path, again, text_file: Path, tmp_path: Path) -> None:
    calibration = unirank.Calibration(text=str(text_file), windows=8, window=16, batch=2)
    store = unirank.analyze(root / "llama-base", tmp_path / "store", calibration=calibration, device="cpu")
    with pytest.raises(InputError, match="does not say which analysis it was made from; leave the store out"):
        gather(again(), store, None)


def test_a_card_of_somebody_else_is_not_replaced(again) -> None:
    folder = again()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# Years of work\n")
    report = EvalReport(2.0, 0.7, "t", "0" * 64, 16, 2, 30, False, "float32", 10)
    with pytest.raises(InputError, match=r"README\.md is not a card that unirank wrote"):
        add_evaluation(folder, report)
    assert not (folder / "evaluations.json").exists()


def test_saved_into_the_same_directory(root: Path, tokenizer, tmp_path: Path) -> None:
    """Its records are of other weights then: what to do is said, and the plan still holds."""
    out = Path(shutil.copytree(root / "llama", tmp_path / "out"))
    model = AutoModelForCausalLM.from_pretrained(out)
    next(module for module in model.modules() if isinstance(module, LowRankLinear)).left.weight.data += 1
    model.save_pretrained(out)
    with pytest.raises(InputError, match=r"other bytes than were written.*delete provenance\.json"):
        unirank.open_compressed(out, device="cpu")
    (out / "provenance.json").unlink()
    opened = unirank.open_compressed(out, device="cpu")
    assert opened.plan == unirank.open_compressed(root / "llama", device="cpu").plan
    assert opened.identity is None
    assert torch.equal(logits(opened.model), logits(model))


def test_one_of_the_two_records(root: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(root / "llama", tmp_path / "out"))
    before = unirank.open_compressed(out, device="cpu")
    (out / "rank_plan.json").unlink()
    opened = unirank.open_compressed(out, device="cpu")
    assert opened.plan.ranks == before.plan.ranks
    assert (opened.identity, opened.source, opened.report) == (before.identity, before.source, before.report)
    # A plan that is not of these weights.
    shutil.copy(root / "llama" / "rank_plan.json", out)
    (out / "provenance.json").unlink()
    config = json.loads((out / "config.json").read_text())
    name = next(iter(config["quantization_config"]["ranks"]))
    config["quantization_config"]["ranks"][name] += 1
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=rf"rank_plan\.json does not belong to the weights beside it: {name} has rank"):
        read_record(out)


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (None, "is not a compressed checkpoint: it has no rank_plan.json, and no config.json that names low-rank"),
        ({}, "is not a compressed checkpoint"),
        (3, "quantization_config.ranks must map names to ranks"),
        ({"model.layers.0.mlp.nothing": 4}, "has no linear model.layers.0.mlp.nothing"),
        ({"model.layers.0.mlp.up_proj": 99}, "The rank of model.layers.0.mlp.up_proj is 99"),
        ({"model.layers.0.mlp.up_proj": 25}, "are none of unirank's: one costs more than the dense matrix"),
        ({"lm_head": 4}, "or is of a linear outside the decoder layers"),
    ],
)
def test_what_names_no_low_rank_layers_is_refused(ranks: Any, words: str, again) -> None:
    folder = again()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ranks"] = ranks
    if ranks is None:
        del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as caught:
        read_record(folder)
    assert words in str(caught.value)


def test_an_adapter_that_was_not_merged_is_refused_with_what_to_do(root: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(root / "llama")
    get_peft_model(model, LoraConfig(r=2, target_modules=["left"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"is an adapter .* merge it into its model"):
        unirank.open_compressed(tmp_path / "adapter", device="cpu")


def test_weights_of_other_shapes_are_refused_by_name(again) -> None:
    folder = again()
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("left.weight"))
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    check_weights(folder, read_record(folder))  # nothing is known of their bytes
    with pytest.raises(InputError, match="Cannot load the weights"):
        unirank.open_compressed(folder, device="cpu")
