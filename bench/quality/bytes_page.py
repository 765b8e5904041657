"""The page of bench_bytes.py: the table, and what its figures say. Words that judge are chosen by the figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from unirank.provenance import device_name

Row = Mapping[str, Any]
WEIGHTS = {32: "float32", 16: "bfloat16", 8: "8 bits", 4: "4 bits"}
TEXTS = ("file_perplexity", "builtin-held-out_perplexity")
_GAIN = 1.05  # a speed below this ratio is called no gain


def markdown(rows: Sequence[Row], meta: Mapping[str, Any]) -> str:
    """The page; `rows` and `meta` are those of the JSON file."""
    first, device = rows[0], device_name(torch.device("cpu"))
    lines = [
        "# Bytes, perplexity and speed",
        "",
        f"Made by `python -m bench.quality.bench_bytes`, do not edit. {first['model']}: dense, and compressed by the "
        f"preset `{meta['preset']}`; in float32, in bfloat16, and with 8 and 4 bits a weight beside bfloat16 (torchao, "
        "weight-only). Decoder linears alone are compressed and quantised; embeddings and `lm_head` stay.",
        "",
        f"Calibration: {meta['calibration_windows']} windows of WikiText-2's validation text, seed {meta['seed']}, "
        f"gradients on all of them. Perplexity on the first {meta['evaluation_windows']} windows of "
        f"`{first['file_text']}` and of `{first['builtin-held-out_text']}`. On disk: the weight files. In memory: "
        f"parameters and buffers. Tokens a second: prefill of {meta['prompt']} and decoding of {meta['steps']}, one "
        f"sequence, median of {meta['repeats']} turns; {meta['threads_of_speed']} threads, {device}, torch "
        f"{torch.__version__}.",
        "",
        "| removed | weights | WikiText | documentation | MB on disk | MB in memory | prefill | decode | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    best = [one["row"] for one in frontier(rows)]
    for one in rows:
        cells = [_removed(one), WEIGHTS[one["bits"]], *(f"{one[text]:.2f}" for text in TEXTS)]
        cells += [f"{one[f'{kind}_bytes'] / 1e6:.1f}" for kind in ("disk", "memory")]
        cells += [f"{one[f'{phase}_tokens_per_second']:,.0f}" for phase in ("prefill", "decode")]
        lines.append(f"| {' | '.join(cells)} | {'*' if one['row'] in best else ''} |")
    lines += ["", "\\* No other row is at most as large on disk and at most as bad on both texts.", ""]
    lines += ["## What the figures say", "", *(f"* {sentence}" for sentence in findings(rows))]
    return "\n".join(lines) + "\n"


def dominates(one: Row, other: Row) -> bool:
    """Whether `one` is at most `other` in bytes on disk and in both perplexities, and less in one of them."""
    keys = ("disk_bytes", *TEXTS)
    return all(one[key] <= other[key] for key in keys) and any(one[key] < other[key] for key in keys)


def frontier(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other row dominates."""
    return [row for row in rows if not any(dominates(other, row) for other in rows)]


def findings(rows: Sequence[Row]) -> list[str]:
    """Sentences."""
    at = {(one["remove"], one["bits"]): one for one in rows}
    removes = sorted({one["remove"] for one in rows if one["remove"]})
    return [
        _bytes_alone([at[remove, 16] for remove in removes], at[0, 8]),
        *(_both(at, removes, bits) for bits in (8, 4)),
        *(_cost_of_bits(at, removes, bits) for bits in (8, 4)),
        *(_speed(at, removes, phase) for phase in ("prefill", "decode")),
        _unbeaten(rows),
    ]


def _bytes_alone(alone: Sequence[Row], eight: Row) -> str:
    """Low rank without bits against bits without low rank."""
    worse = [_removed(one) for one in alone if dominates(eight, one)]
    each = "; ".join(f"{_removed(one)} {_size(one)}" for one in alone)
    if len(worse) == len(alone):
        verdict = "is larger and worse at every ratio. If only bytes matter, take 8 bits"
    elif worse:
        verdict = f"is larger and worse at {', '.join(worse)} removed"
    else:
        verdict = "is at no ratio both larger and worse"
    return f"**Bytes alone.** Dense with 8 bits is {_size(eight)}. Low rank alone ({each}) {verdict}."


def _both(at: Mapping[tuple[float, int], Row], removes: Sequence[float], bits: int) -> str:
    """Low rank with bits against bits without low rank."""
    dense, both = at[0, bits], [at[remove, bits] for remove in removes]
    saved = ", ".join(f"{1 - one['disk_bytes'] / dense['disk_bytes']:.0%}" for one in both)
    times = ", ".join(f"{one[TEXTS[0]] / dense[TEXTS[0]]:.2f}" for one in both)
    return (
        f"**Low rank with {bits} bits**, against dense with {bits} bits: {saved} fewer bytes on disk at "
        f"{_percents(removes)} removed, and {times} times the perplexity on WikiText."
    )


def _cost_of_bits(at: Mapping[tuple[float, int], Row], removes: Sequence[float], bits: int) -> str:
    """What the same bits cost the compressed models and the dense one."""

    def cost(remove: float) -> float:
        return at[remove, bits][TEXTS[0]] / at[remove, 16][TEXTS[0]] - 1

    costs = ", ".join(f"{cost(remove):+.1%}" for remove in removes)
    more = [remove for remove in removes if cost(remove) > cost(0) + 0.005]
    verdict = f"more at {_percents(more)} removed" if more else "nowhere more"
    return (
        f"**What {bits} bits cost** in perplexity on WikiText: {costs} at {_percents(removes)} removed, {cost(0):+.1%} "
        f"dense; {verdict}."
    )


def _speed(at: Mapping[tuple[float, int], Row], removes: Sequence[float], phase: str) -> str:
    """Tokens a second of the compressed models over the dense one's with the same weights."""

    def ratio(remove: float, bits: int) -> float:
        return at[remove, bits][f"{phase}_tokens_per_second"] / at[0, bits][f"{phase}_tokens_per_second"]

    kinds = (16, 8, 4)
    parts = [f"{', '.join(f'{ratio(one, bits):.2f}' for one in removes)} ({WEIGHTS[bits]})" for bits in kinds]
    faster = [WEIGHTS[bits] for bits in kinds if ratio(removes[-1], bits) >= _GAIN]
    verdict = f"faster with {', '.join(faster)}" if faster else "with no weights faster"
    return (
        f"**{phase.capitalize()}**, times dense with the same weights at {_percents(removes)} removed: "
        f"{'; '.join(parts)}. At {removes[-1]:.0%} it is {verdict}, by {_GAIN} times or more."
    )


def _unbeaten(rows: Sequence[Row]) -> str:
    """The frontier."""
    ordered = sorted(frontier(rows), key=lambda one: one["disk_bytes"], reverse=True)
    shown = "; ".join(f"{_removed(one)} in {WEIGHTS[one['bits']]}, {_size(one)}" for one in ordered)
    return f"**Unbeaten** in bytes and perplexity, from large to small: {shown}."


def _removed(row: Row) -> str:
    return f"{row['remove']:.0%}" if row["remove"] else "dense"


def _percents(removes: Sequence[float]) -> str:
    return ", ".join(f"{remove:.0%}" for remove in removes)


def _size(row: Row) -> str:
    return f"{row['disk_bytes'] / 1e6:.0f} MB at perplexity {row[TEXTS[0]]:.1f}"
