"""What a checkpoint says of the trainings behind it: fine-tuning and healing, each with what was before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unirank.disk.strictjson import Damaged, entry, number

HEALED, TUNED = "healed", "fine-tuned"
_EARLIER = "before_that"
# What is shown of the settings.
_TUNING = ("steps", "batch", "window", "rank", "schedule", "distill", "seed")
_HEALING = ("mix", "passes", "lr", "held_out")


def trainings(training: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The records of all trainings, the first one first."""
    found = []
    while training is not None:
        found.append(training)
        training = training.get(_EARLIER)
    return found[::-1]


def kind_of(training: Mapping[str, Any]) -> str:
    """HEALED or TUNED; the record of a fine-tuning names no kind."""
    return HEALED if training.get("kind") == "heal" else TUNED


def check_training(training: Any) -> None:
    """Raise Damaged unless a record, and those before it, can be shown."""
    while training is not None:
        settings, data = entry(training, "settings", dict), entry(training, "data", dict)
        entry(data, "text", str)
        healed = training.get("kind") is not None
        for key in _HEALING if healed else _TUNING:
            if key not in settings:
                raise Damaged(f"the settings of its training have no {key}")
        if healed:
            _check_healing(training, data)
        else:
            _check_tuning(training)
        training = training.get(_EARLIER)


def _check_healing(training: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    if training["kind"] != "heal":
        raise Damaged(f"the kind of its training is {str(training['kind'])[:80]!r}")
    for key in ("window", "train_windows", "held_out_windows", "seed"):
        entry(data, key, int)
    for key in ("whole_windows", "sampled_windows"):
        if key in data:  # records of earlier versions have none
            entry(data, key, int)
    entry(data, "shares", list, type(None))
    for key in ("split", "revision"):
        entry(data, key, str, type(None))
    if (second := entry(data, "second", dict, type(None))) is not None:
        entry(second, "text", str)
    for layer in entry(training, "layers", list):
        for key in ("before", "after"):
            number(entry(layer, key, float, int), f"{key} in the layers of its training")
        for key in ("passes", "best"):
            entry(layer, key, int)
        if layer.get("lr") is not None:  # records of earlier versions have none
            number(entry(layer, "lr", float, int), "lr in the layers of its training")
    if (distilled := training.get("distilled")) is not None:
        for key in ("held_out_before", "held_out_after"):
            number(entry(distilled, key, float, int), f"{key} in the distillation of its training")


def _check_tuning(training: Mapping[str, Any]) -> None:
    for step in entry(training, "log", list):
        if not isinstance(step, dict):
            raise Damaged(f"the log of its training has {str(step)[:80]!r}")
        for key in ("loss", "eval_loss"):
            if key in step:
                number(step[key], f"{key} in the log of its training")


def training_rows(training: Mapping[str, Any] | None) -> dict[str, str]:
    """A line for each training under what it did; several are numbered in their order."""
    chain = trainings(training)
    lines = [(kind_of(one), _healing_line(one) if kind_of(one) == HEALED else _tuning_line(one)) for one in chain]
    if len(lines) == 1:
        return dict(lines)
    return {f"{position}. {kind}": line for position, (kind, line) in enumerate(lines, start=1)}


def _tuning_line(training: Mapping[str, Any]) -> str:
    settings, data = training["settings"], training["data"]
    return (
        f"{settings['steps']} steps of {settings['batch']} x {settings['window']} tokens of `{data['text']}`, LoRA of "
        f"rank {settings['rank']} on the factors, {settings['schedule']}, distill = {settings['distill']}, "
        f"seed {settings['seed']}"
    )


def _rates(settings: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> str:
    """The learning rate, or the range of what the layers' errors made it."""
    if settings["lr"] is not None:
        return str(settings["lr"])
    rates = sorted(layer["lr"] for layer in layers if layer.get("lr") is not None)
    ends = dict.fromkeys(f"{rate:.2g}" for rate in rates[:1] + rates[-1:])
    return " to ".join(ends) or "by the layers' errors"


def _healing_line(training: Mapping[str, Any]) -> str:
    settings, data, layers = training["settings"], training["data"], training["layers"]
    better = sum(layer["best"] > 0 for layer in layers)
    before, after = (sum(layer[key] for layer in layers) / max(1, len(layers)) for key in ("before", "after"))
    second = "" if data["second"] is None else f", stopped by `{data['second']['text']}` too"
    of = f" of {data['window']} tokens of `{data['text']}`"
    windows = f"{data['train_windows']} windows{of}"
    felt = ", in the metric of the loss" if any(layer.get("metric") for layer in layers) else ""
    parts = []
    if layers:
        parts.append(
            f"{better} of {len(layers)} layers, at most {settings['passes']} passes over {windows}{second}, "
            f"mix = {settings['mix']}{felt}, lr = {_rates(settings, layers)}, seed {data['seed']}; mean held-out "
            f"error of a layer {before:.4f} before, {after:.4f} after"
        )
    distilled = training.get("distilled")
    if distilled is not None:
        read, written = data.get("whole_windows", 0), data.get("sampled_windows", 0)
        read = read if read or written else data["train_windows"]  # until distillation had windows of its own
        seen = [f"{read} windows{'' if layers else of}"] * (read > 0)
        seen += [f"{written} {'' if read else 'windows '}that the dense model wrote"] * (written > 0)
        parts.append(
            f"{'then ' if layers else ''}{settings.get('distill_steps')} steps of distillation"
            f" on {' and '.join(seen)}, divergence on held-out windows "
            f"{distilled['held_out_before']:.4f} before, {distilled['held_out_after']:.4f} after"
        )
    return "; ".join(parts)
