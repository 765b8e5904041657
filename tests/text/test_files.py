"""Local files: lines end where the format says, records are read in every usual form, no structured data is prose."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from unirank.errors import InputError
from unirank.text.records import is_records, read_documents
from unirank.text.training_windows import read_corpus
from unirank.text.windows import BUILTIN, BUILTIN_HELD_OUT, read_text

TEXTS = ("w1 w2", "w3, with a comma", 'w4 "quoted"', "w5\nw6")
RECORDS = [{"text": text} for text in TEXTS]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)


def _short(value: str) -> str:
    return ascii(value[:24])


@pytest.mark.parametrize("code", [0x2028, 0x2029, 0x85, 0x0B, 0x0C, 0x1C, 0x1D, 0x1E])
def test_only_a_line_feed_ends_a_json_line(code: int, tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    # Control characters have to be escaped inside a string; between records they are no line end either.
    text = f"one{chr(code)}end"
    file.write_bytes("".join(json.dumps({"text": text}, ensure_ascii=code < 0x20) + "\n" for _ in range(3)).encode())
    assert read_documents(str(file)) == ((text,) * 3, "\n\n")
    file.write_bytes(f'{{"text": "one"}}{chr(code)}{{"text": "two"}}\n'.encode())
    with pytest.raises(InputError, match=r"Line 1 of .* is not JSON: Extra data"):
        read_documents(str(file))


def test_a_carriage_return_is_white_space_of_json(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_bytes(b'{"text":\r"one"}\r\n\r\n \t\n{"text": "two"}')
    assert read_documents(str(file))[0] == ("one", "two")
    file.write_bytes(b'{"text": "one"}\n\n{"text": two}\n')
    with pytest.raises(InputError, match=r"Line 3 of .* is not JSON"):
        read_documents(str(file))


def _csv(delimiter: str) -> str:
    quoted = [text.replace('"', '""') for text in TEXTS]
    return f"id{delimiter}text\r\n" + "".join(f'{i}{delimiter}"{text}"\r\n' for i, text in enumerate(quoted))


def _parquet(path: Path) -> None:
    datasets.Dataset.from_list(RECORDS).to_parquet(str(path))


FORMS: dict[str, str | Callable[[Path], None]] = {
    "a.jsonl": LINES,
    "a.JSONL": LINES,
    "a.ndjson": LINES,
    "a.jsonlines": "\ufeff" + LINES,
    "a.jsonl.gz": LINES,
    "a.JSONL.GZ": LINES,
    "a.json": json.dumps(RECORDS),
    "pretty.Json": json.dumps(RECORDS, indent=2),
    "lines.json": LINES,
    "a.json.gz": json.dumps(RECORDS),
    "a.csv": _csv(","),
    "excel.CSV": "\ufeff" + _csv(","),
    "a.csv.gz": _csv(","),
    "a.tsv": _csv("\t"),
    "a.parquet": _parquet,
    "a.Parquet": _parquet,
}


def write(path: Path, content: str | Callable[[Path], None]) -> str:
    if callable(content):
        content(path)
    else:
        data = content.encode()
        path.write_bytes(gzip.compress(data) if path.suffix.lower() == ".gz" else data)
    return str(path)


@pytest.mark.parametrize("name", FORMS)
def test_the_usual_files_of_records_are_read(name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write(tmp_path / name, FORMS[name])
    assert is_records(source)
    assert read_documents(source)[0] == TEXTS
    assert read_corpus(source, tokenizer).documents == TEXTS
    text = read_text(source)
    assert (text.name, text.content) == (name, "\n\n".join(TEXTS))


@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "a.txt.gz", "a.TXT.GZ", "a", "a.gz", "wiki.test.raw", "code.py"])
def test_prose_is_the_same_text_under_every_name(name: str, tmp_path: Path) -> None:
    source = write(tmp_path / name, "[1] one\r\ntwo \u2028 three\n")
    assert not is_records(source)
    text = read_text(source)
    assert (text.name, text.content) == (name, "[1] one\ntwo \u2028 three\n")


@pytest.mark.parametrize(
    "name", ["a.yaml", "a.XML", "a.html", "a.arrow", "a.zip", "a.tar.gz", "a.jsonl.zst", "a.parquet.gz", "a.jsonl.bz2"]
)
def test_structured_files_that_are_not_read_are_refused(
    name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = write(tmp_path / name, "w1: w2\n")
    for read in (read_text, lambda source: read_corpus(source, tokenizer)):
        with pytest.raises(InputError, match=r"is a \.\S+ file, which is not read; legal are UTF-8 text, JSON lines"):
            read(source)


@pytest.mark.parametrize(
    "content",
    [
        LINES,
        "\n \n" + LINES,
        "\ufeff" + LINES,
        LINES[:-9],
        json.dumps(RECORDS),
        json.dumps(RECORDS, indent=1),
        json.dumps({"data": RECORDS}, indent=1),
        '["a"]',
    ],
    ids=_short,
)
def test_a_text_file_that_holds_json_is_refused(
    content: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    for name in ("a.txt", "a", "a.txt.gz"):
        source = write(tmp_path / name, content)
        for read in (read_text, lambda source: read_corpus(source, tokenizer)):
            with pytest.raises(InputError, match=r"holds JSON, not prose; as a \.jsonl file"):
                read(source)


@pytest.mark.parametrize(
    "content", ["{} is an empty set.\n{1}\n", "[w1] w2", "{w1}", "{}\n", "[", "{" * 5000], ids=_short
)
def test_prose_that_begins_with_a_bracket_is_prose(content: str, tmp_path: Path) -> None:
    assert read_text(write(tmp_path / "a.txt", content)).content == content


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[{}", "is not JSON"),
        ("a.json", "[" * 100_000, "is not JSON"),
        ("a.json", "w1", "is not JSON"),
        ("a.json", json.dumps({"data": RECORDS}), "Record 1 of .* is not usable: it has neither text"),
        ("a.json", json.dumps(list(TEXTS)), "Record 1 of .* is a str, not an object"),
        ("a.json", "3", "Record 1 of .* is a int, not an object"),
        ("a.json", "[]", "is empty"),
        ("a.json", LINES + "{", "Line 5 of .* is not JSON"),
        ("a.csv", "title,body\na,b\n", "Record 1 of .* is not usable: it has neither text"),
        ("a.csv", "id,text\n1,a\n2,b,c\n", "Record 2 of .* has 3 columns and the header 2"),
        ("a.csv", 'id,text\n1,"a" b\n', "cannot be read"),
        ("a.csv", "id,text\n", "is empty"),
        ("a.jsonl", '{"text": ["w1"]}', "Record 1 of .* is not usable: its text is a list, not a string"),
    ],
    ids=_short,
)
def test_what_is_wrong_in_a_file_is_said(name: str, content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_documents(write(tmp_path / name, content))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz"])
@pytest.mark.parametrize("data", [b"no gzip", gzip.compress(LINES.encode() * 9)[:-20], b""], ids=["no", "cut", "none"])
def test_damaged_gzip_is_refused(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=r"cannot be read|is empty"):
        read_text(str(tmp_path / name))


def test_a_document_of_a_table_may_be_long(tmp_path: Path) -> None:
    long = "w1 " * 100_000
    assert read_documents(write(tmp_path / "a.csv", f"text\n{long}\n"))[0] == (long,)


def test_plain_text_is_no_records(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.txt is plain text and holds no records; legal are"):
        read_documents(write(tmp_path / "a.txt", "w1"))


WITHOUT = [*FORMS, "a.txt", "a.txt.gz"]


@pytest.mark.parametrize("given", [{"split": "test"}, {"revision": "main"}, {"split": "train", "revision": "main"}])
@pytest.mark.parametrize("name", [*WITHOUT, BUILTIN, BUILTIN_HELD_OUT])
def test_a_file_has_no_split_and_no_revision(
    name: str, given: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = write(tmp_path / name, FORMS.get(name, "w1 w2")) if name in WITHOUT else name
    message = r"is no dataset, so it has no split and no revision; got (split='t\w+'|revision='main')"
    for held_out in (False, True):
        with pytest.raises(InputError, match=message):
            read_text(source, **given, held_out=held_out)
    with pytest.raises(InputError, match=message):
        read_documents(source, **given)
    if "revision" not in given:
        with pytest.raises(InputError, match=message):
            read_corpus(source, tokenizer, **given)


def test_a_directory_has_splits_and_no_revision(tmp_path: Path) -> None:
    for split in ("train", "test"):
        datasets.Dataset.from_list([{"text": split}]).to_parquet(str(tmp_path / f"{split}.parquet"))
    assert read_text(str(tmp_path), split="test").content == "test"
    with pytest.raises(InputError, match="is a directory, so it has no revision; got split='test', revision='main'"):
        read_text(str(tmp_path), split="test", revision="main")
