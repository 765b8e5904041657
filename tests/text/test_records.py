"""Records of text: files, datasets, the field's corpora by name, and what is said where they cannot be read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

import unirank
from tests.support.command_line import Run
from unirank.errors import InputError
from unirank.text import records
from unirank.text.records import NAMED, Named, is_records
from unirank.text.training_windows import read_corpus
from unirank.text.windows import read_text


@pytest.fixture
def corpus(tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local dataset of two splits, which the name "wikitext2" stands for."""
    words = text_file.read_text().split()
    folder = tmp_path / "corpus"
    folder.mkdir()
    for split, part in (("train", words[:3000]), ("test", words[3000:])):
        lines = [" ".join(part[i : i + 50]) for i in range(0, len(part), 50)]
        datasets.Dataset.from_dict({"text": lines}).to_parquet(str(folder / f"{split}.parquet"))
    monkeypatch.setitem(records.NAMED, "wikitext2", Named(str(folder), None, "test"))
    return folder


def test_records_become_documents(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    chat = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>", unk_token="<unk>")
    chat.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    records = [
        {"text": "w1 w2"},
        {"messages": [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"}]},
        {"prompt": "w5", "completion": "w6"},
        {"instruction": "w7", "input": "w8", "output": "w9"},
        {"instruction": "w7", "output": "w9"},
        {"text": "  "},
    ]
    lines = tmp_path / "data.jsonl"
    lines.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    corpus = read_corpus(str(lines), chat)
    assert corpus.documents == (
        "w1 w2",
        "user: w3 assistant: w4 ",
        "user: w5 assistant: w6 ",
        "user: w7\n\nw8 assistant: w9 ",
        "user: w7 assistant: w9 ",
    )
    for text, words in (
        ('{"text": "w1"}\n{', "Line 2 of .* is not JSON"),
        ('{"label": 1}', "Record 1 of .* has neither text, nor messages"),
        ('["w1"]', "Record 1 of .* is a list, not an object"),
    ):
        lines.write_text(text)
        with pytest.raises(InputError, match=words):
            read_corpus(str(lines), chat)
    lines.write_text('{"prompt": "w5", "completion": "w6"}')
    with pytest.raises(InputError, match="the tokenizer has no chat template"):
        read_corpus(str(lines), tokenizer)


def test_datasets_are_read_from_directories_and_parquet(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    import datasets

    table = datasets.Dataset.from_dict({"text": ["w1 w2", "w3"]})
    (tmp_path / "folder").mkdir()
    table.to_parquet(str(tmp_path / "folder" / "train.parquet"))
    for source in (tmp_path / "folder", tmp_path / "folder" / "train.parquet"):
        assert read_corpus(str(source), tokenizer).documents == ("w1 w2", "w3")
    with pytest.raises(InputError, match="is neither a file nor a dataset that loads"):
        read_corpus(str(tmp_path / "folder"), tokenizer, split="nowhere")


def test_a_name_has_a_split_for_calibration_and_one_for_perplexity(corpus: Path, text_file: Path) -> None:
    words = text_file.read_text().split()
    train, test = read_text("wikitext2"), read_text("wikitext2", held_out=True)
    assert train.content.split() == words[:3000]
    assert test.content.split() == words[3000:]
    assert train.content.count("\n\n") == 59
    assert read_text("wikitext2", split="test").content == test.content
    assert read_text(str(corpus), held_out=True).content == test.content


def test_a_long_corpus_is_read_up_to_its_limit(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(records.NAMED, "c4", Named(str(corpus), None, "test", limit=3))
    assert read_text("c4").content.count("\n\n") == 2


def test_the_names_are_those_of_the_field() -> None:
    assert tuple(NAMED) == ("wikitext2", "c4", "ptb")
    assert all(named.path.count("/") == 1 for named in NAMED.values())


@pytest.mark.parametrize(
    ("source", "records"),
    [
        ("wikitext2", True),
        ("Salesforce/wikitext:wikitext-2-raw-v1", True),
        ("missing.txt", False),
        ("missing.jsonl", False),
        ("./text", False),
        ("/somewhere/text", False),
        ("a/b/c", False),
        ("builtin", False),
    ],
)
def test_what_is_taken_for_a_dataset(source: str, records: bool) -> None:
    assert is_records(source) == records


def test_a_dataset_that_cannot_be_reached_is_one_sentence() -> None:
    with pytest.raises(InputError, match=r"'nobody/nothing' is neither a file nor a dataset that loads: [^\n]*\.$"):
        read_text("nobody/nothing")
    with pytest.raises(InputError, match=r"'missing\.txt' is no dataset, so it has no split and no revision"):
        read_text("missing.txt", split="train")


def test_the_store_knows_the_split_and_draws_the_windows_again(corpus: Path, make_model, tmp_path: Path) -> None:
    loaded = make_model()
    calibration = unirank.Calibration("wikitext2", windows=4, window=24, batch=2, split="test")
    store = unirank.analyze(loaded, tmp_path / "store", calibration=calibration)
    recorded = store.identity.calibration
    assert (recorded.text, recorded.split) == ("wikitext2", "test")
    assert recorded.text_sha256 == read_text("wikitext2", split="test").sha256
    assert len(unirank.make_workbench(loaded, store).windows) == 4
    plain = dataclasses.replace(calibration, split=None)
    assert unirank.analyze(loaded, tmp_path / "plain", calibration=plain).identity.calibration.split is None


def test_the_commands_take_names_and_records(
    run_unirank: Run,
    corpus: Path,
    model_dir: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text("\n".join(json.dumps({"text": text_file.read_text()[i : i + 400]}) for i in range(0, 9000, 400)))
    small = ["--windows", 4, "--window", 24, "--device", "cpu"]
    for calib, more in (("wikitext2", ["--split", "test"]), (lines, []), (corpus / "train.parquet", [])):
        out = tmp_path / f"store-{Path(calib).name}"
        code, printed, err = run_unirank("analyze", model_dir, "-o", out, "--calib", calib, *more, *small, "--json")
        assert (code, err) == (0, "")
        assert json.loads(printed)["identity"]["calibration"]["text"] == Path(calib).name
    command = ["eval", model_dir, "--text", "wikitext2", "--window", 24, "--limit", 2, "--device", "cpu", "--json"]
    code, printed, err = run_unirank(*command)
    assert (code, err) == (0, "")
    row = json.loads(printed)["rows"][0]
    assert row["text_sha256"] == read_text("wikitext2", held_out=True).sha256
    code, _, err = run_unirank("analyze", model_dir, "-o", tmp_path / "x", "--calib", text_file, "--split", "test")
    assert code == 2
    assert "is no dataset, so it has no split" in err
