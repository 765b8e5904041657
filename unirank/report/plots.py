"""The report's charts as PNG and SVG files, for papers and slides. Needs matplotlib, the extra `plot`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unirank.diagnosis.plots import require_matplotlib
from unirank.disk.files import check_output, staged_directory, write_json
from unirank.report import curves
from unirank.report.gather import ReportData

CONTENTS = "plots.json"
_SIZE = (6.4, 4.0)  # inches


def check_plots(out: Path, *, overwrite: bool = False) -> None:
    """Check cheaply that `save_plots` can succeed: InputError without matplotlib, or if `out` must not be replaced."""
    require_matplotlib()
    check_output(out, marker=CONTENTS, overwrite=overwrite)


def save_plots(data: ReportData, out: Path, *, overwrite: bool = False) -> list[Path]:
    """Write every chart that `data` has numbers for, and a list of them, into the directory `out`: all or nothing.

    The same data gives the same bytes. Raises like `check_plots`, and WriteError when the disk refuses.
    """
    check_plots(out, overwrite=overwrite)
    from matplotlib import rc_context

    figures = {"ranks": _ranks(data), "kept": _lines(curves.kept_by_layer(data), "layer", "kept fraction")}
    if data.cosines:
        figures["importance"] = _lines(curves.importance_by_layer(data), "layer", "1 - cosine", log=True)
        figures["cosines"] = _cosines(data)
    for spectrum in data.spectra:
        name = f"spectrum-{spectrum.kind.replace('.', '-')}"
        figures[name] = _lines(spectrum.curves, "rank / K", "energy beyond", log=True, title=spectrum.kind, dots=False)
    for index, (text, (found, _)) in enumerate(curves.perplexity_curves(data).items(), start=1):
        name = f"perplexity-{index}"
        figures[name] = _lines(found, "removed fraction", "perplexity", log=True, title=text)
    with staged_directory(out) as folder, rc_context({"svg.hashsalt": "unirank"}):
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.png", dpi=150)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        write_json(folder / CONTENTS, {"model": data.name, "plots": list(figures)})
    return [out / f"{name}.{kind}" for name in figures for kind in ("png", "svg")]


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # without pyplot: no state, no window

    figure = Figure(figsize=_SIZE, layout="constrained")
    return figure, figure.subplots()


def _ranks(data: ReportData) -> Any:
    """Kept fraction of each matrix, layer by projection (UniRank's Figure 4); of a stack of experts the mean."""
    kinds = list(dict.fromkeys(linear.kind for linear in data.linears))
    layers = max(linear.layer for linear in data.linears) + 1
    table = [[float("nan")] * len(kinds) for _ in range(layers)]
    cells: dict[tuple[int, str], list[float]] = {}
    for linear in data.linears:
        cells.setdefault((linear.layer, linear.kind), []).append(linear.kept)
    for (layer, kind), kept in cells.items():
        table[layer][kinds.index(kind)] = sum(kept) / len(kept)
    figure, axes = _figure()
    figure.set_size_inches(1.6 + 0.7 * len(kinds), 1.6 + 0.18 * max(layers, 8))
    image = axes.imshow(table, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks(range(len(kinds)), [kind.rsplit(".", 1)[-1] for kind in kinds], rotation=40, ha="right")
    axes.set_ylabel("layer")
    figure.colorbar(image, label="kept fraction")
    return figure


def _lines(
    found: Mapping[str, Sequence[tuple[float, float]]],
    x: str,
    y: str,
    *,
    log: bool = False,
    title: str = "",
    dots: bool = True,
) -> Any:
    figure, axes = _figure()
    for label, curve in found.items():
        # A log axis has no place for 0; the curve ends there.
        points = [point for point in curve if point[1] > 0 or not log]
        axes.plot(*zip(*points, strict=True), label=label, marker="o" if dots else None, markersize=3.5)
    if log:
        axes.set_yscale("log")
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def _cosines(data: ReportData) -> Any:
    """Cosine against effective rank (UniRank's Figure 3)."""
    figure, axes = _figure()
    for marker, (sublayer, points) in zip(itertools.cycle("o^sDvP*X"), curves.cosine_points(data).items()):
        axes.scatter([1 - point[1] for point in points], [point[2] for point in points], label=sublayer, marker=marker)
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set(xlabel="1 - cosine (higher cosine to the right)", ylabel="effective rank of the last linear")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure
