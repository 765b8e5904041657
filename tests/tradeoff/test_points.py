"""A point of a curve is what `compress` and `evaluate` give, to the bit, and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import unirank
from tests.support.tiny import build
from unirank import InputError, Preset, StoreError
from unirank.finetuning.settings import Heal
from unirank.models.loading import load_pretrained
from unirank.tradeoff.points import Points
from unirank.types import LoadedModel

CALIBRATION: dict[str, Any] = {"windows": 6, "window": 24, "batch": 2, "gradient_windows": 2}
REFINE = unirank.Refine(centred=True)
RECIPES = {
    "unirank": unirank.recipe("unirank"),
    "fast": unirank.recipe("fast"),
    "best": unirank.recipe("best"),
    "refine": Preset("whiten", "uniform", refine=replace(REFINE, dense=True)),
    "means": Preset("afm", "unirank", form="pivoted"),
    "measured": Preset("whiten", "lems"),
    "healed": Preset("whiten", "unirank", heal=Heal(passes=1)),
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> dict[str, Path]:
    """Dense checkpoints: tied and without biases, untied and with them."""
    found = {}
    for name in ("llama", "llama-bias"):
        found[name] = tmp_path_factory.mktemp("dense") / name
        build(name, num_hidden_layers=2).save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def stores(paths, tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Callable[[str, str], Path]:
    """`stores("llama", "afm")` is a finished store."""
    folder, made = tmp_path_factory.mktemp("stores"), {}

    def store(name: str, scheme: str) -> Path:
        place = folder / f"{name}-{scheme}"
        if place not in made:
            calibration = unirank.Calibration(text=str(text_file), **CALIBRATION)
            made[place] = unirank.analyze(paths[name], place, scheme=scheme, calibration=calibration, device="cpu")
        return place

    return store


@pytest.fixture
def points_of(paths, stores, text_file: Path):
    """`points_of("llama", **options) -> Points`, of a model that was loaded for it."""

    def make(name: str = "llama", **options: Any) -> Points:
        loaded = unirank.load(str(paths[name]), device="cpu")
        asked = {"texts": [str(text_file)], "window": 32, "limit": 6, "calibration": str(text_file)} | options
        return Points(loaded, lambda recipe: unirank.open_store(stores(name, recipe.scheme)), **asked)

    return make


def state_of(loaded: LoadedModel) -> dict[str, tuple[int, bytes]]:
    """Where every tensor is, and what it holds."""
    state = loaded.model.state_dict()
    return {name: (tensor.data_ptr(), tensor.numpy().tobytes()) for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("llama", "unirank"),
        ("llama", "fast"),
        ("llama", "best"),
        ("llama", "healed"),
        ("llama-bias", "means"),
        ("llama-bias", "measured"),
        ("llama-bias", "fast"),
        ("llama-bias", "refine"),
    ],
)
def test_a_point_is_what_eval_says_of_the_checkpoint_that_compress_saves(
    name: str, recipe: str, points_of, paths, stores, text_file: Path, tmp_path: Path
) -> None:
    points, chosen = points_of(name), RECIPES[recipe]
    before = state_of(points.loaded)
    removes = (0.5, 0.3) if chosen.refine is None and chosen.heal is None else (0.4,)
    dense, found = points.dense(), [points.at(chosen, remove, name=recipe) for remove in removes]
    assert state_of(points.loaded) == before
    assert not hasattr(points.loaded.model.config, "quantization_config")
    asked = {"text": str(text_file), "window": 32, "limit": 6}
    assert dense.evaluations == (unirank.evaluate(*load_pretrained(paths[name], device="cpu"), **asked),)
    parts = {part: getattr(chosen, part) for part in ("scheme", "allocator", "refine", "form", "heal")}
    for remove, point in zip(removes, found, strict=True):
        multiple = unirank.api.fitting_multiple(  # presets alone have it
            points.loaded.linears, remove, chosen.multiple_of, form=chosen.form
        )
        compressed = unirank.compress(
            paths[name],
            remove,
            **parts,
            multiple_of=multiple,
            store=stores(name, chosen.scheme),
            calibration=str(text_file),
            device="cpu",
        )
        saved = compressed.save(tmp_path / f"{remove}")
        assert point.evaluations == (unirank.evaluate(*load_pretrained(saved, device="cpu"), **asked),)
        assert (point.used, point.budget) == (compressed.plan.used, compressed.plan.budget)
        assert point.removed_of_targets == compressed.report.removed_of_targets
        assert point.removed_of_model == compressed.report.removed_of_model
        assert point.parameters == compressed.report.model_after
        assert (point.preset, point.remove) == (recipe, remove)


def test_only_matrices_whose_rank_changed_are_made_again(points_of) -> None:
    points = points_of()
    points.at("unirank", 0.2)
    first = points.rebuilt
    ranks = [points.plan("unirank", remove).ranks for remove in (0.2, 0.22)]
    changed = sum(ranks[0][name] != ranks[1][name] and ranks[1][name] != "dense" for name in ranks[0])
    points.at("unirank", 0.22)
    assert 0 < points.rebuilt == changed < len(points.loaded.linears)
    assert first == sum(rank != "dense" for rank in ranks[0].values())


def test_a_second_run_finds_what_the_first_one_kept(points_of, tmp_path: Path) -> None:
    def run(**options: Any):
        points = points_of(place=tmp_path / "kept", **options)
        return [points.dense(), points.at("unirank", 0.3), points.at("unirank", 0.3)], points.evaluated

    first, ran = run()
    assert ran == 2
    assert run() == (first, 0)
    others, ran = run(limit=5)  # other windows are other points
    assert ran == 2
    assert others[1].evaluations != first[1].evaluations
    assert run() == (first, 0)  # and replace nothing
    points = points_of(place=tmp_path / "kept")
    points.at("unirank", 0.3, min_rank=2)
    points.at(Preset(allocator="uniform"), 0.3, name="unirank")
    points.at("unirank", 0.3, form="pivoted")
    assert points.evaluated == 3


def test_a_kept_point_that_is_damaged_is_named(points_of, tmp_path: Path) -> None:
    points_of(place=tmp_path / "kept").dense()
    (file,) = (tmp_path / "kept" / "points").glob("*.json")
    file.write_text(file.read_text().replace('"preset": "dense"', '"preset": 3'))
    with pytest.raises(InputError, match=rf"{file.name} is damaged: .*; delete it"):
        points_of(place=tmp_path / "kept").dense()


def test_a_directory_of_something_else_is_refused(points_of, tmp_path: Path) -> None:
    (tmp_path / "letters").write_text("dear")
    with pytest.raises(InputError, match="was not made by unirank"):
        points_of(place=tmp_path)


@pytest.mark.parametrize("stage", ["truncate", "perplexity, unirank 0.3", "refine"])
def test_an_interrupted_point_leaves_the_model_as_it_was(stage: str, points_of) -> None:
    def interrupt(at: str, done: int, total: int) -> None:
        if at == stage and done == 1:
            raise KeyboardInterrupt

    points = points_of("llama-bias", progress=interrupt)
    before = state_of(points.loaded)
    with pytest.raises(KeyboardInterrupt):
        points.at(RECIPES["refine"] if stage == "refine" else "unirank", 0.3)
    points.loaded.require_dense()
    assert state_of(points.loaded) == before


def test_what_cannot_be_is_said_before_any_work(points_of, text_file: Path) -> None:
    points = points_of()
    for wrong, message in (
        (lambda: points.at("unirank", 1.0), "remove = 1.0 is not legal"),
        (lambda: points.at("other", 0.2), "preset 'other' does not exist"),
        (lambda: points.at("unirank", 0.9, min_rank=20), "min_rank"),
        (lambda: points_of(texts=[]), "at least one text"),
        (lambda: points_of(texts=[str(text_file)] * 2), "content of another one"),
        (lambda: points_of(texts=["nowhere.txt"]), "'nowhere.txt' is not a file"),
    ):
        with pytest.raises(InputError, match=message):
            wrong()
    assert points.evaluated == 0


def test_a_store_of_another_scheme_is_said(paths, stores, text_file: Path) -> None:
    loaded = unirank.load(str(paths["llama"]), device="cpu")
    points = Points(loaded, lambda _: unirank.open_store(stores("llama", "whiten")), texts=[str(text_file)], window=32)
    with pytest.raises(StoreError, match="has the scheme whiten, and afm is needed"):
        points.at("fast", 0.2)


def test_speed_is_measured_where_it_is_asked_for(points_of) -> None:
    assert points_of().dense().tokens_per_second is None
    rates = points_of(speed=True).dense().tokens_per_second
    assert rates.keys() == {"prefill", "decode"}
    assert min(rates.values()) > 0
