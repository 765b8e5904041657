"""A diagnosis on disk: `diagnose.json` and scatter plots as PNG files. Needs matplotlib, the extra `plot`."""

from __future__ import annotations

import itertools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from unirank.diagnosis.claim import GROUPS, Diagnosis, Point, Reading
from unirank.disk.files import check_output, staged_directory, write_atomically, write_json
from unirank.errors import InputError

RESULTS = "diagnose.json"
_COLUMNS = 3
_MARKERS = "o^sDvP*X"  # of the sublayers, in the order in which they come


def require_matplotlib() -> None:
    """Raise InputError when matplotlib is not installed; to be called before any expensive work."""
    if find_spec("matplotlib") is None:
        raise InputError("Pictures need matplotlib, which is not installed: pip install 'unirank[plot]'.")


def check_folder(out: Path, *, overwrite: bool = False) -> None:
    """Check cheaply that `save` can succeed: InputError without matplotlib, or if `out` must not be replaced."""
    require_matplotlib()
    check_output(out, marker=RESULTS, overwrite=overwrite)


def save(diagnosis: Diagnosis, out: Path, *, overwrite: bool = False) -> list[Path]:
    """Write `diagnose.json` and the pictures into the directory `out`, all or nothing. Raises like `check_folder`."""
    check_folder(out, overwrite=overwrite)
    with staged_directory(out) as folder:
        write_json(folder / RESULTS, diagnosis.as_dict())
        pictures = draw(diagnosis, folder)
    return [out / RESULTS, *(out / picture.name for picture in pictures)]


def draw(diagnosis: Diagnosis, folder: Path) -> list[Path]:
    """One PNG a group of readings, `diagnose-GROUP.png`: effective rank over cosine, one panel a reading.

    Raises InputError without matplotlib, WriteError when the disk refuses.
    """
    require_matplotlib()
    written = []
    for group, title in GROUPS.items():
        readings = [reading for reading in diagnosis.readings if reading.group == group]
        if readings:
            path = folder / f"diagnose-{group}.png"
            figure = _figure(title if group != "scheme" else f"{title} {diagnosis.about['scheme']}", readings)
            write_atomically(path, lambda temporary, figure=figure: figure.savefig(temporary, format="png", dpi=130))
            written.append(path)
    return written


def _figure(title: str, readings: list[Reading]) -> Any:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure  # without pyplot: no state, no window
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator

    columns = min(_COLUMNS, len(readings))
    rows = -(-len(readings) // columns)
    figure = Figure(figsize=(4.2 * columns + 1.2, 3.3 * rows + 1.0), layout="constrained")
    figure.suptitle(f"Effective rank and cosine: {title}")
    layers = Normalize(0, max(point.layer for reading in readings for point in reading.points))
    # Cosines crowd below 1; their distance from 1 on a log axis spreads them. A cosine of exactly 1 has no place there.
    spread = all(point.cosine < 1 for reading in readings for point in reading.points)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    panels = list(grid.flat)
    present = dict.fromkeys(point.sublayer for reading in readings for point in reading.points)
    markers = dict(zip(present, itertools.cycle(_MARKERS)))
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    for axes, reading in zip(panels, readings, strict=False):
        for sublayer, marker in markers.items():
            members = [point for point in reading.points if point.sublayer == sublayer]
            axes.scatter(
                [1 - point.cosine if spread else point.cosine for point in members],
                [point.energy for point in members],
                c=[point.layer for point in members],
                norm=layers,
                cmap="viridis",
                marker=marker,
                s=34,
                edgecolors="black",
                linewidths=0.4,
            )
        if spread:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(plain)
        if _wide(reading.points):
            axes.set_yscale("log")
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            axes.yaxis.set_major_formatter(plain)
            axes.yaxis.set_minor_formatter(plain)
        axes.set_title(f"{reading.name}\nrho = {reading.energy.rho:+.2f}, p = {reading.energy.p:.2g}", fontsize=10)
        axes.grid(alpha=0.3)
    for axes in panels[len(readings) :]:
        axes.set_visible(False)
    if spread:
        panels[0].invert_xaxis()  # shared: the cosine grows to the right
    for index, axes in enumerate(panels[: len(readings)]):
        if index + columns >= len(readings):  # nothing below it
            axes.xaxis.set_tick_params(labelbottom=True)
        if readings[index].of_k:
            axes.set_ylabel("effective rank / K")
        elif index % columns == 0:
            axes.set_ylabel("effective rank")
    figure.supxlabel("1 - cosine (higher cosine to the right)" if spread else "cosine", fontsize=10)
    handles = [
        Line2D([], [], marker=marker, color="white", markerfacecolor="grey", markeredgecolor="black", label=sublayer)
        for sublayer, marker in markers.items()
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False)
    figure.colorbar(ScalarMappable(layers, "viridis"), ax=grid, label="layer", aspect=40, pad=0.01)
    return figure


def _wide(points: tuple[Point, ...]) -> bool:
    """Whether effective ranks span more than a factor of 10, so that a linear axis would hide most."""
    ranks = [point.energy for point in points]
    return min(ranks) > 0 and max(ranks) > 10 * min(ranks)
