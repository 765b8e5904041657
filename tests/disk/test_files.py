"""Files and directories take their place in one step, and what killed writers left is swept away."""

from __future__ import annotations

import ctypes
import fcntl
import os
from pathlib import Path

import pytest

from unirank.disk.files import beside, staged_directory, write_text
from unirank.errors import InputError, WriteError


def filled(out: Path, text: str) -> None:
    with staged_directory(out) as folder:
        (folder / "one").write_text(text)


@pytest.mark.parametrize("system", ["exchange", "two renames"])
def test_a_directory_is_replaced_whole(system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if system == "two renames":
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    else:  # no moment at which the name is missing
        replace = os.replace
        monkeypatch.setattr(os, "replace", lambda a, b: replace(a, b) if not (tmp_path / "out").exists() else 1 / 0)
    for text in ("first", "second"):
        filled(tmp_path / "out", text)
        assert (tmp_path / "out" / "one").read_text() == text
        assert os.listdir(tmp_path) == ["out"]


def test_a_link_to_a_directory_stays_a_link(tmp_path: Path) -> None:
    filled(tmp_path / "there", "first")
    (tmp_path / "link").symlink_to("there")
    filled(tmp_path / "link", "second")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "one").read_text() == "second"
    assert sorted(os.listdir(tmp_path)) == ["link", "there"]


def test_an_error_leaves_the_old_directory(tmp_path: Path) -> None:
    filled(tmp_path / "out", "first")
    with pytest.raises(TypeError):
        filled(tmp_path / "out", None)  # pyright: ignore[reportArgumentType]
    assert (tmp_path / "out" / "one").read_text() == "first"
    assert os.listdir(tmp_path) == ["out"]


def test_leftovers_are_swept_and_nothing_else(tmp_path: Path) -> None:
    """Only directories with names that we give, for this very output, and not what a living run holds."""
    for name in (".out.unirank-abc_1234.tmp", ".plan.json.unirank-abc_1234.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text("half")
    (tmp_path / "precious").mkdir()
    (tmp_path / ".out.unirank-link0000.tmp").symlink_to(tmp_path / "precious")
    theirs = {".out.notes.tmp", ".other.unirank-abc.tmp", ".out.unirank-abc.tmp.bak", "out.unirank-abc.tmp"}
    theirs |= {".out.unirank-file0000.tmp"}
    for name in theirs:
        (tmp_path / name).write_text("theirs")
    held = tmp_path / ".out.unirank-living00.tmp"
    held.mkdir()
    handle = os.open(held, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    filled(tmp_path / "out", "whole")
    kept = theirs | {"out", "precious", held.name, ".out.unirank-link0000.tmp"}
    assert set(os.listdir(tmp_path)) == kept | {".plan.json.unirank-abc_1234.tmp"}
    os.close(handle)
    write_text(tmp_path / "plan.json", "whole")
    filled(tmp_path / "out", "whole")
    assert set(os.listdir(tmp_path)) == kept - {held.name} | {"plan.json"}


def test_a_replacement_that_was_cut_in_two_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an exchange in one step, a kill between two renames leaves the old directory under another name."""
    filled(tmp_path / ".out.unirank-abc_1234.old", "old")
    with pytest.raises(TypeError):
        filled(tmp_path / "out", None)  # pyright: ignore[reportArgumentType]
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "one").read_text() == "old"
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: replace(a, b) if ".tmp" not in str(a) else os.rename("/-", b))
    with pytest.raises(WriteError):
        filled(tmp_path / "out", "new")
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "one").read_text() == "old"


def test_names_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "model" / "inner")
    assert beside(Path("out"), "-analysis") == Path("out-analysis")
    assert beside(Path("."), ".html") == tmp_path / "model" / "inner.html"
    assert beside(Path(".."), ".html") == tmp_path / "model.html"
    with pytest.raises(InputError, match=r"/ has no name that \.html could follow"):
        beside(Path("/"), ".html")
