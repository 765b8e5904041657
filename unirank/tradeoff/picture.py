"""A curve as a picture that stands alone: SVG, and PNG by matplotlib (the extra `plot`)."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from typing import Any

from unirank.diagnosis.plots import require_matplotlib
from unirank.disk.files import make_directory, write_atomically, write_text
from unirank.evaluation.measured_curve import Curve
from unirank.report import svg
from unirank.tradeoff.kept import CURVE_FILE
from unirank.tradeoff.showing import markdown

_WIDE, _HIGH, _GAP, _TITLE, _LINE = 340, 220, 16, 20, 16  # pixels of a chart, between two, of its title, of a legend
_X, _Y = "removed fraction of the decoder's weights", "perplexity"
# The colours of the report, in light and dark.
_STYLE = """
svg { color-scheme: light dark; --fg: #1b1f24; --bg: #fff; --soft: #57606a; --rule: #d0d7de;
  --c0: #0b5cad; --c1: #b3430b; --c2: #1a7f37; --c3: #8250df; --c4: #8a5a00; --c5: #bf3989; }
@media (prefers-color-scheme: dark) { svg { --fg: #e6edf3; --bg: #0d1117; --soft: #9aa4b0; --rule: #3d444d;
  --c0: #6cb6ff; --c1: #ff9b5e; --c2: #57d364; --c3: #c297ff; --c4: #e3b341; --c5: #ff8ac6; } }
text { fill: var(--fg); font: 11px system-ui, sans-serif; } .title { font-weight: 600; }
.page { fill: var(--bg); } .axis { stroke: var(--soft); fill: none; } .grid { stroke: var(--rule); stroke-width: .6; }
.line { fill: none; stroke: currentColor; stroke-width: 1.8; } .mark { fill: currentColor; }
.s0 { color: var(--c0); } .s1 { color: var(--c1); } .s2 { color: var(--c2); }
.s3 { color: var(--c3); } .s4 { color: var(--c4); } .s5 { color: var(--c5); }
"""


def series_of(curve: Curve, text: int) -> dict[str, list[tuple[float, float]]]:
    """Perplexity on one text over the counted fraction, by preset, each from the dense model on."""
    return {
        preset: [(point.removed_of_targets, point.evaluations[text].perplexity) for point in curve.of(preset)]
        for preset in curve.presets
    }


def picture(curve: Curve) -> str:
    """One chart a text, side by side, with a log scale and one legend; light or dark as the reader's page is."""
    parts, count = [], len(curve.texts)
    width, below = count * _WIDE + (count + 1) * _GAP, _GAP + _TITLE + _HIGH
    for index, text in enumerate(curve.texts):
        left = _GAP + index * (_WIDE + _GAP)
        title = f"perplexity on {text}"
        drawn = svg.lines(title, series_of(curve, index), x=_X, y=_Y, log_y=True, dots=True)
        chart = drawn.partition("<ul")[0]  # its legend is for a page
        place = f'<svg x="{left}" y="{_GAP + _TITLE}" width="{_WIDE}" height="{_HIGH}"'
        parts.append(f'<text class="title" x="{left}" y="{_GAP + 10}">{escape(title)}</text>')
        parts.append(re.sub(r"^<svg", place, chart))
    for index, preset in enumerate(curve.presets):
        y = below + 4 + index * _LINE
        parts.append(f'<circle class="s{index % 6} mark" cx="{_GAP + 62}" cy="{y + 6}" r="3.2"/>')
        parts.append(f'<text x="{_GAP + 72}" y="{y + 10}">{escape(preset)}</text>')
    high = below + len(curve.presets) * _LINE + _GAP
    label = escape(f"{curve.model}: {_Y} over {_X}", quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {high}" width="{width}" height="{high}" '
        f'role="img" aria-label="{label}"><style>{_STYLE}</style><rect class="page" width="100%" height="100%"/>'
        f"{''.join(parts)}</svg>\n"
    )


def check_picture(*, png: bool) -> None:
    """Raise InputError where a PNG is asked for and matplotlib is not there."""
    if png:
        require_matplotlib()


def write_curve(curve: Curve, out: Path, *, png: bool = False) -> list[Path]:
    """Write `curve.json`, `curve.md`, `curve.svg`, and with `png` `curve.png`, into the directory `out`.

    Raises InputError without matplotlib where a PNG is asked for, and WriteError when the disk refuses.
    """
    check_picture(png=png)
    make_directory(out)
    texts = {CURVE_FILE: curve.to_json(), "curve.md": markdown(curve), "curve.svg": picture(curve)}
    for name, text in texts.items():
        write_text(out / name, text)
    files = [out / name for name in texts]
    if png:
        files.append(out / "curve.png")
        figure = _figure(curve)
        write_atomically(files[-1], lambda file: figure.savefig(file, dpi=150, format="png"))
    return files


def _figure(curve: Curve) -> Any:
    from matplotlib.figure import Figure  # without pyplot: no state, no window
    from matplotlib.ticker import LogFormatter

    figure = Figure(figsize=(5.2 * len(curve.texts), 3.8), layout="constrained")
    panels = figure.subplots(1, len(curve.texts), squeeze=False)[0]
    for index, (axes, text) in enumerate(zip(panels, curve.texts, strict=True)):
        for preset, points in series_of(curve, index).items():
            axes.plot(*zip(*points, strict=True), label=preset, marker="o", markersize=3.5)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())  # 100, and not a power of ten
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.4)))
        axes.set(xlabel=_X, ylabel=_Y, title=text)
        axes.grid(alpha=0.3, which="both")
        axes.legend(frameon=False)
    return figure
