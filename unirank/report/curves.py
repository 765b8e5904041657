"""The numbers behind each chart, for the page and for matplotlib alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from unirank.report.gather import Linear, ReportData
from unirank.types import BLOCK

Curve = list[tuple[float, float]]
SHOWN = 6  # more curves than these cannot be told apart


def kept_by_layer(data: ReportData) -> dict[str, Curve]:
    """Kept fraction of each sublayer's weights by layer."""
    groups: dict[str, dict[int, list[Linear]]] = {}
    for linear in data.linears:
        key = linear.sublayer or linear.kind.split(".")[0]
        groups.setdefault(key, {}).setdefault(linear.layer, []).append(linear)

    def kept(members: Sequence[Linear]) -> float:
        return sum(x.kept * x.m * x.n for x in members) / sum(x.m * x.n for x in members)

    return {
        key: [(float(layer), kept(members)) for layer, members in sorted(layers.items())]
        for key, layers in groups.items()
    }


def importance_by_layer(data: ReportData) -> dict[str, Curve]:
    """`1 - cosine` of each sublayer by layer."""
    return {
        key: [(float(i), 1 - cosines[key]) for i, cosines in enumerate(data.cosines) if key in cosines]
        for key in _sublayers(data)
    }


def cosine_points(data: ReportData) -> dict[str, list[tuple[int, float, float]]]:
    """Layer, cosine, and the effective rank of the sublayer's last linear, by sublayer."""
    points: dict[str, list[tuple[int, float, float]]] = {}
    for sublayer in _sublayers(data):
        for layer, cosines in enumerate(data.cosines):
            members = [x for x in data.linears if x.layer == layer and x.sublayer == sublayer]
            if members and members[-1].effective_rank is not None:
                points.setdefault(sublayer, []).append((layer, cosines[sublayer], members[-1].effective_rank))
    return points


def _sublayers(data: ReportData) -> list[str]:
    return list(dict.fromkeys(key for cosines in data.cosines for key in cosines if key != BLOCK))


def perplexity_curves(data: ReportData) -> dict[str, tuple[dict[str, Curve], int]]:
    """By text: perplexity over removed fraction (a mean over seeds) of the best recipes, and how many there are."""
    found = {}
    for text in dict.fromkeys(row["text"] for row in data.grid):
        rows = [row for row in data.grid if row["text"] == text]
        dense = [row["perplexity"] for row in rows if row["dense"]]
        start = [(0.0, sum(dense) / len(dense))] if dense else []
        curves: dict[str, Curve] = {}
        for label in dict.fromkeys(row["label"] for row in rows if not row["dense"]):
            by_remove: dict[float, list[float]] = {}
            for row in rows:
                if row["label"] == label and not row["dense"]:
                    by_remove.setdefault(row["remove"], []).append(row["perplexity"])
            curves[label] = start + [(at, sum(v) / len(v)) for at, v in sorted(by_remove.items())]
        # The best at the largest fraction.
        best: Mapping[str, Curve] = dict(sorted(curves.items(), key=lambda item: item[1][-1][1])[:SHOWN])
        found[text] = (dict(best), len(curves))
    return found
