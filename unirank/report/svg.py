"""Charts as inline SVG. Colours come from the page's style, so that light, dark and print each have their own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 340, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 10, 12, 40
_MARKS = ("circle", "square", "triangle")
_FINE, _COARSE = (1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5)  # labels within a decade of a log axis


@dataclass(frozen=True)
class Mark:
    """A ring at a point of its own in a line chart, or a dashed line from top to bottom where `y` is None."""

    x: float
    y: float | None
    label: str


def lines(
    title: str,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x: str,
    y: str,
    log_y: bool = False,
    dots: bool = False,
    mark: Mark | None = None,
) -> str:
    """A line chart of several curves with a legend below; `dots` marks the points."""
    points = [point for curve in curves.values() for point in curve]
    if mark is not None:
        points.append((mark.x, mark.y if mark.y is not None else points[0][1] if points else 1.0))
    frame = _Frame(points, log_y=log_y)
    parts = []
    for index, curve in enumerate(curves.values()):
        path = " ".join(f"{frame.x(a):.1f},{frame.y(b):.1f}" for a, b in curve if frame.shows(a, b))
        parts.append(f'<polyline class="s{index % 6} line" points="{path}"/>')
        if dots:
            parts += [_mark(0, frame.x(a), frame.y(b), f"s{index % 6}") for a, b in curve if frame.shows(a, b)]
    if mark is not None:
        parts.append(_ring(frame, mark))
    return _chart(title, frame, parts, x, y) + _legend(list(curves), mark=mark)


def scatter(
    title: str, groups: Mapping[str, Sequence[tuple[float, float, str]]], *, x: str, y: str, log_x: bool = False
) -> str:
    """A scatter chart; every point has a text that shows on hovering, and every group a mark of its own."""
    frame = _Frame([(a, b) for group in groups.values() for a, b, _ in group], log_x=log_x)
    parts = []
    for index, group in enumerate(groups.values()):
        parts += [
            _mark(index, frame.x(a), frame.y(b), f"s{index % 6}", text) for a, b, text in group if frame.shows(a, b)
        ]
    return _chart(title, frame, parts, x, y) + _legend(list(groups), marks=True)


class _Axis:
    """From data to pixels, in one direction. Logarithmic axes span at most six decades, from the top."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, log: bool) -> None:
        self._log, self._start, self._end = log, start, end
        known = [math.log10(value) if log else value for value in values if not log or value > 0]
        low, high = (min(known), max(known)) if known else (0.0, 1.0)
        self._low, self._high = _padded(max(low, high - 6) if log else low, high)

    def shows(self, value: float) -> bool:
        return not self._log or (value > 0 and math.log10(value) >= self._low)

    def at(self, value: float) -> float:
        position = math.log10(value) if self._log else value
        return self._start + (position - self._low) / (self._high - self._low) * (self._end - self._start)

    def ticks(self) -> list[tuple[float, str]]:
        if not self._log:
            return [(value, f"{value:g}") for value in _round_steps(self._low, self._high)]
        powers = range(math.ceil(self._low), math.floor(self._high) + 1)
        if len(powers) >= 3:
            return [(10.0**power, f"{10.0**power:g}" if power > -4 else f"1e{power}") for power in powers]
        steps = _FINE if self._high - self._low < 1 else _COARSE
        fine = [round(step * 10.0**power, 12) for power in _decades(self._low, self._high) for step in steps]
        fine = [value for value in fine if self._low <= math.log10(value) <= self._high] if self._low > -9 else []
        if len(fine) >= 3:
            return [(value, f"{value:g}") for value in fine]
        return [(10**power, f"{10**power:.3g}") for power in _round_steps(self._low, self._high)]


class _Frame:
    """Both axes."""

    def __init__(self, points: Sequence[tuple[float, float]], *, log_x: bool = False, log_y: bool = False) -> None:
        self.horizontal = _Axis([a for a, _ in points], _LEFT, _WIDTH - _RIGHT, log=log_x)
        self.vertical = _Axis([b for _, b in points], _HEIGHT - _BOTTOM, _TOP, log=log_y)
        self.x, self.y = self.horizontal.at, self.vertical.at

    def shows(self, x: float, y: float) -> bool:
        return self.horizontal.shows(x) and self.vertical.shows(y)


def _padded(low: float, high: float) -> tuple[float, float]:
    room = (high - low) * 0.04 or max(abs(high), 1.0) * 0.05
    return low - room, high + room


def _decades(low: float, high: float) -> range:
    return range(math.floor(low), math.floor(high) + 1)


def _round_steps(low: float, high: float) -> list[float]:
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step)
    return [round(index * step, 12) for index in range(first, math.floor(high / step) + 1)]


def _ring(frame: _Frame, mark: Mark) -> str:
    hover, x = f"<title>{escape(mark.label)}</title>", frame.x(mark.x)
    if mark.y is None or not frame.shows(mark.x, mark.y):
        return f'<path class="here" stroke-dasharray="4 3" d="M{x:.1f} {_TOP}V{_HEIGHT - _BOTTOM}">{hover}</path>'
    return f'<circle class="here" cx="{x:.1f}" cy="{frame.y(mark.y):.1f}" r="7">{hover}</circle>'


def _mark(kind: int, x: float, y: float, style: str, text: str = "") -> str:
    hover = f"<title>{escape(text)}</title>" if text else ""
    shape = _MARKS[kind % len(_MARKS)]
    if shape == "square":
        return f'<rect class="{style} mark" x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6">{hover}</rect>'
    if shape == "triangle":
        points = f"{x:.1f},{y - 4:.1f} {x + 4:.1f},{y + 3:.1f} {x - 4:.1f},{y + 3:.1f}"
        return f'<polygon class="{style} mark" points="{points}">{hover}</polygon>'
    return f'<circle class="{style} mark" cx="{x:.1f}" cy="{y:.1f}" r="3.2">{hover}</circle>'


def _chart(title: str, frame: _Frame, parts: Sequence[str], x: str, y: str) -> str:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    axes = [f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>']
    for at, label in frame.horizontal.ticks():
        px = frame.x(at)
        axes.append(f'<path class="grid" d="M{px:.1f} {_TOP}V{bottom}"/>')
        axes.append(f'<text x="{px:.1f}" y="{bottom + 14}" text-anchor="middle">{label}</text>')
    for at, label in frame.vertical.ticks():
        py = frame.y(at)
        axes.append(f'<path class="grid" d="M{_LEFT} {py:.1f}H{right}"/>')
        axes.append(f'<text x="{_LEFT - 5}" y="{py + 3.5:.1f}" text-anchor="end">{label}</text>')
    middle = (_TOP + bottom) / 2
    axes.append(f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x)}</text>')
    axes.append(f'<text transform="translate(11 {middle}) rotate(-90)" text-anchor="middle">{escape(y)}</text>')
    body = "".join(axes) + "".join(parts)
    label = escape(f"{title}: {y} over {x}", quote=True)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{body}</svg>'


def _legend(labels: Sequence[str], *, marks: bool = False, mark: Mark | None = None) -> str:
    if len(labels) < 2 and mark is None:
        return ""
    items = []
    for index, label in enumerate(labels):
        items.append((_mark(index if marks else 0, 6, 6, f"s{index % 6}"), label))
    if mark is not None:
        shape = '<circle class="here" cx="6" cy="6" r="4.5"/>'
        items.append(
            (shape if mark.y is not None else '<path class="here" stroke-dasharray="3 2" d="M6 0V12"/>', mark.label)
        )
    items = [
        f'<li><svg viewBox="0 0 12 12" width="12" height="12" aria-hidden="true">{key}</svg>{escape(label)}</li>'
        for key, label in items
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'
