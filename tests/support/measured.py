"""A made-up curve of perplexities, for what reads one."""

from __future__ import annotations

from unirank.evaluation.measured_curve import Curve, CurvePoint
from unirank.evaluation.perplexity import EvalReport

TARGETS, MODEL = 1000, 1200  # parameters


def a_report(perplexity: float, text: str, parameters: int) -> EvalReport:
    return EvalReport(perplexity, 1.0, text, f"sha of {text}", 16, 2, 30, False, "float32", parameters)


def a_point(preset: str, remove: float, perplexity: float = 20.0) -> CurvePoint:
    used = round(TARGETS * (1 - remove))
    parameters = MODEL - TARGETS + used
    return CurvePoint(
        preset,
        remove,
        1 - used / TARGETS,
        1 - parameters / MODEL,
        used,
        used,
        parameters,
        {"float32": 4 * parameters, "bfloat16": 2 * parameters, "int8": parameters, "int4": parameters // 2},
        2 * used,
        tuple(a_report(perplexity * more, text, parameters) for text, more in (("first", 1.0), ("second", 1.5))),
        None,
        1.25,
    )


def a_curve() -> Curve:
    """`unirank` at 10 and 20 %, `fast` at 20 %, on two texts."""
    points = (a_point("unirank", 0.1, 24.0), a_point("unirank", 0.2, 40.0), a_point("fast", 0.2, 30.0))
    return Curve("a/model", a_point("dense", 0.0), points, {"seed": 0, "unreachable": []})
