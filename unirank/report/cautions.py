"""What a reader should know before using the model, and the rules that find it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from unirank.analysis.identity import Identity
from unirank.compression.trainings import trainings
from unirank.report import html
from unirank.report.gather import ReportData
from unirank.report.html import percent
from unirank.report.measured import busy, newest, perplexities
from unirank.text.windows import BUILTIN
from unirank.types import DENSE

# **choice**: a layer that keeps less than this share of what the median layer keeps is said to have collapsed. Plans
# for SmolLM2 at 20 and 40 % keep 0.62 of the median or more in every layer, by every allocator that has been tried.
COLLAPSED = 0.5
UNUSABLE = 2.0  # **choice**: from this perplexity ratio on, text is visibly worse and only training brings it back
_NAMED = 3  # matrices that are listed by name

RULES = (
    f"No matrix has a rank of 1; no layer keeps less than {COLLAPSED:g} of what the median layer keeps; there were at "
    "least as many calibration tokens as the widest linear has inputs, they showed all directions, and they were not "
    "the built-in text's; nothing was measured on the calibration text; no perplexity is more than "
    f"{UNUSABLE:g} times the dense one; no matrix was damped"
)


def warnings_section(data: ReportData) -> str:
    """The warnings as a section; without any, which rules were looked at."""
    found = cautions(data)
    unknown = _unknown(data)
    tail = f'<p class="soft">{html.text(unknown)}</p>' if unknown else ""
    if not found:
        return html.section("Warnings", f"<p>None. {html.text(RULES)}.</p>{tail}", style="fine")
    items = "".join(f"<li>{html.text(one)}</li>" for one in found)
    return html.section("Warnings", f"<ul>{items}</ul>{tail}", style="warnings")


def cautions(data: ReportData) -> list[str]:
    """A sentence or two for each warning, the gravest first."""
    return [
        *_unusable(data),
        *_collapsed(data),
        *_rank_one(data),
        *_calibration(data),
        *_deficient(data),
        *built_in(data.record.identity),
        *_same_text(data),
        *_damped(data),
        *_busy(data),
    ]


def _unusable(data: ReportData) -> list[str]:
    worst = {text: change.times for text, change in perplexities(data).items() if (change.times or 0.0) > UNUSABLE}
    said = " and ".join(f"{times:.2f} times the dense one on {text}" for text, times in worst.items())
    if not worst:
        return []
    if trainings(data.record.training):
        return [f"Perplexity is {said}, after training: too much was removed for use. Remove less."]
    return [f"Perplexity is {said}: unusable without unirank heal or unirank finetune. Or remove less."]


def _collapsed(data: ReportData) -> list[str]:
    kept: dict[int, list[float]] = {}
    for linear in data.linears:
        parts = kept.setdefault(linear.layer, [0.0, 0.0])
        parts[0] += linear.kept * linear.m * linear.n
        parts[1] += linear.m * linear.n
    shares = {layer: part / whole for layer, (part, whole) in kept.items()}
    median = statistics.median(shares.values()) if shares else 0.0
    low = {layer: share for layer, share in sorted(shares.items()) if share < COLLAPSED * median}
    if not low:
        return []
    listed = _listed([f"layer {layer} ({percent(share)})" for layer, share in low.items()])
    return [
        f"Collapsed: {listed}. The median layer keeps {percent(median)} of its weights, and a layer is said to have "
        f"collapsed below {COLLAPSED:g} of that. Another allocator, or a smaller --remove, may be better."
    ]


def _rank_one(data: ReportData) -> list[str]:
    names = [linear.name for linear in data.linears if linear.rank != DENSE and int(linear.rank) == 1]
    if not names:
        return []
    are = "1 matrix has" if len(names) == 1 else f"{len(names)} matrices have"
    return [f"{are} a rank of 1, so next to nothing is left there: {_listed(names)}. --min-rank sets the least rank."]


def _calibration(data: ReportData) -> list[str]:
    identity = data.record.identity
    if identity is None or not data.linears:
        return []
    tokens = identity.calibration.windows * identity.calibration.window
    widest = max(data.linears, key=lambda linear: linear.n)
    if tokens >= widest.n:
        return []
    enough = -(-widest.n // max(identity.calibration.window, 1))
    return [
        f"Calibration had {tokens:,} tokens, fewer than the {widest.n:,} inputs of {widest.name}: its statistics are "
        f"not of full rank. Take at least {enough:,} windows of {identity.calibration.window:,} tokens."
    ]


def _deficient(data: ReportData) -> list[str]:
    if not data.deficient:
        return []
    worst = min(data.deficient, key=lambda one: one.rank / one.k)
    return [
        f"For {len(data.deficient)} of {len(data.linears)} linears the calibration tokens show too few directions, "
        f"least for {worst.name} (at most {worst.rank:,} of {worst.k:,}): the rest was cut away unseen. More "
        "--windows, or other text, show more."
    ]


def built_in(identity: Identity | None) -> list[str]:
    """Whether the text is the one that everybody has at hand; a file of the user's with that name is taken for it."""
    if identity is None:
        return []
    used = [text.name for text in identity.calibration.texts or ()] or [identity.calibration.text]
    if BUILTIN not in used:
        return []
    return [
        "Calibrated on the built-in text, Python's documentation, which does for a first try. For a model that will be "
        "used, name a text like what it will read: --calib my-text.txt."
    ]


def _same_text(data: ReportData) -> list[str]:
    identity = data.record.identity
    if identity is None:
        return []
    used = {text.sha256 for text in identity.calibration.texts or ()} | {identity.calibration.text_sha256}
    names = [one["report"]["text"] for key, one in newest(data).items() if key in used]
    if not names:
        return []
    return [f"Perplexity on {_listed(names)} is of the calibration text, and so too good. Measure on another text."]


def _damped(data: ReportData) -> list[str]:
    damped = {name: eps for name, eps in data.damping.items() if eps > 0}
    if not damped:
        return []
    worst = max(damped, key=lambda name: damped[name])
    return [
        f"{len(damped)} of {len(data.damping)} matrices were damped, at most by {damped[worst]:g} of the mean "
        f"({worst}): their statistics are nearly singular. More calibration windows, of more kinds of text, help."
    ]


def _busy(data: ReportData) -> list[str]:
    factor = busy(data)
    if factor is None:
        return []
    return [
        f"Tokens a second were measured on a busy machine: turns differ by a factor of {factor:.1f}, so they cannot be "
        "compared. Measure again when it is idle."
    ]


def _unknown(data: ReportData) -> str:
    missing = []
    if data.record.identity is None:
        missing.append("how it was calibrated")
    if not data.damping:
        missing.append("damping, for the analysis store was not given")
    compared = sum(change.times is not None for change in perplexities(data).values())
    if compared < 2:
        missing.append("perplexity against the dense model" + (" on a second, other text" if compared else ""))
    return f"Not known: {'; '.join(missing)}." if missing else ""


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
