"""Small parts of the page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

UNMEASURED = "not measured"


def text(value: Any) -> str:
    """`value` as text of the page."""
    return escape(str(value))


def section(title: str, body: str, lead: str = "", *, style: str = "") -> str:
    """A section with its heading; `lead` is a paragraph of plain text."""
    said = f"<p>{escape(lead)}</p>" if lead else ""
    kind = f' class="{style}"' if style else ""
    return f"<section{kind}><h2>{escape(title)}</h2>{said}{body}</section>"


def scrolling(label: str, body: str) -> str:
    """What may be wider than the page. It takes the focus, so that a keyboard can scroll it."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label, quote=True)}">{body}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of HTML cells; the first cell of a row is its heading."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def facts(found: Mapping[str, Any]) -> str:
    """Names and values as a table without a head."""
    rows = "".join(f'<tr><th scope="row">{text(k)}</th><td>{text(v)}</td></tr>' for k, v in found.items())
    return f'<table class="facts"><tbody>{rows}</tbody></table>'


def figures(charts: Mapping[str, str]) -> str:
    """Charts beside each other, each under its caption."""
    parts = (f"<figure><figcaption>{text(name)}</figcaption>{chart}</figure>" for name, chart in charts.items())
    return f'<div class="charts">{"".join(parts)}</div>'


def pair(dense: str, compressed: str) -> str:
    """Two texts beside each other."""
    parts = (
        f"<div><strong>{label}</strong><pre>{text(without_tail(said))}</pre></div>"
        for label, said in (("dense", dense), ("compressed", compressed))
    )
    return f'<div class="pair">{"".join(parts)}</div>'


def without_tail(said: str) -> str:
    """Empty lines at the end, which damaged models like to write, as a count of them."""
    kept = said.rstrip()
    empty = said[len(kept) :].count("\n")
    return f"{kept}\n[{empty} empty lines]" if empty > 1 else kept


def percent(share: float) -> str:
    """ "20 %", "2.5 %", "15.7 %"."""
    return f"{100 * share:.3g} %"


def rounded(value: float) -> str:
    """A perplexity, or tokens a second, with as many digits behind the point as say something."""
    if value >= 1e6:
        return f"{value:.3g}"
    return f"{value:,.{2 if value < 100 else 1 if value < 1000 else 0}f}"
