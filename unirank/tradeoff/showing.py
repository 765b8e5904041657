"""A curve as a table: the cells that the terminal and Markdown share, and what has to be said beside them."""

from __future__ import annotations

from unirank.evaluation.measured_curve import Curve, CurvePoint

_KINDS = ("float32", "bfloat16", "int8")
COUNTED = (
    "Removed is of the decoder linears' weights. MB are 10⁶ bytes of a checkpoint's tensors; int8 is what "
    "`unirank quantize` writes (of the dense model, what it would by the same rules), with the rest in the model's "
    "own dtype. FLOPs are two for each weight of the decoder's linears as they are stored and of the head; attention "
    "itself, norms, biases and embeddings are not in them."
)


def head_of(curve: Curve) -> list[str]:
    """Titles of the columns."""
    head = ["preset", "removed"]
    for text in curve.texts:
        head += [text if len(curve.texts) > 1 else "perplexity", "of dense"]
    head += ["parameters", *(f"MB {kind}" for kind in _KINDS), "MFLOPs a token"]
    if curve.dense.tokens_per_second is not None:
        head += [f"{phase} tokens/s" for phase in curve.dense.tokens_per_second]
    return head


def rows_of(curve: Curve) -> list[list[str]]:
    """One row a point, the dense model first."""
    return [_row(curve, point) for point in (curve.dense, *curve.points)]


def _row(curve: Curve, point: CurvePoint) -> list[str]:
    row = [point.preset, f"{100 * point.remove:.3g} %"]
    for own, dense in zip(point.evaluations, curve.dense.evaluations, strict=True):
        row += [f"{own.perplexity:.2f}", f"{own.perplexity / dense.perplexity:.3f}"]
    row += [f"{point.parameters / 1e6:,.2f} M"]
    row += [f"{point.bytes[kind] / 1e6:,.1f}" for kind in _KINDS]
    row += [f"{point.flops / 1e6:,.1f}"]
    return row + [f"{rate:,.1f}" for rate in (point.tokens_per_second or {}).values()]


def notes_of(curve: Curve) -> list[str]:
    """What a reader of the table has to know: texts and windows, what was out of reach, seconds a point."""
    notes = []
    for report in curve.dense.evaluations:
        notes.append(f"{report.text}: {report.windows} windows of {report.window} tokens, {report.dtype}.")
    for preset in curve.presets:
        spent = [point.seconds for point in curve.points if point.preset == preset]
        notes.append(f"{preset}: {sum(spent) / len(spent):.1f} seconds a point ({len(spent)} points).")
    for one in curve.meta.get("unreachable", ()):
        notes.append(f"{one['preset']} at {100 * one['remove']:.3g} % is out of reach: {one['reason']}")
    return notes


def markdown(curve: Curve) -> str:
    """The table as Markdown, with its notes."""
    head, rows = head_of(curve), rows_of(curve)
    lines = [f"# How far can one go: {curve.model}", "", "![perplexity over the removed fraction](curve.svg)", ""]
    lines += [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", COUNTED, "", *(f"- {note}" for note in notes_of(curve)), ""])
