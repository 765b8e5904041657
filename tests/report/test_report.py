"""The report: what it reads, what it shows, and how a browser lays it out."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
import struct
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

import unirank
from tests.support.command_line import Run
from tests.support.tiny import WORDS, build
from unirank.analysis.store import open_store
from unirank.errors import InputError
from unirank.looks import _cell, _luminance
from unirank.report import svg
from unirank.report.gather import gather
from unirank.report.page import page
from unirank.report.plots import save_plots
from unirank.report.write import write_report
from unirank.types import effective_rank

VOID = {"meta", "br", "wbr", "img"}


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, 40 % removed: OUT, OUT-analysis, dense, and a grid."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "words.txt").write_text(" ".join(WORDS[2 + 7 * i % 94] for i in range(3000)))
    build("llama").save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    calibration = unirank.Calibration(text=str(folder / "words.txt"), windows=6, window=24, batch=2)
    compressed = unirank.compress(
        folder / "dense", 0.4, calibration=calibration, store=folder / "OUT-analysis", device="cpu"
    )
    compressed.save(folder / "OUT")
    rows = [
        {"preset": "", "scheme": "whiten", "allocator": a, "remove": r, "text": "t<1>.txt", "perplexity": p}
        for a, r, p in (("dense", 0.0, 10.0), ("uniform", 0.2, 20.0), ("uniform", 0.4, 80.0), ("unirank", 0.4, 60.0))
    ]
    (folder / "grid.json").write_text(json.dumps({"rows": rows}))
    return folder


class Reader(HTMLParser):
    """Checks that tags nest, and collects what a page must and must not have."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_it_reads_ranks_energies_and_cosines(folder: Path) -> None:
    store = open_store(folder / "OUT-analysis")
    data = gather(folder / "OUT", store, folder / "grid.json")
    assert [linear.name for linear in data.linears] == list(data.plan.ranks)
    energies = store.energies()
    for linear in data.linears:
        energy = energies[linear.name]
        kept = len(energy) if linear.rank == "dense" else int(linear.rank)
        assert linear.energy_kept == pytest.approx(float(energy[:kept].sum() / energy.sum()))
        assert linear.effective_rank == pytest.approx(effective_rank(energy))
        assert linear.kept == data.plan.rank_cost(linear.name) / (linear.m * linear.n)
    assert data.cosines[1]["mlp"] == store.cosines()[1]["mlp"].mean
    for spectrum in data.spectra:
        for curve in spectrum.curves.values():
            assert curve[0] == (0.0, pytest.approx(1.0))
            assert curve[-1] == (1.0, 0.0)
            assert [share for _, share in curve] == sorted((share for _, share in curve), reverse=True)


def test_the_page_is_whole_and_asks_nothing_of_a_network(folder: Path) -> None:
    sample = (("w1 <b>", "w2 & w3", "w4"),)
    text = page(gather(folder / "OUT", open_store(folder / "OUT-analysis"), folder / "grid.json", sample))
    tags = Reader(text).tags
    names = [tag for tag, _ in tags]
    assert not {"script", "link", "img", "iframe"} & set(names)
    assert not re.search(r"""(src|href)=|url\(|@import|https?://""", text)
    assert "w1 &lt;b&gt;" in text
    assert "w2 &amp; w3" in text
    assert "t&lt;1&gt;.txt" in text
    assert ("html", {"lang": "en"}) in tags
    charts = [attrs for tag, attrs in tags if tag == "svg"]
    assert len(charts) > 10
    assert all((attrs.get("role") == "img" and attrs.get("aria-label")) or "aria-hidden" in attrs for attrs in charts)
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in tags if tag == "th")
    headings = [int(name[1]) for name in names if re.fullmatch(r"h[1-6]", name)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(headings))
    for linear in unirank.open_store(folder / "OUT-analysis").linears:
        assert linear.name in text


def test_every_text_has_enough_contrast(folder: Path) -> None:
    def contrast(a: tuple[int, ...], b: tuple[int, ...]) -> float:
        light, dark = sorted((_luminance(*a), _luminance(*b)), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    def colour(code: str) -> tuple[int, ...]:
        code = code if len(code) == 6 else "".join(2 * letter for letter in code)
        return tuple(int(code[i : i + 2], 16) for i in (0, 2, 4))

    text = page(gather(folder / "OUT", None, None))
    themes = [dict(re.findall(r"--(\w+):\s*#([0-9a-f]+);", block)) for block in re.findall(r":root \{([^}]*)\}", text)]
    assert len(themes) == 3  # light, dark, print
    for theme in themes:
        for ground in ("bg", "panel"):
            for ink in ("fg", "soft", *(f"c{i}" for i in range(6))):
                assert contrast(colour(theme[ink]), colour(theme[ground])) >= 4.5, (ink, ground, theme)
    cells = re.findall(r"background:rgb\((\d+),(\d+),(\d+)\);color:#(\w+)", text)
    assert cells
    for *ground, ink in cells:
        assert contrast(tuple(int(value) for value in ground), colour(ink)) >= 4.5
    for step in range(101):  # every shade, not only those of this model
        shade = _cell(step / 100, "title")
        *ground, ink = re.findall(r"rgb\((\d+),(\d+),(\d+)\);color:#(\w+)", shade)[0]
        assert contrast(tuple(int(value) for value in ground), colour(ink)) >= 4.5


@pytest.mark.parametrize("preset", unirank.presets())
def test_the_command_on_the_page_makes_the_same_model(
    preset: str, folder: Path, tmp_path: Path, run_unirank: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = unirank.Calibration(text=str(folder / "words.txt"), windows=6, window=24, batch=2, seed=3)
    compressed = unirank.compress(folder / "dense", 0.4, preset=preset, calibration=calibration, device="cpu")
    compressed.save(tmp_path / "made")
    commands = re.findall(r"<pre>(unirank .*?)</pre>", page(gather(tmp_path / "made", None, None)))
    # In a directory with what it names.
    shutil.copy(folder / "words.txt", tmp_path)
    shutil.copy(tmp_path / "made" / "rank_plan.json", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    last = tmp_path
    for command in commands:
        words = shlex.split(unescape(command))
        assert run_unirank(*words[1:])[:3:2] == (0, "")
        last = tmp_path / words[words.index("-o" if "-o" in words else "--out") + 1]
    for name in ("model.safetensors", "rank_plan.json"):
        assert (last / name).read_bytes() == (tmp_path / "made" / name).read_bytes()


def test_without_store_grid_and_samples_it_says_what_is_missing(folder: Path) -> None:
    text = page(gather(folder / "OUT", None, None))
    Reader(text)
    assert "They need the analysis store, which was not given." in text
    assert "Perplexity" not in text
    assert "Side by side" not in text


def test_plots_are_png_and_svg_of_the_same_data(folder: Path, tmp_path: Path) -> None:
    data = gather(folder / "OUT", open_store(folder / "OUT-analysis"), folder / "grid.json")
    for run in ("a", "b"):
        save_plots(data, tmp_path / run)
    names = json.loads((tmp_path / "a" / "plots.json").read_text())["plots"]
    assert names[:4] == ["ranks", "kept", "importance", "cosines"]
    assert sum(name.startswith("spectrum-") for name in names) == 7
    assert names[-1] == "perplexity-1"
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert files == sorted([f"{name}.{kind}" for name in names for kind in ("png", "svg")] + ["plots.json"])
    for file in files:
        content = (tmp_path / "a" / file).read_bytes()
        assert content == (tmp_path / "b" / file).read_bytes()
        if file.endswith(".png"):
            width, height = struct.unpack(">II", content[16:24])
            assert min(width, height) > 300
        elif file.endswith(".svg"):
            ElementTree.fromstring(content)
    with pytest.raises(InputError, match="overwrite"):
        save_plots(data, tmp_path / "a")
    save_plots(gather(folder / "OUT", None, None), tmp_path / "a", overwrite=True)
    assert sorted(file.stem for file in (tmp_path / "a").glob("*.png")) == ["kept", "ranks"]


def test_charts_survive_flat_empty_and_zero_data() -> None:
    for curve in ([(0.0, 1.0)], [(0.0, 0.0), (1.0, 0.0)], [(0.0, 1e-9), (1.0, 1.0)]):
        for log in (False, True):
            text = svg.lines("t", {"a": curve}, x="x", y="y", log_y=log, dots=True)
            Reader(text)
            assert "nan" not in text
    Reader(svg.scatter("t", {"a": [(0.0, 1.0, "p")], "b": [(0.5, 1.0, "q")]}, x="x", y="y", log_x=True))


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    other = unirank.analyze(
        unirank.load(str(folder / "dense"), device="cpu"),
        tmp_path / "store",
        calibration=unirank.Calibration(text=str(folder / "words.txt"), windows=5, window=24, batch=2),
    )
    with pytest.raises(InputError, match=r"is not the one that .* was made from"):
        gather(folder / "OUT", other, None)
    (tmp_path / "grid.json").write_text('{"rows": [{"scheme": 1}]}')
    with pytest.raises(InputError, match=r"is no result of bench_quality\.py"):
        gather(folder / "OUT", None, tmp_path / "grid.json")
    with pytest.raises(InputError, match="is not a compressed checkpoint"):
        write_report(folder / "dense", tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_the_command_finds_the_store_and_puts_texts_side_by_side(
    run_unirank: Run,
    folder: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "page.html"
    code, printed, err = run_unirank(
        "report", folder / "OUT", "-o", out, "--against", folder / "dense", "--prompt", "w1 w2", "--device", "cpu"
    )
    assert (code, err) == (0, "")
    assert f"Written: {out}" in printed
    text = out.read_text()
    assert "Spectra" in text
    assert "<h3>w1 w2</h3>" in text
    code, _, err = run_unirank("report", folder / "OUT", "-o", out, "--prompt", "w1")
    assert code == 2
    assert "--prompt needs --against" in err


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_lays_it_out_without_overflow(folder: Path, tmp_path: Path, width: int) -> None:
    out = tmp_path / "page.html"
    write_report(folder / "OUT", out, store=open_store(folder / "OUT-analysis"), grid=folder / "grid.json")
    # A frame of the width measures, for headless windows cannot be narrower than 500 pixels.
    probe = tmp_path / "probe.html"
    probe.write_text(
        f"<iframe src='page.html' style='width:{width}px;height:900px;border:0' onload='"
        'const d=this.contentDocument.documentElement;document.title=d.scrollWidth+" "+d.clientWidth\'></iframe>'
    )
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += ["--virtual-time-budget=4000", "--dump-dom", f"file://{probe}"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    measured = re.search(r"<title>(\d+) (\d+)</title>", dom)
    assert measured is not None, dom[:500]
    assert width - 20 <= int(measured[1]) <= int(measured[2])  # less than the width by a scroll bar
