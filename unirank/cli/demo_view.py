"""What the demo prints: the table, a sentence of each model, and where it pays and where not."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from unirank.cli.demo import DemoResult, DemoRow

_COLUMNS = ("recipe", "removed", "perplexity", "x dense", "parameters", "MB", "GFLOPs a token")


def demo_record(result: DemoResult) -> dict[str, Any]:
    """For --json."""
    pages = [str(page) for page in result.pages]
    record = {"rows": [asdict(row) for row in result.rows], "seconds": result.seconds, "meta": result.meta}
    return record | {"int8_bytes": result.int8_bytes, "pages": pages}


def demo_view(result: DemoResult) -> list[Any]:
    """For people."""
    from unirank.cli.demo import PROMPT

    first = result.rows[0]
    table = Table(
        title=f"{first.model}: perplexity on the held-out part of Python's documentation", title_justify="left"
    )
    for index, column in enumerate(_COLUMNS):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in result.rows:
        table.add_row(
            _label(row),
            f"{1 - row.used / first.used:.2%}",
            f"{row.perplexity:.2f}",
            f"{row.perplexity / first.perplexity:.2f}",
            f"{row.parameters:,}",
            f"{row.bytes / 1e6:.1f}",
            f"{row.flops / 1e9:.3f}",
        )
    said = Text(f"\n{PROMPT} ...\n")
    for row in result.rows:
        said.append(f"  {_label(row)} {row.remove:.0%}: ", style="bold")
        said.append(" ".join(row.sample.split()) + "\n")
    seconds = "  ".join(f"{stage} {value:.1f} s" for stage, value in result.seconds.items())
    pages = Text("Look at: " + ", ".join(map(str, result.pages)))
    return [table, said, *_verdict(result), Text(f"Seconds per stage, summed: {seconds}"), pages]


def _label(row: DemoRow) -> str:
    return row.preset or row.allocator


def _verdict(result: DemoResult) -> list[Text]:
    """Where it pays, and where not, from the numbers above."""
    dense, *others = result.rows
    ratio = {(_label(row), row.remove): row.perplexity / dense.perplexity for row in others}
    best = min(others, key=lambda row: (row.remove, row.perplexity))
    gains = [
        f"{ratio[_label(best), at]:.2f} instead of {value:.2f} times the dense perplexity at {at:.0%}"
        for (label, at), value in ratio.items()
        if label == "uniform" and (_label(best), at) in ratio
    ]
    smallest = min(others, key=lambda row: row.bytes)
    small = f"{smallest.bytes / 1e6:,.1f} MB at {ratio[_label(smallest), smallest.remove]:.2f} times"
    price = f"{ratio[_label(best), best.remove] - 1:+.1%} perplexity"
    lines = [
        f"Where it pays: arithmetic. {_label(best)} at {best.remove:.0%} needs {1 - best.flops / dense.flops:.1%} "
        f"fewer operations a token for {price}. Papers report smaller losses for models of 7B.",
        f"Why not the same rank everywhere: {_label(best)} has {', '.join(gains)}." if gains else "",
        f"Where not: bytes alone. 8-bit weights take the dense model from {dense.bytes / 1e6:,.1f} MB to "
        f"{result.int8_bytes / 1e6:,.1f} MB at nearly its perplexity (docs/bytes.md); the smallest one above has "
        f"{small}. Both together: unirank quantize.",
    ]
    return [Text(f"{line}\n") for line in lines if line]
