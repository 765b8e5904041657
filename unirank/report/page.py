"""The report as one HTML page: no script, no request, light, dark and print."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape, unescape
from importlib.resources import files
from pathlib import Path
from re import search
from typing import Any

from unirank.disk.strictjson import Damaged, parse_object
from unirank.errors import InputError
from unirank.report import html
from unirank.report.cautions import warnings_section
from unirank.report.curve_section import curve_section
from unirank.report.first_screen import before_and_after, verdict
from unirank.report.gather import ReportData
from unirank.report.making import made_by, making_section
from unirank.report.sections import allocation_sections, linears_section, samples_section
from unirank.report.training_section import training_sections

_STYLE = files("unirank.report").joinpath("style.css").read_text(encoding="utf-8")
_META = '<meta name="unirank-page" content="{}">'


def page(data: ReportData, made_with: Mapping[str, Any] | None = None) -> str:
    """The whole page: the verdict first, settings and hashes last. Text from outside is escaped.

    Args:
        made_with: what `page_inputs` reads again: the files that went into it.
    """
    source = data.record.source
    title = f"{data.name}, compressed from {source}" if source else f"{data.name}, a compressed model"
    sections = [f"<h1>{escape(title)}</h1>", verdict(data), before_and_after(data)]
    if data.curve is not None:
        sections.append(curve_section(data, data.curve))
    sections += [warnings_section(data), *allocation_sections(data)]
    if data.samples:
        sections.append(samples_section(data))
    sections += [html.section(title, body) for title, body in training_sections(data.record.training)]
    sections += [linears_section(data), making_section(data), f'<p class="soft">{made_by(data)}</p>']
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"{_META.format(escape(json.dumps(made_with or {}), quote=True))}"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(sections)
        + "\n</main></body></html>\n"
    )


def page_inputs(file: Path) -> dict[str, Any] | None:
    """The `made_with` of a page; None where unirank did not write it. Raises InputError where it is unreadable."""
    try:
        with file.open(encoding="utf-8") as content:
            head = content.read(20_000)
    except UnicodeDecodeError:
        return None
    except OSError as error:
        raise InputError(f"The page {file} cannot be read: {error}.") from error
    found = search(_META.format('([^"]*)'), head)
    if found is None:
        return None
    try:
        return parse_object(unescape(found[1]))
    except Damaged:
        return None
