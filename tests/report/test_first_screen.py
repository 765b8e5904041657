"""The first screen: a verdict from the numbers, before and after, the curve, and warnings."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest

import unirank
from tests.support.measured import a_curve
from tests.support.tiny import build
from unirank.analysis.deficient import Deficient
from unirank.analysis.identity import TextIdentity
from unirank.analysis.store import open_store
from unirank.compression.evaluations import evaluation_of
from unirank.errors import InputError
from unirank.evaluation.perplexity import EvalReport
from unirank.evaluation.speed import Speed
from unirank.report.cautions import RULES, cautions
from unirank.report.first_screen import before_and_after, verdict
from unirank.report.gather import Linear, ReportData, gather
from unirank.report.page import page

REPORT = EvalReport(26.0, 3.2, "first", "sha of first", 16, 2, 30, False, "float32", 1000)
DENSE = replace(REPORT, perplexity=20.0)
SLOW, QUICK = (Speed(rate * 10, rate, 128, 16, 3, 1.1, "cpu", "float32", 2) for rate in (10.0, 12.0))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tokenizer, text_file: Path) -> Path:
    """A tiny Llama, 40 % removed, with its store."""
    folder = tmp_path_factory.mktemp("made")
    loaded = unirank.describe(build("llama"), tokenizer, source="tiny-llama")
    calibration = unirank.Calibration(text=str(text_file), windows=6, window=24, batch=2)
    unirank.compress(loaded, 0.4, calibration=calibration, store=folder / "OUT-analysis").save(folder / "OUT")
    return folder


@pytest.fixture(scope="module")
def plain(made: Path) -> ReportData:
    return gather(made / "OUT", open_store(made / "OUT-analysis"), None)


def measured(data: ReportData, *evaluations: dict[str, Any]) -> ReportData:
    return replace(data, record=replace(data.record, evaluations=evaluations))


def words(html: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())


def test_what_was_not_measured_comes_with_the_command(plain: ReportData) -> None:
    said = words(verdict(plain))
    removed = plain.record.report.removed_of_targets
    assert said.startswith(f"{100 * removed:.3g} % of the decoder's weights are gone. Not measured: ")
    assert "perplexity, tokens a second and a generated text. This command measures them: " in said
    assert said.endswith("unirank eval OUT --against tiny-llama")
    rows = words(before_and_after(plain))
    assert "perplexity not measured" in rows
    assert "tokens a second, writing not measured" in rows


def test_the_verdict_is_made_of_the_numbers(plain: ReportData) -> None:
    one = evaluation_of(REPORT, dense=DENSE, speed=(SLOW, QUICK), sample=("Once", " a", " b"))
    other = evaluation_of(
        replace(REPORT, text="second", text_sha256="x", perplexity=33.0), dense=replace(DENSE, perplexity=30.0)
    )
    data = measured(plain, one, other)
    assert words(verdict(data)).endswith(
        "are gone; perplexity on first is 1.30 times the dense one and 1.10 times on second; 1.20 times the tokens a "
        "second while it writes, 1.20 times while it reads a prompt."
    )
    table = words(before_and_after(data))
    report = plain.record.report
    for row in (
        f"million parameters {report.model_before / 1e6:,.1f} {report.model_after / 1e6:,.1f}",
        "perplexity on first 20.00 26.00 1.30",
        "perplexity on second 30.00 33.00 1.10",
        "tokens a second, reading a prompt 100.0 120.0 1.20",
        "tokens a second, writing 10.00 12.00 1.20",
        "Generated behind “Once” dense a compressed b",
    ):
        assert row in table
    alone = measured(plain, evaluation_of(REPORT))
    assert "perplexity is 26.00 on first. Not measured: the dense model's perplexity, " in words(verdict(alone))
    again = measured(plain, one, evaluation_of(replace(REPORT, perplexity=40.0), dense=DENSE))
    assert "perplexity on first is 2.00 times the dense one" in words(verdict(again))  # the newest of a text


def test_megabytes_are_of_the_files_and_of_the_dense_weights_in_the_same_dtype(plain: ReportData, made: Path) -> None:
    assert plain.dtype == "float32"
    assert plain.bytes_before == 4 * plain.record.report.model_before
    assert plain.bytes_after == (made / "OUT" / "model.safetensors").stat().st_size


def test_verdict_curve_and_warnings_come_first_and_hashes_last(made: Path, tmp_path: Path, plain: ReportData) -> None:
    curve = a_curve()
    before = plain.record.report.model_before
    curve = replace(curve, dense=replace(curve.dense, parameters=before))
    (tmp_path / "curve.json").write_text(curve.to_json())
    data = gather(made / "OUT", None, None, curve=tmp_path / "curve.json")
    text = page(measured(data, evaluation_of(REPORT, dense=DENSE)))
    places = [
        text.index(part)
        for part in (
            'class="verdict"',
            ">Before and after<",
            ">How far one can go<",
            ">Warnings<",
            ">Rank allocation<",
            ">Every linear<",
            ">Make it again<",
            data.plan.analysis,
        )
    ]
    assert places == sorted(places)
    identity = data.record.identity
    assert identity is not None
    assert text.index(identity.model.weights_sha256) > places[-2]
    rings, lines = text.count('<circle class="here"'), text.count('<path class="here"')
    assert (rings, lines) == (2, 2)  # on one text it was measured, on the other not; each in its legend too
    assert "perplexity on second was not measured; a line shows what it removes" in text
    assert "the curve on" not in text
    other = measured(data, evaluation_of(replace(REPORT, windows=9), dense=DENSE))
    assert "measured on 9 windows of 16 tokens of first, the curve on 2 of 16." in page(other)
    for content, told in ((a_curve().to_json(), "is of a model of 1,200 parameters; "), ("{}", "not a unirank curve")):
        (tmp_path / "curve.json").write_text(content)
        with pytest.raises(InputError, match=told):
            gather(made / "OUT", None, None, curve=tmp_path / "curve.json")


def test_without_anything_to_warn_of_the_rules_are_named(plain: ReportData) -> None:
    calm = replace(plain, damping=dict.fromkeys(plain.damping, 0.0), deficient=())
    calm = replace(calm, linears=tuple(replace(linear, kept=0.6, rank=9) for linear in calm.linears))
    assert cautions(calm) == []
    assert RULES in unescape(page(calm))


def test_every_warning_has_its_rule(plain: ReportData) -> None:
    def said(data: ReportData) -> str:
        return " | ".join(cautions(data))

    calm = replace(plain, damping=dict.fromkeys(plain.damping, 0.0), deficient=())
    calm = replace(calm, linears=tuple(replace(linear, kept=0.6, rank=9) for linear in calm.linears))
    bad = measured(calm, evaluation_of(replace(REPORT, perplexity=40.2), dense=DENSE))
    assert "Perplexity is 2.01 times the dense one on first: unusable without unirank heal or unirank finetune" in said(
        bad
    )
    assert said(measured(calm, evaluation_of(replace(REPORT, perplexity=40.0), dense=DENSE))) == ""
    last = max(linear.layer for linear in calm.linears)

    def with_last(kept: float) -> ReportData:
        return replace(calm, linears=tuple(replace(x, kept=kept) if x.layer == last else x for x in calm.linears))

    assert f"Collapsed: layer {last} (29 %). The median layer keeps 60 % of its weights" in said(with_last(0.29))
    assert said(with_last(0.31)) == ""
    first, *rest = calm.linears
    assert f"1 matrix has a rank of 1, so next to nothing is left there: {first.name}." in said(
        replace(calm, linears=(replace(first, rank=1), *rest))
    )
    wide = Linear("model.layers.0.wide", 0, "wide", 8, 6 * 24 + 1, 4, 0.6)
    few = "Calibration had 144 tokens, fewer than the 145 inputs of model.layers.0.wide"
    assert few in said(replace(calm, linears=(*calm.linears, wide)))
    assert "Take at least 7 windows of 24 tokens." in said(replace(calm, linears=(*calm.linears, wide)))
    assert said(replace(calm, linears=(*calm.linears, replace(wide, n=144)))) == ""
    identity = calm.record.identity
    assert identity is not None
    same = replace(REPORT, text_sha256=str(identity.calibration.text_sha256))
    assert "Perplexity on first is of the calibration text, and so too good." in said(
        measured(calm, evaluation_of(same))
    )
    builtin = replace(identity, calibration=replace(identity.calibration, text="builtin"))
    assert "Calibrated on the built-in text, Python's documentation" in said(
        replace(calm, record=replace(calm.record, identity=builtin))
    )
    texts = tuple(TextIdentity(name=name, sha256="0", windows=3) for name in ("a.txt", "builtin"))
    several = replace(identity, calibration=replace(identity.calibration, text="a.txt,builtin", texts=texts))
    assert "Calibrated on the built-in text" in said(replace(calm, record=replace(calm.record, identity=several)))
    damped = replace(calm, damping={**calm.damping, first.name: 0.01})
    assert f"1 of {len(calm.damping)} matrices were damped, at most by 0.01 of the mean ({first.name})" in said(damped)
    assert "at most 5 of 16" in said(replace(calm, deficient=(Deficient(first.name, 5, 16),)))


def test_speeds_of_a_busy_machine_are_no_verdict(plain: ReportData) -> None:
    busy = evaluation_of(REPORT, dense=DENSE, speed=(SLOW, replace(QUICK, spread=2.5)))
    data = measured(plain, busy)
    assert "times the tokens a second" not in verdict(data)
    assert "Not measured: a generated text" in words(verdict(data))
    assert "turns differ by a factor of 2.5, so they cannot be compared" in " ".join(cautions(data))
    assert "tokens a second, writing 10.00 12.00 One" not in words(before_and_after(data))
    assert "tokens a second, writing 10.00 12.00 1.20" not in words(before_and_after(data))


def test_numbers_that_are_none_do_not_break_the_page(plain: ReportData) -> None:
    for dense, now in ((0.0, 1.0), (1e308, 1e-308), (1e-308, 1e308), (float("inf"), 1.0)):
        data = measured(plain, evaluation_of(replace(REPORT, perplexity=now), dense=replace(DENSE, perplexity=dense)))
        assert "</html>" in page(data)
