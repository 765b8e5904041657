"""The page's sections on ranks, cosines, spectra and single linears: why the numbers are what they are."""

from __future__ import annotations

from unirank.report import curves, html, svg
from unirank.report.gather import ReportData

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


def allocation_sections(data: ReportData) -> list[str]:
    """Ranks, and what the store says about them; a sentence where there is no store."""
    chart = svg.lines("kept fraction", curves.kept_by_layer(data), x="layer", y="kept fraction", dots=True)
    found = [
        html.section("Rank allocation", data.plan.heat_map(), _ALLOCATION[data.plan.form]),
        html.section("Kept fraction of each sublayer", html.figures({"by layer": chart})),
    ]
    if data.cosines:
        found.append(html.section("Cosine against effective rank", _cosines(data), _COSINE))
    if data.spectra:
        found.append(html.section("Spectra", _spectra(data), _SPECTRA))
    if data.grid:
        found.append(html.section("Perplexity against removed fraction", _perplexities(data)))
    if not data.cosines:
        found.append(html.section("Cosines and spectra", "", "They need the analysis store, which was not given."))
    return found


def samples_section(data: ReportData) -> str:
    """Texts of both models, one prompt after the other."""
    parts = (f"<h3>{html.text(prompt)}</h3>{html.pair(*texts)}" for prompt, *texts in data.samples)
    return html.section("Side by side", "".join(parts), "Greedy continuations; a sample, not a measurement.")


def linears_section(data: ReportData) -> str:
    """The table of every linear."""
    has_store = any(linear.effective_rank is not None for linear in data.linears)
    columns = ["linear", "M x N", "rank", "kept"] + (["energy kept", "effective rank"] if has_store else [])
    rows = []
    for linear in data.linears:
        cells = [linear.name, f"{linear.m} x {linear.n}", str(linear.rank), f"{linear.kept:.1%}"]
        if has_store:
            share = "" if linear.energy_kept is None else f"{linear.energy_kept:.2%}"
            cells += [share, f"{linear.effective_rank or 0.0:.1f}"]
        rows.append([html.text(cell) for cell in cells])
    table = html.scrolling("every linear", html.table(columns, rows))
    return html.section("Every linear", f"<details open><summary>{len(rows)} linears</summary>{table}</details>")


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
    return html.figures({"cosine and effective rank": against, "functional importance by layer": importance})


def _spectra(data: ReportData) -> str:
    return html.figures(
        {s.kind: svg.lines(s.kind, s.curves, x="rank / K", y="energy beyond", log_y=True) for s in data.spectra}
    )


def _perplexities(data: ReportData) -> str:
    charts = {}
    for text, (best, total) in curves.perplexity_curves(data).items():
        chart = svg.lines("perplexity", best, x="removed fraction", y="perplexity", log_y=True, dots=True)
        more = f" (best {len(best)} of {total})" if total > len(best) else ""
        charts[f"{text}{more}"] = chart
    return html.figures(charts)
