"""Our safetensors files: what is not what was written is Damaged, and nothing else is."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from unirank.disk import tensorfile
from unirank.disk.strictjson import Damaged, build, entry, number, parse_object, read_object
from unirank.disk.tensorfile import open_tensors, read_tensors, write_tensors
from unirank.types import CosineStat

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_tensors(tmp_path / "file", TENSORS, {"layer": 3})
    return tmp_path / "file"


def test_what_was_written_is_read(file: Path) -> None:
    found = read_tensors(file)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    with open_tensors(file) as opened:
        assert opened.header == {"layer": 3}
        assert opened.names() == ["a", "b"]
        assert opened.get("c") is None
        with pytest.raises(Damaged, match="it has no c"):
            opened["c"]


def resaved(file: Path, metadata: dict[str, str] | None) -> None:
    save_file(TENSORS, file, metadata=metadata)


def signed(**record: object) -> dict[str, str]:
    """Metadata whose header has the right checksum."""
    total = tensorfile.sha256_text(tensorfile._dumped(record))
    return {"unirank": tensorfile._dumped({**record, "header_sha256": total})}


def other_dtype(file: Path) -> None:
    """A dtype that torch has not."""
    content = {
        "a": {"dtype": "F6_E2M3", "shape": [8], "data_offsets": [0, 6]},
        "__metadata__": signed(sha256={"a": ""}),
    }
    header = json.dumps(content).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 6)


SPOILS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda file: file.unlink(), "No such file"),
    "a directory": (lambda file: (file.unlink(), file.mkdir()), ""),
    "empty": (lambda file: file.write_bytes(b""), ""),
    "cut": (lambda file: file.write_bytes(file.read_bytes()[:-1]), ""),
    "no metadata": (lambda file: resaved(file, None), "it has no unirank"),
    "other metadata": (lambda file: resaved(file, {"format": "pt"}), "it has no unirank"),
    "metadata is no JSON": (lambda file: resaved(file, {"unirank": "{"}), "it is not JSON"),
    "metadata is no object": (lambda file: resaved(file, {"unirank": "[1]"}), "it is no object"),
    "no checksum": (lambda file: resaved(file, {"unirank": "{}"}), "it has no header_sha256"),
    "another checksum": (lambda file: resaved(file, {"unirank": '{"header_sha256": "0"}'}), "its header has other"),
    "a checksum that is no text": (lambda file: resaved(file, {"unirank": '{"header_sha256": 1}'}), "header_sha256 is"),
    "no sums": (lambda file: resaved(file, signed(layer=1)), "it has no sha256"),
    "sums are no object": (lambda file: resaved(file, signed(sha256=["a"])), "sha256 is"),
    "a sum that is no text": (lambda file: resaved(file, signed(sha256={"a": None})), "a has other bytes"),
    "a sum of a tensor that is not there": (lambda file: resaved(file, signed(sha256={"c": "0"})), "c"),
    "an unknown dtype": (other_dtype, ""),
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_spoilt_file_is_damaged(spoil: str, file: Path) -> None:
    change, said = SPOILS[spoil]
    change(file)
    with pytest.raises(Damaged) as error:
        read_tensors(file)
    assert said in str(error.value)
    assert str(error.value)


@pytest.mark.parametrize("error", [TypeError, AttributeError, KeyError, ValueError])
def test_an_error_of_the_reader_comes_through(error: type[Exception], file: Path) -> None:
    with pytest.raises(error, match="mine") as caught, open_tensors(file):
        raise error("mine")
    assert caught.type is error


# -- JSON from outside ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000, '{"a": NaN}', '{"a": 1, "a": 1}', "1" * 10_000])
def test_texts_that_are_no_object(text: str, tmp_path: Path) -> None:
    with pytest.raises(Damaged):
        parse_object(text)
    (tmp_path / "file").write_text(text)
    with pytest.raises(Damaged):
        read_object(tmp_path / "file")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for name in ("missing", "bytes", "."):
        with pytest.raises(Damaged):
            read_object(tmp_path / name)


def test_entries_have_exactly_a_type() -> None:
    record = {"a": 1, "b": True, "c": None, "d": {}}
    assert entry(record, "a", int) == 1
    assert entry(record, "c", int, type(None)) is None
    for key, kinds in (("b", [int]), ("a", [float]), ("c", [dict]), ("d", [list, str])):
        with pytest.raises(Damaged, match=f"{key} is "):
            entry(record, key, *kinds)
    for other in (record, [], None, 3):
        with pytest.raises(Damaged, match="it has no e"):
            entry(other, "e", int)


@pytest.mark.parametrize("value", [10**400, -(10**400), True, None, "1", [], float("nan"), float("inf")])
def test_numbers_are_finite(value: object) -> None:
    with pytest.raises(Damaged, match="it is "):
        number(value, "it")
    with pytest.raises(Damaged):
        CosineStat.from_dict({"total": value, "total_of_squares": 1.0, "tokens": 1})  # pyright: ignore


def test_a_record_has_exactly_its_fields() -> None:
    assert build(CosineStat, {"total": 1.0, "total_of_squares": 1.0, "tokens": 1}) == CosineStat(1.0, 1.0, 1)
    for wrong in ({}, {"total": 1.0}, {"total": 1.0, "total_of_squares": 1.0, "tokens": 1, "more": 1}, [], None):
        with pytest.raises(Damaged, match="other entries than total, total_of_squares, tokens"):
            build(CosineStat, wrong)
