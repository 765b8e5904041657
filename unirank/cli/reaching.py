"""How a target was met, in the terminal's words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from unirank.tradeoff.automatic import AutoResult
    from unirank.tradeoff.choosing import Reached


def reached_line(reached: Reached) -> str:
    """What was chosen, and by what margin."""
    target, chosen = reached.target, f"Chosen: --remove {reached.remove:g}."
    if reached.search is None or reached.dense is None or reached.point is None:
        what = "parameters" if target.params is not None else "bytes"
        if target.bits is not None:
            what += f" with {target.bits} bits"
        limit = target.params or target.size or 0
        left = limit - (reached.amount or 0)
        return (
            f"{chosen} {reached.amount:,} {what} of {limit:,} allowed ({left:,} left); dense {reached.dense_amount:,}."
        )
    allowed = target.max_perplexity_increase or 0.0
    dense, measured = reached.dense.evaluations[0], reached.point.evaluations[0]
    search = reached.search
    beyond = "" if search.fails is None else f" {search.fails:g} is too much: {dict(search.tried)[search.fails]:+.2%}."
    return (
        f"{chosen} Perplexity on {reached.text}: {measured.perplexity:.2f}, {reached.increase:+.2%} over the dense "
        f"{dense.perplexity:.2f} ({100 * allowed:g} % allowed, {100 * (allowed - reached.increase):.2f} points "
        f"left).{beyond} {len(search.tried)} evaluations of at most {target.evaluations}, and the dense model's."
    )


def tried_table(result: AutoResult) -> Table:
    """One row a preset: how far it came, or why it was not tried."""
    table = Table(title="presets that were tried", title_justify="left")
    for index, column in enumerate(
        ("preset", "removed", "perplexity", "x dense", "parameters", "measured", "minutes", "")
    ):
        table.add_column(column, justify="left" if index in (0, 7) else "right")
    for one in result.tried:
        cells = [""] * 4
        if one.point is not None and one.increase is not None:
            perplexity = one.point.evaluations[0].perplexity
            cells = [
                f"{one.point.remove:.2%}",
                f"{perplexity:.2f}",
                f"{1 + one.increase:.3f}",
                f"{one.point.parameters:,}",
            ]
        told = "chosen" if one.preset == result.preset else one.why
        table.add_row(one.preset, *cells, str(one.evaluations), f"{one.seconds / 60:.1f}", told)
    return table
