"""The report as one HTML page: no script, no request, light, dark and print."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from unirank.analysis.identity import Identity
from unirank.compression.card import GONE, UNKNOWN, calibration_line
from unirank.report import curves, svg
from unirank.report.gather import Linear, ReportData
from unirank.report.training_section import healing_commands, training_sections
from unirank.types import DENSE

_STYLE = files("unirank.report").joinpath("style.css").read_text(encoding="utf-8")


def page(data: ReportData) -> str:
    """The whole page. Text from outside is escaped."""
    report = data.record.report
    title = f"{data.name}: {report.removed_of_targets:.1%} of the decoder's weights removed"
    sections = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{_made_by(data)}</p>',
        _facts(data),
        _section("Rank allocation", _heat(data), _ALLOCATION[data.plan.form]),
        _section("Kept fraction of each sublayer", _sublayers(data)),
    ]
    if data.cosines:
        sections.append(_section("Cosine against effective rank", _cosines(data), _COSINE))
    if data.spectra:
        sections.append(_section("Spectra", _spectra(data), _SPECTRA))
    if data.grid:
        sections.append(_section("Perplexity against removed fraction", _perplexities(data)))
    if not data.cosines:
        sections.append(_section("Cosines and spectra", "", "They need the analysis store, which was not given."))
    if data.samples:
        sections.append(_section("Side by side", _samples(data), "Greedy continuations; a sample, not a measurement."))
    sections += [_section(title, body) for title, body in training_sections(data.record.training)]
    sections.append(_section("Every linear", _table(data)))
    sections.append(_section("Make it again", _commands(data)))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(sections)
        + "\n</main></body></html>\n"
    )


_ALLOCATION = {
    "factors": "Fraction of each matrix's parameters that is kept. Above break-even the dense matrix is cheaper and is "
    "kept whole: 1.00 in the darkest cells.",
    "pivoted": "Fraction of each matrix's parameters that is kept. A matrix that keeps nearly all of its rank costs "
    "nearly as much as the dense one: 1.00 in the darkest cells.",
}
_COSINE = (
    "Each point is a sublayer: how little it turns the residual stream (the cosine between what enters and what leaves "
    "it; here its distance from 1, on a log scale) against the effective rank of its last linear's spectrum. UniRank "
    "gives ranks to sublayers of low cosine."
)
_SPECTRA = (
    "Share of the energy that lies beyond a rank, on a log scale: the steeper, the cheaper to truncate. For each kind "
    "of linear, the layer of least, median and largest effective rank."
)


def _made_by(data: ReportData) -> str:
    identity, source = data.record.identity, data.record.source
    if identity is None:
        return f"Made by unirank; {_text(GONE)}."
    return f"Made by unirank {_text(identity.versions['unirank'])} from <code>{_text(source)}</code>."


def _text(value: Any) -> str:
    return escape(str(value))


def _section(title: str, body: str, lead: str = "") -> str:
    text = f"<p>{escape(lead)}</p>" if lead else ""
    return f"<section><h2>{escape(title)}</h2>{text}{body}</section>"


def _facts(data: ReportData) -> str:
    plan, report = data.plan, data.record.report
    facts = {
        "decoder linears": f"{report.targets_before:,} to {report.targets_after:,} parameters "
        f"({report.removed_of_targets:.2%} removed; budget {plan.budget:,})",
        "whole model": f"{report.model_before:,} to {report.model_after:,} parameters "
        f"({report.removed_of_model:.2%} removed)",
        "matrices": f"{report.low_rank} low-rank, {report.dense} dense",
        "scheme, allocator": f"{plan.scheme}, {plan.allocator}",
        "low-rank form": plan.described_form,
        "calibration": calibration_line(data.record.identity, mark=""),
        "analysis": plan.analysis or UNKNOWN,
    }
    if data.record.quantized is not None:
        facts["quantised"] = data.record.quantized.described()
    for entry in data.record.evaluations:
        measured = entry["report"]
        beside = "" if entry["dense"] is None else f" (dense {entry['dense']:.2f})"
        facts[f"perplexity on {measured['text']}"] = (
            f"{measured['perplexity']:.2f}{beside}, {measured['windows']} windows of {measured['window']} tokens"
        )
    rows = "".join(f'<tr><th scope="row">{_text(k)}</th><td>{_text(v)}</td></tr>' for k, v in facts.items())
    return f'<table class="facts"><tbody>{rows}</tbody></table>'


def _heat(data: ReportData) -> str:
    kinds = list(dict.fromkeys(linear.kind for linear in data.linears))
    cells = {(linear.layer, linear.kind): linear for linear in data.linears}
    short = [_text(kind.rsplit(".", 1)[-1]).replace("_", "_<wbr>") for kind in kinds]
    head = "".join(f'<th scope="col">{kind}</th>' for kind in short)
    rows = []
    for layer in sorted({linear.layer for linear in data.linears}):
        row = "".join(_cell(cells.get((layer, kind))) for kind in kinds)
        rows.append(f'<tr><th scope="row">{layer}</th>{row}</tr>')
    return (
        f'<div class="scroll"><table class="heat"><caption class="soft">layer by projection</caption>'
        f'<thead><tr><th scope="col">layer</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _cell(linear: Linear | None) -> str:
    if linear is None:
        return "<td></td>"
    # From nearly white to dark blue; the text is whichever of black and white has the more contrast.
    red, green, blue = (round(a + (b - a) * linear.kept) for a, b in zip((238, 244, 255), (8, 48, 107), strict=True))
    ink = "#000" if _luminance(red, green, blue) > 0.18 else "#fff"
    rank = "dense" if linear.rank == DENSE else f"rank {linear.rank}"
    title = f"{linear.name}: {rank} of {min(linear.m, linear.n)}"
    style = f"background:rgb({red},{green},{blue});color:{ink}"
    return f'<td style="{style}" title="{escape(title, quote=True)}">{linear.kept:.2f}</td>'


def _luminance(*rgb: int) -> float:
    """Relative luminance (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in rgb)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _sublayers(data: ReportData) -> str:
    chart = svg.lines("kept fraction", curves.kept_by_layer(data), x="layer", y="kept fraction", dots=True)
    return f'<div class="charts"><figure><figcaption>by layer</figcaption>{chart}</figure></div>'


def _cosines(data: ReportData) -> str:
    points = {
        sublayer: [
            (1 - cosine, effective, f"layer {layer}, {sublayer}: cosine {cosine:.4f}, effective rank {effective:.1f}")
            for layer, cosine, effective in found
        ]
        for sublayer, found in curves.cosine_points(data).items()
    }
    against = svg.scatter("cosine and effective rank", points, x="1 - cosine", y="effective rank", log_x=True)
    by_layer = curves.importance_by_layer(data)
    importance = svg.lines("importance", by_layer, x="layer", y="1 - cosine", log_y=True, dots=True)
    return (
        f'<div class="charts"><figure><figcaption>cosine and effective rank</figcaption>{against}</figure>'
        f"<figure><figcaption>functional importance by layer</figcaption>{importance}</figure></div>"
    )


def _spectra(data: ReportData) -> str:
    figures = []
    for spectrum in data.spectra:
        chart = svg.lines(spectrum.kind, spectrum.curves, x="rank / K", y="energy beyond", log_y=True)
        figures.append(f"<figure><figcaption>{_text(spectrum.kind)}</figcaption>{chart}</figure>")
    return f'<div class="charts">{"".join(figures)}</div>'


def _perplexities(data: ReportData) -> str:
    figures = []
    for text, (best, total) in curves.perplexity_curves(data).items():
        chart = svg.lines("perplexity", best, x="removed fraction", y="perplexity", log_y=True, dots=True)
        more = f" (best {len(best)} of {total})" if total > len(best) else ""
        figures.append(f"<figure><figcaption>{_text(text)}{more}</figcaption>{chart}</figure>")
    return f'<div class="charts">{"".join(figures)}</div>'


def _samples(data: ReportData) -> str:
    parts = []
    for prompt, dense, compressed in data.samples:
        parts.append(f"<h3>{_text(prompt)}</h3>")
        pair = "".join(
            f"<div><strong>{label}</strong><pre>{_text(_without_tail(text))}</pre></div>"
            for label, text in (("dense", dense), ("compressed", compressed))
        )
        parts.append(f'<div class="pair">{pair}</div>')
    return "".join(parts)


def _without_tail(text: str) -> str:
    """Empty lines at the end, which damaged models like to write, as a count of them."""
    kept = text.rstrip()
    empty = text[len(kept) :].count("\n")
    return f"{kept}\n[{empty} empty lines]" if empty > 1 else kept


def _table(data: ReportData) -> str:
    has_store = any(linear.effective_rank is not None for linear in data.linears)
    columns = ["linear", "M x N", "rank", "kept"] + (["energy kept", "effective rank"] if has_store else [])
    rows = []
    for linear in data.linears:
        cells = [linear.name, f"{linear.m} x {linear.n}", str(linear.rank), f"{linear.kept:.1%}"]
        if has_store:
            cells += [_percent(linear.energy_kept), f"{linear.effective_rank or 0.0:.1f}"]
        rows.append(_row(cells))
    head = "".join(f'<th scope="col">{_text(column)}</th>' for column in columns)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<details open><summary>{len(rows)} linears</summary><div class="scroll">{table}</div></details>'


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"


def _row(cells: Sequence[str]) -> str:
    return f'<tr><th scope="row">{_text(cells[0])}</th>{"".join(f"<td>{_text(cell)}</td>" for cell in cells[1:])}</tr>'


def _commands(data: ReportData) -> str:
    identity, plan = data.record.identity, data.plan
    if identity is None:
        return "<p>How it was made is not known.</p>"
    note = (
        "rank_plan.json lies beside the weights and holds every rank. Of a text that is a file, only the name is known."
    )
    later = healing_commands(data.record.source, data.record.training)
    for title, _ in training_sections(data.record.training)[len(later) :]:  # in their order
        note += f" {title} came after that."
    commands = "".join(f"<pre>{_text(shlex.join(command))}</pre>" for command in [_compress(data, identity), *later])
    versions = ", ".join(f"{name} {version}" for name, version in identity.versions.items())
    return (
        f"{commands}<p>{_text(note)}</p>"
        f"<p>Settings of the plan: {_text(plan.described_settings())}.</p><p>Versions: {_text(versions)}.</p>"
    )


def _compress(data: ReportData, identity: Identity) -> list[str]:
    """The command that makes the model again, up to fine-tuning."""
    calibration = identity.calibration
    options: dict[str, Any] = {"out": "OUT", "ranks": "rank_plan.json", "scheme": identity.scheme}
    options |= {"calib": calibration.text, "split": calibration.split, "text-revision": calibration.revision}
    options |= {"windows": calibration.windows, "window": calibration.window, "seed": calibration.seed}
    options |= {"batch": calibration.batch, "gradients": calibration.gradient_windows or None}
    if calibration.texts:
        options["calib-shares"] = ",".join(str(text.windows) for text in calibration.texts)
    options["clip"] = calibration.clip or 0  # said, for the default may be another one
    options["dtype"] = identity.model.dtype
    refine = data.plan.settings.get("refine")
    if isinstance(refine, Mapping):  # read from a file, so nothing in it is certain
        options |= {"refine": refine.get("mix"), "refine-damping": refine.get("damping")}
        if refine.get("metric"):
            options |= {"refine-metric": True, "refine-metric-damping": refine.get("metric_damping")}
        options |= {f"refine-{name}": refine.get(name) for name in ("centred", "dense")}
    command = ["unirank", "compress", data.record.source]
    for name, value in options.items():
        if value is not None and value is not False:
            command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return command
