"""How objects look: a few lines in a terminal, tables and a heat map in a notebook. What comes from outside is escaped.

The records that pass between the stages use it in `__repr__` and `_repr_html_`, the report for its heat map.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

LINES, WIDTH = 8, 100  # of a repr: what a notebook or a debugger shows without scrolling (**choice**)


def lines(title: str, *rows: str) -> str:
    """A repr: the title, then each row that is not empty behind two spaces; never more than LINES of WIDTH characters.

    A title that is too long goes on in a second line; a row that is too long ends in three dots.
    """
    parts = [title] if len(title) <= WIDTH else [*_broken(title)]
    parts += [f"  {row}" for row in rows if row]
    # Names from outside may have line breaks in them.
    return "\n".join(shortened(" ".join(part.splitlines()), WIDTH) for part in parts[:LINES])


def shortened(text: str, width: int) -> str:
    """`text`, or its beginning and three dots, of at most `width` characters."""
    return text if len(text) <= width else text[: width - 3] + "..."


def _broken(title: str) -> tuple[str, str]:
    at = title.rfind(" ", 0, WIDTH)
    return (title[:at], "    " + title[at + 1 :]) if at > 0 else (title, "")


def megabytes(size: float) -> str:
    """Bytes for people."""
    return f"{size / 1e6:,.1f} MB"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """An HTML table; the first cell of a row is its heading."""
    above = f'<caption style="text-align:left">{escape(caption)}</caption>' if caption else ""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row" style="text-align:left">{escape(first)}</th>'
        + "".join(f'<td style="text-align:right">{escape(cell)}</td>' for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return f"<table>{above}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def text(said: str) -> str:
    """Lines of text as HTML."""
    return f"<pre>{escape(said)}</pre>"


def heat(cells: Iterable[tuple[int, str, float, str]]) -> str:
    """A heat map as an HTML table, layers by projections.

    Args:
        cells: layer, path of the projection inside of a layer, the share in [0, 1] that is shown, a title for hovering.
    """
    found = {(layer, kind): (share, title) for layer, kind, share, title in cells}
    kinds = list(dict.fromkeys(kind for _, kind in found))
    short = [escape(kind.rsplit(".", 1)[-1]).replace("_", "_<wbr>") for kind in kinds]
    head = "".join(f'<th scope="col">{kind}</th>' for kind in short)
    rows = []
    for layer in sorted({layer for layer, _ in found}):
        row = "".join(_cell(*found[layer, kind]) if (layer, kind) in found else "<td></td>" for kind in kinds)
        rows.append(f'<tr><th scope="row">{layer}</th>{row}</tr>')
    return (
        # It can be wider than what it stands in, and takes the focus so that a keyboard can scroll it.
        '<div class="scroll" tabindex="0" role="region" aria-label="layer by projection">'
        '<table class="heat"><caption class="soft">layer by projection</caption>'
        f'<thead><tr><th scope="col">layer</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _cell(share: float, title: str) -> str:
    # From nearly white to dark blue; the text is whichever of black and white has the more contrast.
    red, green, blue = (round(a + (b - a) * share) for a, b in zip((238, 244, 255), (8, 48, 107), strict=True))
    ink = "#000" if _luminance(red, green, blue) > 0.18 else "#fff"
    style = f"background:rgb({red},{green},{blue});color:{ink}"
    return f'<td style="{style}" title="{escape(title, quote=True)}">{share:.2f}</td>'


def _luminance(*rgb: int) -> float:
    """Relative luminance (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in rgb)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
