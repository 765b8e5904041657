"""How a compressed model looks: in a terminal what became of it, in a notebook a table and the ranks as a heat map."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unirank import looks

if TYPE_CHECKING:
    from unirank.compression.checkpoint import CompressedModel


def as_lines(compressed: CompressedModel) -> str:
    """A few lines; no weight is read."""
    plan, report = compressed.plan, compressed.report
    kind, dtype = type(compressed.model).__name__, str(compressed.model.dtype).removeprefix("torch.")
    before, after = _bytes(compressed)
    trained = [] if compressed.training is None else ["trained after that"]
    bits = [] if compressed.quantized is None else [f"weights of {compressed.quantized.bits} bits"]
    measured = [
        f"perplexity {one['report']['perplexity']:.2f} on {one['report']['text']}" + _beside(one["dense"])
        for one in compressed.evaluations
    ]
    return looks.lines(
        f"CompressedModel: {kind} in {dtype}, of {compressed.source or 'a model that is not known'}",
        f"{report.removed_of_targets:.2%} of the decoder linears removed, {report.removed_of_model:.2%} of the model",
        f"{report.model_before:,} to {report.model_after:,} parameters; weights of "
        f"{looks.megabytes(before)} to {looks.megabytes(after)}",
        f"{report.low_rank} linears low-rank, {report.dense} dense; {plan.scheme}, {plan.allocator}, form {plan.form}",
        "; ".join(trained + bits),
        *measured[-2:],
        'next: .generate("..."), .evaluate(text=...), .curve(...), .save(OUT)',
    )


def as_html(compressed: CompressedModel) -> str:
    """The lines, parameters and bytes before and after, and the kept fraction of every linear."""
    report = compressed.report
    before, after = _bytes(compressed)
    rows = (
        (
            "decoder linears",
            f"{report.targets_before:,}",
            f"{report.targets_after:,}",
            _percent(report.removed_of_targets),
        ),
        ("whole model", f"{report.model_before:,}", f"{report.model_after:,}", _percent(report.removed_of_model)),
        ("weights", looks.megabytes(before), looks.megabytes(after), _percent(1 - after / before)),
    )
    table = looks.table(("", "before", "after", "removed"), rows)
    return looks.text(as_lines(compressed)) + table + compressed.plan.heat_map()


def _bytes(compressed: CompressedModel) -> tuple[int, int]:
    """Of the weights, dense in the same dtype and as they are now."""
    report, itemsize = compressed.report, compressed.model.dtype.itemsize
    now = report.model_after * itemsize if compressed.quantized is None else compressed.quantized.bytes_after
    return report.model_before * itemsize, now


def _beside(dense: float | None) -> str:
    return "" if dense is None else f" (dense {dense:.2f})"


def _percent(share: float) -> str:
    return f"{share:.2%}"
