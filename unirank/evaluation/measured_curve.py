"""What was measured along a curve of removed fractions: a record for each point, and strict JSON of all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from unirank import looks
from unirank.disk.strictjson import Damaged, build, entry, number, parse_object
from unirank.errors import InputError
from unirank.evaluation.perplexity import EvalReport

DENSE_PRESET = "dense"
_FORMAT = 1
_MOST = 2**63  # parameters, bytes or operations that a record can count


@dataclass(frozen=True)
class CurvePoint:
    """One model of a curve: what was removed, and what was measured of what is left.

    Attributes:
        preset: name of the recipe; "dense" for the model that nothing was removed from.
        remove: the fraction that was asked for, of the decoder linears' weights.
        removed_of_targets: the fraction of these that is gone, counted.
        removed_of_model: the fraction of all parameters that is gone, embeddings, biases and head included.
        used: parameters of the decoder linears' weights.
        budget: the most of them that `remove` allows.
        parameters: of the whole model, tied ones once.
        bytes: of a checkpoint's weights by how they are stored: "float32", "bfloat16", and whole numbers as
            `unirank.quantize` writes them, "int8" and "int4" (see `unirank.tradeoff.sizes.weight_bytes`).
        flops: floating point operations of the matrix products for one token: two for each weight of the decoder's
            linears as they are stored, and of the head. Attention itself, norms, biases and embeddings are not counted.
        evaluations: perplexity, one a text, in the order of the texts.
        tokens_per_second: "prefill" and "decode"; None where nobody asked.
        seconds: that the point took, of plan, factors and evaluation.
    """

    preset: str
    remove: float
    removed_of_targets: float
    removed_of_model: float
    used: int
    budget: int
    parameters: int
    bytes: Mapping[str, int]
    flops: int
    evaluations: tuple[EvalReport, ...]
    tokens_per_second: Mapping[str, float] | None
    seconds: float

    def __repr__(self) -> str:
        measured = ", ".join(f"{report.perplexity:.2f} on {report.text}" for report in self.evaluations)
        rates = ", ".join(f"{phase} {rate:,.1f}" for phase, rate in (self.tokens_per_second or {}).items())
        return looks.lines(
            f"CurvePoint: {self.preset}, {self.remove:.2%} removed; perplexity {measured}",
            f"{self.parameters:,} parameters, {self.removed_of_model:.2%} less; {self.flops / 1e6:,.1f} MFLOPs a token",
            ", ".join(f"{looks.megabytes(size)} {kind}" for kind, size in self.bytes.items()),
            f"tokens a second: {rates}" if rates else "",
            f"{self.seconds:.1f} s",
        )

    def as_dict(self) -> dict[str, Any]:
        rate = self.tokens_per_second
        return {
            **asdict(replace(self, bytes=dict(self.bytes), tokens_per_second=None if rate is None else dict(rate))),
            "evaluations": [report.as_dict() for report in self.evaluations],
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> CurvePoint:
        """Read `as_dict`'s result. Raises Damaged for anything else."""
        point = build(cls, record)
        entry(record, "preset", str)
        if not 0 <= number(point.remove, "remove") < 1:
            raise Damaged(f"remove is {point.remove!r}")
        for name in ("removed_of_targets", "removed_of_model"):
            if number(getattr(point, name), name) >= 1:
                raise Damaged(f"{name} is {getattr(point, name)!r}")
        for name in ("used", "budget", "parameters", "flops"):
            _count(getattr(point, name), name)
        for name, size in entry(record, "bytes", dict).items():
            _count(size, f"bytes of {str(name)[:80]}")
        if number(point.seconds, "seconds") < 0:
            raise Damaged(f"seconds is {point.seconds!r}")
        rates = entry(record, "tokens_per_second", dict, type(None))
        for name, rate in (rates or {}).items():
            if number(rate, f"tokens_per_second of {str(name)[:80]}") <= 0:
                raise Damaged(f"tokens_per_second of {str(name)[:80]} is {rate!r}")
        evaluations = tuple(EvalReport.from_dict(one) for one in entry(record, "evaluations", list))
        if not evaluations:
            raise Damaged("a point has no evaluation")
        return replace(point, evaluations=evaluations)


@dataclass(frozen=True)
class Curve:
    """Points of one model on the same texts.

    Attributes:
        model: what was loaded.
        dense: the model that nothing was removed from; its preset is "dense", its `remove` 0.
        points: of every preset, each with its `remove`, in ascending order.
        meta: versions, device, seeds and hashes; and "unreachable", a list of `{preset, remove, reason}`: fractions
            that were asked for and cannot be had.
    """

    model: str
    dense: CurvePoint
    points: tuple[CurvePoint, ...]
    meta: Mapping[str, Any]

    def __repr__(self) -> str:
        first = f"{self.dense.evaluations[0].perplexity:.2f}"
        rows = []
        for preset in self.presets[:4]:
            points = self.of(preset)[1:]
            shown = points if len(points) <= 6 else points[:: -(-len(points) // 6)]
            said = ", ".join(f"{100 * p.remove:.3g} % {p.evaluations[0].perplexity:.2f}" for p in shown)
            rows.append(f"{preset}: {said}" + (f" (of {len(points)})" if len(shown) < len(points) else ""))
        return looks.lines(
            f"Curve: {len(self.points)} points of {', '.join(self.presets)}; {self.model}",
            f"perplexity on {self.texts[0]}; dense {first}",
            *rows,
            "next: .points, .of(preset), .to_json()",
        )

    def _repr_html_(self) -> str:
        from unirank.tradeoff.picture import picture
        from unirank.tradeoff.showing import head_of, rows_of

        return picture(self) + looks.table(head_of(self), rows_of(self), self.model)

    @property
    def presets(self) -> tuple[str, ...]:
        """Names of the presets, in the order of the points."""
        return tuple(dict.fromkeys(point.preset for point in self.points))

    @property
    def texts(self) -> tuple[str, ...]:
        """Names of the texts, in the order of every point's evaluations."""
        return tuple(report.text for report in self.dense.evaluations)

    def of(self, preset: str) -> tuple[CurvePoint, ...]:
        """The points of one preset, by what they remove, behind the dense one.

        Raises InputError with the presets that there are.
        """
        if preset not in self.presets:
            known = ", ".join(self.presets) or "none"
            raise InputError(f"The curve has no preset {preset!r}; it has: {known}.")
        return (self.dense, *sorted((p for p in self.points if p.preset == preset), key=lambda p: p.remove))

    def as_dict(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "model": self.model,
            "dense": self.dense.as_dict(),
            "points": [point.as_dict() for point in self.points],
            "meta": dict(self.meta),
        }

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=1) + "\n"

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Curve:
        """Read `as_dict`'s result. Raises Damaged for anything else."""
        if entry(record, "format", int) != _FORMAT:
            raise Damaged("unknown format")
        build(cls, {name: value for name, value in record.items() if name != "format"})
        dense = CurvePoint.from_dict(entry(record, "dense", dict))
        if (dense.preset, dense.remove) != (DENSE_PRESET, 0):
            raise Damaged(f"its dense point is of {dense.preset[:80]!r} and removes {dense.remove:g}")
        points = tuple(CurvePoint.from_dict(one) for one in entry(record, "points", list))
        texts = [(report.text, report.text_sha256) for report in dense.evaluations]
        for point in points:
            if [(report.text, report.text_sha256) for report in point.evaluations] != texts:
                raise Damaged(f"the point of {point.preset[:80]!r} at {point.remove:g} has other texts than the dense")
        return cls(entry(record, "model", str), dense, points, entry(record, "meta", dict))

    @classmethod
    def from_json(cls, text: str) -> Curve:
        """Read `to_json`'s output. Raises InputError for anything else."""
        try:
            return cls.from_dict(parse_object(text))
        except Damaged as error:
            raise InputError(f"This is not a unirank curve: {error}.") from error


def _count(value: Any, what: str) -> None:
    """Raise Damaged unless `value` is a whole number that can count something."""
    if type(value) is not int or not 0 <= value < _MOST:
        raise Damaged(f"{what} is {str(value)[:80]!r}")
