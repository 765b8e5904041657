"""The whole job in one call: what it accepts, what it keeps, and what it refuses before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import unirank
from tests.support.tiny import build
from unirank import InputError, StoreError

IDS = torch.arange(2, 30)[None]


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_a_streamed_model_saves_whether_its_store_is_kept_or_not(
    stream: bool, keep: bool, model_dir: Path, calibration, tmp_path: Path
) -> None:
    """Of a streamed model the factors are read when it is saved: a temporary store must live as long."""
    store = tmp_path / "store" if keep else None
    compressed = unirank.compress(
        unirank.load(model_dir, device="cpu", stream=stream), 0.3, calibration=calibration, store=store
    )
    compressed.save(tmp_path / "out")
    again = unirank.open_compressed(tmp_path / "out", device="cpu")
    whole = unirank.compress(str(model_dir), 0.3, calibration=calibration, device="cpu")
    assert torch.equal(logits(again.model), logits(whole.model))


def test_a_temporary_store_goes_with_what_was_made_from_it(
    model_dir: Path, calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    compressed = unirank.compress(str(model_dir), 0.3, calibration=calibration, device="cpu", stream=True)
    assert list((tmp_path / "scratch").iterdir())
    del compressed
    assert not list((tmp_path / "scratch").iterdir())
    unirank.compress(str(model_dir), 0.3, calibration=calibration, device="cpu")
    with pytest.raises(InputError):
        unirank.compress(str(model_dir), 0.3, calibration="missing.txt", device="cpu")
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.filterwarnings("ignore:The text words.txt:unirank.UnirankWarning")  # for 64 windows of 512 it is short
def test_a_text_is_a_calibration(make_model, text_file: Path, tmp_path: Path) -> None:
    small = {"windows": 64, "window": 512}
    for given in (str(text_file), text_file):
        store = unirank.analyze(make_model(max_position_embeddings=512), tmp_path / "store", calibration=given)
        assert store.identity.calibration.text == text_file.name
        assert {key: getattr(store.identity.calibration, key) for key in small} == small
        assert unirank.Calibration(text=given).text == str(text_file)
    for wrong in (7, {"text": "x"}, ["a"]):
        with pytest.raises(InputError, match=r"is not legal; it is a unirank\.Calibration"):
            unirank.compress(make_model(), 0.3, calibration=wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=r"Calibration\.text = 7 is not legal"):
        unirank.Calibration(text=7)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("refine", [None, unirank.Refine()])
def test_a_copy_leaves_the_model_dense(make_model, calibration, text_file: Path, tmp_path: Path, refine) -> None:
    loaded = make_model()
    before = logits(loaded.model)
    store = unirank.analyze(loaded, tmp_path / "store", calibration=calibration)
    windows = unirank.make_workbench(loaded, store, text=str(text_file)).windows
    plan = unirank.plan(store, 0.4)
    first = unirank.apply(loaded, store, plan, refine=refine, windows=windows, copy=True)
    assert torch.equal(logits(loaded.model), before)
    assert getattr(loaded.model.config, "quantization_config", None) is None
    second = unirank.apply(loaded, store, plan, refine=refine, windows=windows)
    assert torch.equal(logits(first.model), logits(second.model))
    assert second.model is loaded.model
    for use in (
        lambda: unirank.apply(loaded, store, plan),
        lambda: unirank.analyze(loaded, tmp_path / "other", calibration=calibration),
        lambda: unirank.compress(loaded, 0.2, calibration=calibration),
        lambda: unirank.make_workbench(loaded, store, text=str(text_file)),
    ):
        with pytest.raises(InputError, match=r"compressed in place .* load it again, or .*copy=True"):
            use()


def test_a_streamed_model_is_not_copied(model_dir: Path, calibration, tmp_path: Path) -> None:
    loaded = unirank.load(model_dir, device="cpu", stream=True)
    store = unirank.analyze(loaded, tmp_path / "store", calibration=calibration)
    with pytest.raises(InputError, match="A copy needs the whole model in memory"):
        unirank.apply(loaded, store, unirank.plan(store, 0.3), copy=True)


def test_ranks_from_anywhere(make_model, calibration, tmp_path: Path) -> None:
    store = unirank.analyze(make_model(), tmp_path / "store", calibration=calibration)
    plan = unirank.plan(store.path, 0.3)  # a directory will do
    file = tmp_path / "ranks.json"
    file.write_text(json.dumps(dict(plan.ranks)))
    for ranks in (plan, plan.ranks, dict(plan.ranks), file, str(file)):
        assert unirank.plan(store, ranks=ranks).ranks == plan.ranks
        made = unirank.compress(make_model(), ranks=ranks, store=store.path)
        assert made.plan.ranks == plan.ranks
        assert made.report.targets_after == plan.used
    for arguments in ({}, {"remove": 0.3, "ranks": plan}):
        with pytest.raises(InputError, match="Exactly one of remove= and ranks= is needed"):
            unirank.plan(store, **arguments)
        with pytest.raises(InputError, match="Exactly one of remove=, ranks= and target= is needed"):
            unirank.compress("nowhere", **arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"preset": "magic"}, "legal values: unirank, fast, best"),
        ({"preset": "fast", "scheme": "svd"}, "preset = 'fast' sets .* scheme= is given too"),
        ({"scheme": "magic"}, "The scheme 'magic' does not exist"),
        ({"allocator": "magic"}, "The allocator 'magic' does not exist"),
        ({"preset": "fast", "stream": True}, r"stream=True covers .* the second pass would run the whole model"),
        ({"min_rank": 0}, "min_rank = 0 is not legal"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_looked_for(arguments: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        unirank.compress("nowhere", 0.3, **arguments)


def test_a_store_that_lacks_what_a_preset_needs_says_what_makes_it(make_model, calibration, tmp_path: Path) -> None:
    plain = unirank.analyze(make_model(), tmp_path / "plain", calibration=calibration)
    with pytest.raises(
        StoreError,
        match=r"has the scheme whiten, and afm is needed; .* --scheme afm --calib words\.txt --windows 6 --window 24",
    ):
        unirank.plan(plain, 0.3, preset="fast")
    with pytest.raises(StoreError, match=r"has the scheme whiten, and kfac is needed; .* --gradients 6"):
        unirank.compress(make_model(), 0.3, preset="best", store=plain.path)
    with pytest.raises(StoreError, match="has no gradients, and the allocator curvature needs them"):
        unirank.compress(make_model(), 0.3, allocator="curvature", store=plain.path)
    best = unirank.analyze(make_model(), tmp_path / "best", preset="best", calibration=calibration)
    assert best.identity.scheme == "kfac"
    assert best.has_gradients


@pytest.mark.parametrize("preset", ["unirank", "fast"])
def test_a_finished_store_needs_the_place_of_its_text_alone(
    preset: str, make_model, calibration, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows its file by name, and windows, seed and batch by number: nobody should have to say those again."""
    store = unirank.analyze(make_model(), tmp_path / "store", preset=preset, calibration=calibration)
    monkeypatch.setattr("unirank.analysis.fill_store.calibrate_layer", lambda *_, **__: pytest.fail("calibrated again"))
    made = unirank.compress(make_model(), 0.3, preset=preset, calibration=str(text_file), store=store.path)
    assert made.identity == store.identity
    assert ("refine" in made.plan.settings) == (preset == "fast")
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text()[:-40])
    with pytest.raises(StoreError, match="belongs to another analysis"):
        unirank.compress(make_model(), 0.3, preset=preset, calibration=str(other), store=store.path)


def test_the_scheme_of_a_finished_store_will_do_where_none_is_asked_for(
    make_model, calibration, tmp_path: Path
) -> None:
    store = unirank.analyze(make_model(), tmp_path / "store", scheme="afm", calibration=calibration)
    assert unirank.compress(make_model(), 0.3, store=store.path).plan.scheme == "afm"
    ranks = unirank.plan(store, 0.3, allocator="uniform")
    assert unirank.compress(make_model(), ranks=ranks, store=store.path).plan == ranks
    with pytest.raises(StoreError, match="has the scheme afm, and whiten is needed"):
        unirank.compress(make_model(), 0.3, scheme="whiten", store=store.path)


def test_a_dry_run_takes_a_preset(model_dir: Path, calibration, tmp_path: Path) -> None:
    plain, best = (
        unirank.dry_run(model_dir, tmp_path / "store", preset=preset, calibration=calibration, device="cpu")
        for preset in ("unirank", "best")
    )
    assert best.disk > plain.disk  # gradients
    assert not (tmp_path / "store").exists()


def test_a_model_in_memory_needs_its_tokenizer() -> None:
    with pytest.raises(InputError, match="needs its tokenizer="):
        unirank.compress(build("llama"), 0.3)
