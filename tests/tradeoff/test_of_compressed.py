"""A compressed model's own curve, and how a curve looks."""

from __future__ import annotations

from pathlib import Path

import pytest

import unirank
from tests.support.tiny import build
from unirank.evaluation.measured_curve import Curve

OPTIONS = {"remove": (0.2, 0.5), "more": 0, "window": 32, "limit": 2}


@pytest.fixture
def small(model_dir: Path, calibration: unirank.Calibration, tmp_path: Path) -> Path:
    """A checkpoint beside its analysis, as the command line leaves it."""
    out = tmp_path / "small"
    made = unirank.compress(model_dir, 0.3, calibration=calibration, store=tmp_path / "small-analysis", device="cpu")
    made.save(out)
    return out


def test_it_is_the_curve_of_its_dense_model_and_its_store(small: Path, text_file: Path, model_dir: Path) -> None:
    compressed = unirank.open_compressed(small)
    made = compressed.curve(text_file, **OPTIONS)
    dense = unirank.load(model_dir, device="cpu")
    own = unirank.evaluate(dense.model, dense.tokenizer, text=str(text_file), window=32, limit=2)
    assert made.dense.evaluations == (own,)
    assert [(point.preset, point.remove) for point in made.points] == [("unirank", 0.2), ("unirank", 0.5)]
    in_memory = compressed.curve(text_file, against=dense.model, store=small.parent / "small-analysis", **OPTIONS)
    assert [p.evaluations for p in in_memory.points] == [p.evaluations for p in made.points]
    assert dense.model is not compressed.model


def test_it_looks_like_a_few_lines_and_like_a_picture_with_its_table(small: Path, text_file: Path) -> None:
    made = unirank.open_compressed(small).curve(text_file, **OPTIONS)
    for shown in (made, made.dense, made.points[0]):
        rows = repr(shown).splitlines()
        assert len(rows) <= 8
        assert max(map(len, rows)) <= 100
    assert "2 points of unirank" in repr(made)
    page = Curve.from_json(made.to_json().replace('"model": "', '"model": "<b>'))._repr_html_()
    assert page.count("<tr>") == 1 + 3
    assert page.startswith("<svg")
    assert "<b>" not in page
    assert "&lt;b&gt;" in page


def test_a_store_that_is_gone_or_another_one_is_refused(
    small: Path, text_file: Path, tokenizer, calibration: unirank.Calibration, tmp_path: Path
) -> None:
    compressed = unirank.open_compressed(small)
    other = unirank.analyze(build("llama"), tmp_path / "other", calibration=calibration, tokenizer=tokenizer)
    with pytest.raises(unirank.InputError, match="is not the one that the model was made from"):
        compressed.curve(text_file, store=other, **OPTIONS)
    (small.parent / "small-analysis").rename(tmp_path / "moved")
    with pytest.raises(unirank.InputError, match="not known, or gone; name its directory with store="):
        compressed.curve(text_file, **OPTIONS)
    assert len(compressed.curve(text_file, store=tmp_path / "moved", **OPTIONS).points) == 2


def test_the_preset_is_that_of_its_scheme_and_allocator(small: Path) -> None:
    import dataclasses

    from unirank.tradeoff.of_compressed import _preset

    plan = unirank.open_compressed(small).plan
    for scheme, allocator, preset in (
        ("whiten", "unirank", "unirank"),
        ("afm", "lems", "fast"),
        ("kfac", "lems", "best"),
        ("kfac", "uniform", "best"),
        ("svd", "uniform", "unirank"),
    ):
        assert _preset(dataclasses.replace(plan, scheme=scheme, allocator=allocator)) == preset
