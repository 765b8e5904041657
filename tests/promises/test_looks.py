"""What a notebook shows: a few lines of every object, and tables in which nothing from outside is HTML."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import unirank
from unirank import looks
from unirank.evaluation.tasks import TaskReport, TaskResult
from unirank.models.low_rank import LowRankLinear
from unirank.types import LoadedModel

EVIL = "<script>alert(1)</script>"
LAYERS = 40  # as many as make a dataclass's own repr long


def assert_short(shown: object) -> str:
    said = repr(shown)
    rows = said.splitlines()
    assert len(rows) <= 8
    assert max(map(len, rows)) <= 100
    assert rows[0].startswith(f"{type(shown).__name__}: ")
    return said


class _Wellformed(HTMLParser):
    """Checks that every tag is closed in order; keeps the tags that there are."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag != "wbr":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def assert_html(shown: object) -> str:
    page = shown._repr_html_()  # pyright: ignore[reportAttributeAccessIssue]
    parser = _Wellformed()
    parser.feed(page)
    assert not parser.open
    assert "script" not in parser.tags
    return page


@pytest.fixture(scope="module")
def lent(tokenizer) -> LoadedModel:
    from tests.support.tiny import build

    return unirank.describe(build("llama", num_hidden_layers=LAYERS), tokenizer, source=f"models/{EVIL}")


@pytest.fixture(scope="module")
def store(lent: LoadedModel, settings, tmp_path_factory: pytest.TempPathFactory) -> unirank.AnalysisStore:
    return unirank.analyze(lent, tmp_path_factory.mktemp("looks") / EVIL.replace("/", "-"), calibration=settings)


@pytest.fixture(scope="module")
def compressed(lent: LoadedModel, store: unirank.AnalysisStore) -> unirank.CompressedModel:
    return unirank.apply(lent, store, unirank.plan(store, 0.3), copy=True)


def test_every_record_is_a_few_lines(
    lent: LoadedModel, store: unirank.AnalysisStore, compressed: unirank.CompressedModel, settings, text_file: Path
) -> None:
    bench = unirank.make_workbench(lent, store, text=str(text_file))
    left, right = store.factors(store.linears[0], 4)
    report = unirank.evaluate(lent.model, lent.tokenizer, text=str(text_file), window=64, limit=2)
    diagnosis = unirank.diagnose(store, loaded=lent, text=str(text_file), windows=2)
    for shown in (
        lent,
        store,
        compressed,
        compressed.plan,
        compressed.report,
        bench,
        report,
        diagnosis,
        compressed.model.config.quantization_config,
        unirank.Factors(left, right, store.energies()[store.linears[0].name], 0.0),
    ):
        assert_short(shown)
    assert "30.0" in repr(compressed)
    assert ".generate(" in repr(compressed)
    assert "unirank.plan(store" in repr(store)
    assert f"perplexity {report.perplexity:.2f}" in repr(report)


def test_so_are_those_of_numbers_alone() -> None:
    needs = unirank.Needs(12.0, 2**31, 2**32, 2**31, 2**30, 2**33, 2**34, 30, "cpu")
    assert "it fits" in assert_short(needs)
    quantized = unirank.QuantizeReport(4, 128, 210, 12, 538_060_032, 112_800_000)
    assert "538.1 MB to 112.8 MB" in assert_short(quantized)
    results = tuple(TaskResult(f"task-{i}", "acc", "none", 0.5, None, 10, 0, "1") for i in range(30))
    assert "and 25 more" in assert_short(TaskReport(results, "0.4.13", 8, None, "float32"))
    assert "low-rank" not in repr(LowRankLinear)  # a class is a class


def test_a_notebook_gets_tables_and_the_heat_map(
    store: unirank.AnalysisStore, compressed: unirank.CompressedModel
) -> None:
    plan, of_store, of_model = map(assert_html, (compressed.plan, store, compressed))
    assert plan.count("<td style=") == len(compressed.plan.ranks)  # a cell a linear
    assert of_store.count("<tr>") == 1 + store.layer_count
    assert compressed.plan.heat_map() in of_model
    assert f"{compressed.report.model_after:,}" in of_model
    assert EVIL not in plan + of_store + of_model
    assert "&lt;script&gt;" in of_model  # shown, as text


def test_a_store_that_is_damaged_or_unfinished_can_be_looked_at(store: unirank.AnalysisStore, tmp_path: Path) -> None:
    import shutil

    copy = unirank.open_store(shutil.copytree(store.path, tmp_path / "store"))
    copy.layer_file(2).write_bytes(b"damage")
    assert "missing or damaged" in assert_html(copy)
    copy.layer_file(2).unlink()
    assert f"2 of {LAYERS} layers" in assert_html(copy)
    assert "resumes" in assert_short(copy)


def test_long_and_broken_names_stay_in_their_lines() -> None:
    said = looks.lines("A title " + "long " * 40, "a\nb", "", "x" * 200, *"123456789")
    assert len(said.splitlines()) == 8
    assert max(map(len, said.splitlines())) <= 100
    assert "  a b" in said
    assert re.search(r"x{90,}\.\.\.$", said, re.M)
    assert looks.heat([(0, "a.b_c", 0.25, '"<b>"')]).count("&quot;&lt;b&gt;&quot;") == 1


def test_a_compressed_model_generates_and_evaluates(
    compressed: unirank.CompressedModel, lent: LoadedModel, text_file: Path
) -> None:
    said = compressed.generate("w1 w2 w3", tokens=3)
    assert said == unirank.generate(compressed.model, compressed.tokenizer, "w1 w2 w3", tokens=3)
    report = compressed.evaluate(text_file, window=64, limit=2)
    assert report == unirank.evaluate(compressed.model, compressed.tokenizer, text=str(text_file), window=64, limit=2)
    assert torch.isfinite(torch.tensor(report.perplexity))
    assert compressed.plan != unirank.plan(unirank.open_store(compressed.store or ""), 0.4)
