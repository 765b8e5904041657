"""What the pages promise about the code, and the code about the pages."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import unirank
from tests.support.components import cost, request_of
from unirank.analysis.scheme.base import Problem
from unirank.tradeoff.picture import picture
from unirank.tradeoff.showing import markdown

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
METHOD = (DOCS / "method.md").read_text()


def sections() -> dict[int, str]:
    """Titles of the numbered sections of docs/method.md."""
    return {int(number): title for number, title in re.findall(r"^## (\d+)\. (.+)$", METHOD, re.M)}


def cited() -> list[tuple[str, int]]:
    """Every "method N" of the code, its tests and benchmarks, and the file where it stands."""
    found = []
    for folder in ("unirank", "tests", "bench", "csrc", "examples"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h") and path != Path(__file__):
                numbers = re.findall(r"\bmethod (\d+)\b", path.read_text())
                found += [(str(path.relative_to(ROOT)), int(number)) for number in numbers]
    return found


def test_sections_of_the_method_are_numbered_without_a_gap() -> None:
    assert list(sections()) == list(range(1, len(sections()) + 1))


def test_every_section_that_the_code_cites_is_there() -> None:
    assert len(cited()) > 10
    assert {(file, number) for file, number in cited() if number not in sections()} == set()


@pytest.mark.parametrize(
    ("file", "title"),
    [
        ("unirank/planning/allocator/unirank.py", "Score and truncation"),
        ("unirank/compression/refine.py", "Schemes"),
        ("unirank/planning/allocator/curvature.py", "Allocators"),
        ("unirank/finetuning/tuning.py", "Rank-preserving fine-tuning"),
        ("unirank/evaluation/perplexity.py", "Conventions"),
        ("unirank/text/windows.py", "Reference figures"),
    ],
)
def test_a_citation_leads_to_the_right_section(file: str, title: str) -> None:
    assert {sections()[number].startswith(title) for where, number in cited() if where == file} == {True}


@pytest.mark.parametrize("names", [unirank.schemes(), unirank.allocators(), unirank.presets()])
def test_everything_with_a_name_has_its_row_in_the_method(names: tuple[str, ...]) -> None:
    assert [name for name in names if f"\n| `{name}` |" not in METHOD] == []


def test_every_page_stands_in_the_site_and_on_its_first_page() -> None:
    nav = (ROOT / "mkdocs.yml").read_text()
    first = (DOCS / "index.md").read_text()
    for page in sorted(path.name for path in DOCS.glob("*.md")):
        assert f"- {page}" in nav, page
        assert page in ("index.md", "licences.md") or f"({page})" in first, page


def test_figures_of_the_guide_stand_in_the_results() -> None:
    """docs/how-to-choose.md quotes; what is generated again must be quoted again."""
    guide = re.sub(r"^    .*$|`[^`]*`", "", (DOCS / "how-to-choose.md").read_text(), flags=re.M)
    pages = ("results.md", "finetuning-results.md", "inference.md", "bytes.md")
    results = "".join((DOCS / name).read_text() for name in pages)
    measured = set(re.findall(r"\d+\.\d+", results))
    quoted = re.findall(r"\d+\.\d+", guide)
    assert len(quoted) > 30
    assert [figure for figure in quoted if figure not in measured] == []


@pytest.mark.parametrize("page", ["architecture.md", "contributing.md", "verification.md", "reliability.md"])
def test_files_that_the_pages_name_are_there(page: str) -> None:
    named = re.findall(r"`((?:unirank|tests|docs|examples|bench|csrc|tools)/[\w/.-]+)`", (DOCS / page).read_text())
    # Capitals stand for any name.
    missing = [path for path in named if not re.search(r"[A-Z]{2}", path) and not (ROOT / path).exists()]
    assert missing == []


def code_of(page: str, part: str) -> dict[str, Any]:
    """What the one Python block under a heading of a page defines."""
    under = (DOCS / page).read_text().split(f"\n## {part}\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"^```python\n(.*?)^```", under, re.M | re.S)
    names: dict[str, Any] = {}
    exec(compile(block, f"{page}: {part}", "exec"), names)
    return names


def test_the_allocator_of_the_contributing_page_works() -> None:
    rule = code_of("contributing.md", "Add an allocator")["ALLOCATOR"]
    assert rule.name not in unirank.allocators()
    request = replace(request_of(seed=1, layers=4, remove=0.4, scale=8), options=dict(rule.options))
    ranks, _ = rule.allocate(request)
    assert 0.99 * request.budget <= cost(request, ranks) <= request.budget


def test_the_scheme_of_the_contributing_page_works() -> None:
    scheme = code_of("contributing.md", "Add a scheme")["SCHEME"]
    assert scheme.name not in unirank.schemes()
    weight = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    weight[2] = 0.0
    (factors,) = scheme.decompose([Problem("w", weight, None, max_rank=6)])
    torch.testing.assert_close(factors.left @ factors.right, weight.double())
    assert bool((factors.energy.diff() <= 0).all())


def test_the_picture_and_the_table_of_the_curve_are_of_its_figures() -> None:
    curve = unirank.Curve.from_json((DOCS / "curve.json").read_text())
    assert (DOCS / "curve.svg").read_text() == picture(curve)
    rows = [line for line in markdown(curve).splitlines() if line.startswith("| ")]
    assert len(rows) > 10
    page = (DOCS / "how-far.md").read_text()
    assert [row for row in rows if row not in page] == []
    assert "docs/curve.svg" in (ROOT / "README.md").read_text()
