"""The page's sections on what came after compression: fine-tuning and healing."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from html import escape
from typing import Any

from unirank.compression.trainings import HEALED, kind_of, trainings
from unirank.report import svg


def training_sections(training: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Title and HTML of each training, the first one first."""
    return [
        ("Healing", _healing(one)) if kind_of(one) == HEALED else ("Fine-tuning", _tuning(one))
        for one in trainings(training)
    ]


def healing_commands(source: str, training: Mapping[str, Any] | None) -> list[list[str]]:
    """Commands that heal OUT, what was compressed, as it was healed, up to the first fine-tuning."""
    commands, name = [], "OUT"
    for one in itertools.takewhile(lambda one: kind_of(one) == HEALED, trainings(training)):
        data = one["data"]
        options = {"against": source, "calib": data["text"], "split": data["split"], "text-revision": data["revision"]}
        if data["shares"] is not None:
            options["calib-shares"] = ",".join(str(share) for share in data["shares"])
        if data["second"] is not None:
            options["text"] = data["second"]["text"]
        options |= {"windows": data["train_windows"] + data["held_out_windows"], "window": data["window"]}
        options |= {"seed": data["seed"]}
        if one.get("gradients") is not None:
            options["store"] = "STORE"
        options |= {key.replace("_", "-"): value for key, value in one["settings"].items()}
        said = [word for key, value in options.items() if value is not None for word in (f"--{key}", str(value))]
        commands.append(["unirank", "heal", name, "-o", f"HEALED{len(commands) + 1}", *said])
        name = f"HEALED{len(commands)}"
    return commands


def _tuning(training: Mapping[str, Any]) -> str:
    losses = {
        label: [(float(index), entry[key]) for index, entry in enumerate(training["log"]) if key in entry]
        for label, key in (("training loss", "loss"), ("held-out loss", "eval_loss"))
    }
    losses = {label: curve for label, curve in losses.items() if curve}
    chart = svg.lines("loss", losses, x="log entry", y="nats a token", dots=True) if losses else ""
    return _said(training) + _figure("loss", chart)


def _healing(training: Mapping[str, Any]) -> str:
    errors = {
        key: [(float(index), layer[key]) for index, layer in enumerate(training["layers"])]
        for key in ("before", "after")
    }
    title = "held-out error of each layer"
    chart = svg.lines(title, errors, x="layer", y="squared, relative", dots=True) if training["layers"] else ""
    return _said(training) + (_figure(title, chart) if chart else "")


def _said(training: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{key} = {value}" for key, value in sorted(training["settings"].items()))
    return f"<p>{escape(training['data']['text'])}; {escape(settings)}</p>"


def _figure(title: str, chart: str) -> str:
    return f'<div class="charts"><figure><figcaption>{title}</figcaption>{chart}</figure></div>'
