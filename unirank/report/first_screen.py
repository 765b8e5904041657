"""What the page begins with: the verdict in plain words, and the numbers before and after."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable

from unirank.report import html
from unirank.report.gather import ReportData
from unirank.report.html import UNMEASURED, percent, rounded
from unirank.report.measured import PHASES, Change, busy, perplexities, sample, speeds

_BLANK = re.compile(r"\n\s*\n")  # empty lines, which take the room of the first screen


def verdict(data: ReportData) -> str:
    """What was removed and what it did, and how to measure what is not known."""
    parts = [f"{percent(data.record.report.removed_of_targets)} of the decoder's weights are gone"]
    if data.record.quantized is not None:
        parts[0] += f", and those that are left have {data.record.quantized.bits} bits"
    parts += [*_perplexity(data), *_speed(data)]
    said = f'<p class="verdict">{html.text("; ".join(parts))}.</p>'
    missing = _missing(data)
    if missing:
        names = " and ".join([", ".join(missing[:-1]), missing[-1]] if len(missing) > 1 else missing)
        it = "them" if len(missing) > 1 else "it"
        said += f"<p>Not measured: {names}. This command measures {it}: <code>{html.text(_command(data))}</code></p>"
    return said


def before_and_after(data: ReportData) -> str:
    """The table, and one text that both models wrote."""
    report = data.record.report
    size = Change(data.bytes_before, data.bytes_after)
    rows = [
        _row("million parameters", Change(report.model_before, report.model_after), lambda n: f"{n / 1e6:,.1f}"),
        _row("MB on disk", size, lambda n: f"{n / 1e6:,.1f}"),
    ]
    measured = perplexities(data) or {"": Change(None, None)}
    rows += [_row(f"perplexity on {text}" if text else "perplexity", change) for text, change in measured.items()]
    comparable = busy(data) is None
    rows += [_row(PHASES[phase], change, times=comparable) for phase, change in speeds(data)[0].items()]
    head = "".join(f'<th scope="col">{name}</th>' for name in ("dense", "this model", "times"))
    body = f'<table class="change"><thead><tr><td></td>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    body += _notes(data)
    found = sample(data)
    if found is not None:
        prompt, dense, compressed = found
        texts = (_BLANK.sub("\n", said.strip()) for said in (dense, compressed))
        body += f"<h3>Generated behind “{html.text(prompt)}”</h3>{html.pair(*texts)}"
    return html.section("Before and after", body)


def _row(name: str, change: Change, shown: Callable[[float], str] = rounded, *, times: bool = True) -> str:
    head = f'<tr><th scope="row">{html.text(name)}</th>'
    if change.before is None and change.after is None:
        return f'{head}<td colspan="3" class="soft">{UNMEASURED}</td></tr>'
    values = [UNMEASURED if value is None else shown(value) for value in (change.before, change.after)]
    values.append("" if change.times is None or not times else f"{change.times:.2f}")
    return head + "".join(f"<td>{value}</td>" for value in values) + "</tr>"


def _notes(data: ReportData) -> str:
    said = []
    if data.bytes_before is not None:
        said.append(f"MB of the dense model are those of its weights in {data.dtype}, as this one is stored.")
    _, measured = speeds(data)
    if measured is not None:
        one, dense = measured["model"], measured["dense"]
        types = (
            one["dtype"] if one["dtype"] == dense["dtype"] else f"{one['dtype']}, the dense model in {dense['dtype']}"
        )
        said.append(
            f"Tokens a second: one sequence on {one['device']}, {one['threads']} threads, {types}; {one['prompt']} "
            f"tokens read, {one['steps']} written; medians of {one['turns']} turns of both models."
        )
    return f'<p class="soft">{html.text(" ".join(said))}</p>' if said else ""


def _perplexity(data: ReportData) -> list[str]:
    """Perplexity in words; one part, or none."""
    found = perplexities(data)
    known = {text: change.times for text, change in found.items() if change.times is not None}
    if known:
        first, *rest = known.items()
        more = "".join(f" and {times:.2f} times on {text}" for text, times in rest)
        return [f"perplexity on {first[0]} is {first[1]:.2f} times the dense one{more}"]
    alone = [f"{rounded(change.after)} on {text}" for text, change in found.items() if change.after is not None]
    return [f"perplexity is {' and '.join(alone)}"] if alone else []


def _speed(data: ReportData) -> list[str]:
    changes, _ = speeds(data)
    writing, reading = changes["decode"].times, changes["prefill"].times
    if writing is None or reading is None or busy(data) is not None:
        return []
    return [f"{writing:.2f} times the tokens a second while it writes, {reading:.2f} times while it reads a prompt"]


def _missing(data: ReportData) -> list[str]:
    found = perplexities(data)
    names = []
    if not found:
        names.append("perplexity")
    elif all(change.times is None for change in found.values()):
        names.append("the dense model's perplexity")
    if speeds(data)[1] is None:
        names.append("tokens a second")
    if sample(data) is None:
        names.append("a generated text")
    return names


def _command(data: ReportData) -> str:
    words = ["unirank", "eval", data.name, "--against", data.record.source or "MODEL"]
    return shlex.join(words)
