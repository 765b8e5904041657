"""How the model was made: settings, hashes and versions, and the commands that make it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from unirank.analysis.identity import Identity
from unirank.compression.card import GONE, UNKNOWN, calibration_line
from unirank.report import html
from unirank.report.gather import ReportData
from unirank.report.training_section import healing_commands, training_sections


def making_section(data: ReportData) -> str:
    """The last section of the page."""
    return html.section("Make it again", _commands(data) + html.facts(_facts(data)))


def made_by(data: ReportData) -> str:
    """Version and source as HTML."""
    identity, source = data.record.identity, data.record.source
    if identity is None:
        return f"Made by unirank; {html.text(GONE)}."
    return f"Made by unirank {html.text(identity.versions['unirank'])} from <code>{html.text(source)}</code>."


def _facts(data: ReportData) -> dict[str, Any]:
    plan, report, identity = data.plan, data.record.report, data.record.identity
    found = {
        "decoder linears": f"{report.targets_before:,} to {report.targets_after:,} parameters "
        f"({report.removed_of_targets:.2%} removed; budget {plan.budget:,})",
        "whole model": f"{report.model_before:,} to {report.model_after:,} parameters "
        f"({report.removed_of_model:.2%} removed)",
        "matrices": f"{report.low_rank} low-rank, {report.dense} dense",
        "scheme, allocator": f"{plan.scheme}, {plan.allocator}",
        "settings of the plan": plan.described_settings(),
        "low-rank form": plan.described_form,
        "calibration": calibration_line(identity, mark=""),
    }
    if data.record.quantized is not None:
        found["quantised"] = data.record.quantized.described()
    for entry in data.record.evaluations:
        measured = entry["report"]
        beside = "" if entry["dense"] is None else f" (dense {entry['dense']:.2f})"
        found[f"perplexity on {measured['text']}"] = (
            f"{measured['perplexity']:.2f}{beside}, {measured['windows']} windows of {measured['window']} tokens, "
            f"{measured['dtype']}, text {measured['text_sha256'][:12]}"
        )
    found["analysis"] = plan.analysis or UNKNOWN
    if identity is not None:
        found["weights of the dense model"] = identity.model.weights_sha256
        found["versions"] = ", ".join(f"{name} {version}" for name, version in identity.versions.items())
    return found | dict(data.record.files)


def _commands(data: ReportData) -> str:
    identity = data.record.identity
    if identity is None:
        return "<p>How it was made is not known.</p>"
    note = (
        "rank_plan.json lies beside the weights and holds every rank. Of a text that is a file, only the name is known."
    )
    later = healing_commands(data.record.source, data.record.training)
    for title, _ in training_sections(data.record.training)[len(later) :]:  # in their order
        note += f" {title} came after that."
    made = [_compress(data, identity), *later]
    commands = "".join(f"<pre>{html.text(shlex.join(command))}</pre>" for command in made)
    return f"{commands}<p>{html.text(note)}</p>"


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
    options["shrink"] = calibration.shrink or 0
    options |= {"precision": calibration.precision, "dtype": identity.model.dtype}
    refine = data.plan.settings.get("refine")
    if isinstance(refine, Mapping):  # read from a file, so nothing in it is certain
        options |= {"refine": refine.get("mix"), "refine-damping": refine.get("damping")}
        options["refine-shrink"] = refine.get("shrink") or 0  # said, for a record from before there was any has none
        if refine.get("metric"):
            options |= {"refine-metric": True, "refine-metric-damping": refine.get("metric_damping")}
        options |= {f"refine-{name}": refine.get(name) for name in ("centred", "dense")}
    command = ["unirank", "compress", data.record.source]
    for name, value in options.items():
        if value is not None and value is not False:
            command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return command
