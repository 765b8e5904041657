"""A healing that was killed resumes to the same bytes, and needs one layer at a time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import unirank
from tests.support.healing import QUICK, Killed
from tests.support.stores import contents
from unirank.compression.checkpoint import CompressedModel
from unirank.errors import InputError
from unirank.finetuning.block import Block
from unirank.finetuning.healing_streams import Group


def _kill_in(index: int):
    """A `Group.advance` that ends the run in a layer, before anything of it is written."""
    original = Group.advance

    def advance(self: Group, layer: Any, at: int) -> None:
        if at == index:
            raise Killed
        original(self, layer, at)

    return advance


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True], ids=["in memory", "streamed"])
def test_a_killed_run_resumes_to_the_same_bytes(
    stream: bool, on_disk: Path, words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(work: str) -> CompressedModel:
        small = unirank.open_compressed(on_disk / "small", device="cpu", stream=stream)
        return unirank.heal(small, words, QUICK, against=on_disk / "dense", work=tmp_path / work)

    run("whole").save(tmp_path / "expected")
    with monkeypatch.context() as patch:
        patch.setattr(Group, "advance", _kill_in(2))
        with pytest.raises(Killed):
            run("work")
    kept = sorted(path.name for path in (tmp_path / "work").iterdir())
    assert kept == ["heal.json", "layer-00000.safetensors", "layer-00001.safetensors", "stream-00002.safetensors"]
    trained = []
    original = Block.train

    def watched(self: Block, *arguments: Any, **options: Any) -> Any:
        trained.append(self._index)
        return original(self, *arguments, **options)

    monkeypatch.setattr(Block, "train", watched)
    run("work").save(tmp_path / "found")
    assert trained == [2, 3]
    assert contents(tmp_path / "found") == contents(tmp_path / "expected")
    # Nothing is trained again once all is there; streams that were lost are made again from the layers.
    run("work")
    assert trained == [2, 3]
    (tmp_path / "work" / "layer-00003.safetensors").unlink()
    run("work").save(tmp_path / "again")
    assert trained == [2, 3, 3]
    assert contents(tmp_path / "again") == contents(tmp_path / "expected")


def test_streamed_is_what_it_is_in_memory_with_one_layer_there(
    on_disk: Path, words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resident(model: Any) -> set[str]:
        return {name.split(".")[0] for name, p in model.model.layers.named_parameters() if not p.is_meta}

    expected = unirank.heal(
        on_disk / "small", words, QUICK, against=on_disk / "dense", work=tmp_path / "a", device="cpu"
    )
    small = unirank.open_compressed(on_disk / "small", device="cpu", stream=True)
    dense = unirank.load(on_disk / "dense", device="cpu", stream=True)
    seen = []
    original = Block.train

    def watched(self: Block, *arguments: Any, **options: Any) -> Any:
        seen.append((resident(small.model), resident(dense.model)))
        return original(self, *arguments, **options)

    monkeypatch.setattr(Block, "train", watched)
    healed = unirank.heal(small, words, QUICK, against=dense, work=tmp_path / "b")
    assert seen == [({str(i)}, set()) for i in range(4)]
    assert resident(small.model) == set()
    assert healed.training == expected.training
    for kind, model in (("whole", expected), ("streamed", healed)):
        model.save(tmp_path / kind)
    assert contents(tmp_path / "whole") == contents(tmp_path / "streamed")


def test_another_run_does_not_take_the_directory(pair, words, tmp_path: Path, calibration) -> None:
    dense, small = pair()
    unirank.heal(small, words, QUICK, against=dense, work=tmp_path / "work")
    fresh = unirank.compress(dense, 0.4, calibration=calibration, copy=True)
    with pytest.raises(InputError, match=r"another healing; it differs in settings.lr \(there: None, now: 0.1\)"):
        unirank.heal(fresh, words, dataclasses.replace(QUICK, lr=0.1), against=dense, work=tmp_path / "work")


def test_a_run_that_was_killed_in_its_first_file_resumes(pair, words, tmp_path: Path) -> None:
    dense, small = pair()
    left = tmp_path / "work" / ".heal.json.unirank-abc.tmp"
    left.mkdir(parents=True)
    unirank.heal(small, words, QUICK, against=dense, work=tmp_path / "work")
    assert not left.exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"was not made by unirank \(it has no heal\.json\)"):
        unirank.heal(small, words, QUICK, against=dense, work=tmp_path / "mine")
