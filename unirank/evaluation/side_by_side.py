"""One model, or two beside each other: perplexity on the same windows, a generated text, tokens a second."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from unirank.errors import InputError
from unirank.evaluation.perplexity import EvalReport, evaluate, generate
from unirank.evaluation.speed import Speed, tokens_per_second
from unirank.layerwise.recording import foreign
from unirank.models.loading import load_pretrained
from unirank.progress import OnProgress, Stage, expect, silent
from unirank.text.windows import BUILTIN_HELD_OUT

PROMPT = "The capital of France is"  # of two models, where nobody asked for another (**choice**)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Measured:
    """What was measured, in the order of the models.

    Attributes:
        prompt, samples: what both models were given, and how they went on; None where there is no text of every model.
        speeds: None where they were not measured.
        notes: whole sentences on what could not be measured, and why.
    """

    reports: tuple[EvalReport, ...]
    prompt: str | None = None
    samples: tuple[str, ...] | None = None
    speeds: tuple[Speed, ...] | None = None
    notes: tuple[str, ...] = ()

    @property
    def sample(self) -> tuple[str, str, str] | None:
        """Of two models: the prompt, then both texts."""
        if self.prompt is None or self.samples is None or len(self.samples) != 2:
            return None
        return self.prompt, self.samples[0], self.samples[1]

    @property
    def speed_pair(self) -> tuple[Speed, Speed] | None:
        """Of two models."""
        return None if self.speeds is None or len(self.speeds) != 2 else (self.speeds[0], self.speeds[1])

    def as_dicts(self) -> list[dict[str, Any]]:
        """One record a model: the perplexity's, and "prompt" with "sample", "speed" where there are any."""
        records = []
        for index, report in enumerate(self.reports):
            record = report.as_dict()
            if self.samples is not None:
                record |= {"prompt": self.prompt, "sample": self.samples[index]}
            if self.speeds is not None:
                record["speed"] = self.speeds[index].as_dict()
            records.append(record)
        return records


def measure(
    names: Sequence[str],
    *,
    text: str = BUILTIN_HELD_OUT,
    window: int | None = None,
    limit: int | None = None,
    split: str | None = None,
    prompt: str | None = None,
    speed: bool | None = None,
    loading: Mapping[str, Any] | None = None,
    progress: OnProgress = silent,
) -> Measured:
    """Load models by name, one after the other, and measure them.

    Args:
        names: directories or hub names.
        text, window, limit, split: as in `unirank.evaluate`.
        prompt: both go on from it. None is PROMPT where there are several models, and no text of a single one.
        speed: measure tokens a second, for which all models stay in memory. None is yes where there are several: on one
            machine, in turns, two can be compared. It takes seconds where perplexity takes minutes.
        loading: more arguments of `load_pretrained`.

    Raises what `load_pretrained`, `evaluate` and, with a `prompt`, `generate` raise; with `speed=True` what
    `tokens_per_second` raises. What nobody asked for and cannot be had is a note.
    """
    several = len(names) > 1
    labels = [Path(name).name for name in names]
    labels = labels if len({*labels}) == len(labels) else list(names)  # a stage has one name
    expect(progress, [stage for label in labels for stage in _stages(label)])
    reports, samples, models, notes = [], [], [], []
    for name, label in zip(names, labels, strict=True):
        progress(f"load {label}", 0, 1)
        model, tokenizer = load_pretrained(name, **dict(loading or {}))
        progress(f"load {label}", 1, 1)
        asked: dict[str, Any] = {"text": text, "window": window, "limit": limit, "split": split}
        stage = f"perplexity, {label}"
        reports.append(evaluate(model, tokenizer, **asked, stage=stage, progress=progress))
        if prompt is not None:
            samples.append(generate(model, tokenizer, prompt))
        elif several and not notes:
            sample, note = _tried("No text was generated", lambda m=model, t=tokenizer: generate(m, t, PROMPT))
            samples, notes = [*samples, sample], [*notes, *note]
        if speed or (several and speed is None):
            models.append((model, tokenizer))
        del model, tokenizer
    speeds = None
    if speed:
        speeds = tokens_per_second(models, progress=progress)
    elif models:
        speeds, note = _tried("Tokens a second were not measured", lambda: tokens_per_second(models, progress=progress))
        notes += note
    whole = len(samples) == len(names) and None not in samples
    return Measured(
        tuple(reports),
        (PROMPT if prompt is None else prompt) if whole else None,
        tuple(samples) if whole else None,
        speeds,
        tuple(notes),
    )


def _stages(label: str) -> list[Stage]:
    """Of one model, announced when nothing is known of its size: the text is what takes the time."""
    return [Stage(f"load {label}", 0.05, typical=False), Stage(f"perplexity, {label}", 1.0)]


def _tried(what: str, run: Callable[[], _T]) -> tuple[_T | None, list[str]]:
    """The result, or None and a sentence that begins with `what`."""
    try:
        with foreign("the model cannot generate"):
            return run(), []
    except InputError as error:
        return None, [f"{what}: {error}"]
