"""How far one can go: the measured curve, with this checkpoint on it."""

from __future__ import annotations

from unirank.evaluation.measured_curve import Curve
from unirank.report import html, svg
from unirank.report.gather import ReportData
from unirank.report.html import rounded
from unirank.report.measured import newest


def curve_section(data: ReportData, curve: Curve) -> str:
    """One chart a text: perplexity over the removed fraction, a line for each preset."""
    charts, notes = {}, []
    for index, text in enumerate(curve.texts):
        lines = {
            preset: [(p.removed_of_targets, p.evaluations[index].perplexity) for p in curve.of(preset)]
            for preset in curve.presets
        }
        mark, note = _mark(data, curve, index)
        title = f"perplexity on {text}"
        charts[title] = svg.lines(
            title,
            lines,
            x="removed fraction of the decoder's weights",
            y="perplexity",
            log_y=True,
            dots=True,
            mark=mark,
        )
        notes += note
    lead = "Perplexity of the same model with more and less removed, on a log scale. The ring is this checkpoint."
    tail = f'<p class="soft">{html.text(" ".join(dict.fromkeys(notes)))}</p>' if notes else ""
    return html.section("How far one can go", html.figures(charts) + tail, lead)


def _mark(data: ReportData, curve: Curve, index: int) -> tuple[svg.Mark, list[str]]:
    """Where this checkpoint is, and what has to be said of it."""
    removed, theirs = data.record.report.removed_of_targets, curve.dense.evaluations[index]
    ours = newest(data).get(theirs.text_sha256)
    if ours is None:
        note = f"Of this checkpoint, perplexity on {theirs.text} was not measured; a line shows what it removes."
        return svg.Mark(removed, None, "this checkpoint, not measured on this text"), [note]
    report = ours["report"]
    same = all(report[key] == getattr(theirs, key) for key in ("window", "windows", "bos"))
    label = f"this checkpoint: {rounded(report['perplexity'])}"
    note = (
        f"This checkpoint was measured on {report['windows']} windows of {report['window']} tokens of {theirs.text}, "
        f"the curve on {theirs.windows} of {theirs.window}."
    )
    return svg.Mark(removed, report["perplexity"], label), [] if same else [note]
