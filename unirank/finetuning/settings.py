"""How to fine-tune, and how to heal: numbers alone, which need neither torch nor transformers."""

from __future__ import annotations

import math
import warnings
from dataclasses import InitVar, dataclass
from typing import Any, Literal

from unirank.errors import InputError

Schedule = Literal["joint", "left-then-right"]
Precision = Literal["auto", "float32", "bfloat16"]
_PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class Finetune:
    """How to fine-tune. Defaults are **choices**.

    Attributes:
        steps: optimizer steps, of all phases together.
        batch: windows a step.
        micro_batch: windows that run at once; less than `batch` saves memory. None is `batch`.
        window: tokens a window.
        lr: peak learning rate of AdamW; a cosine down to 0 in each phase, after `warmup`.
        warmup: fraction of the steps in which the rate rises.
        weight_decay: of the adapters.
        rank: of the adapters, not of the factors.
        alpha: adapters are scaled by alpha / rank. None is twice the rank.
        schedule: "joint" trains both factors at once; "left-then-right" the left ones in the first half of the steps,
            the right ones in the second (SVD-LLM).
        adapt_dense: also adapt the targets that stayed dense.
        distill: weight in [0, 1] of the divergence from the teacher; the rest is the cross-entropy.
        temperature: of that divergence.
        held_out: fraction of the windows, at least one, that is not trained on but tells which step was best.
        evaluate_every: steps between two looks at them; a checkpoint is kept each time. None is a tenth of the steps.
        patience: end a phase after so many looks without improvement; 0 never.
        gradient_checkpointing: compute activations twice, keep fewer.
        precision: "auto" is bfloat16 on GPUs that have it, else float32; weights and sums stay as they are.
        seed: of adapters and order.
    """

    steps: int = 200
    batch: int = 4
    micro_batch: int | None = None
    window: int = 512
    lr: float = 3e-4
    warmup: float = 0.05
    weight_decay: float = 0.0
    rank: int = 16
    alpha: float | None = None
    schedule: Schedule = "joint"
    adapt_dense: bool = False
    distill: float = 0.0
    temperature: float = 1.0
    held_out: float = 0.05
    evaluate_every: int | None = None
    patience: int = 0
    gradient_checkpointing: bool = False
    precision: Precision = "auto"
    seed: int = 0
    dense: InitVar[bool | None] = None  # what adapt_dense was called until 0.1; for one release

    def __post_init__(self, dense: bool | None) -> None:
        if dense is not None:
            warnings.warn("Finetune(dense=) is called adapt_dense now.", DeprecationWarning, stacklevel=3)
            object.__setattr__(self, "adapt_dense", dense)
        for name, least in (("steps", 1), ("batch", 1), ("window", 2), ("rank", 1), ("patience", 0), ("seed", 0)):
            _check(name, getattr(self, name), getattr(self, name) >= least, f"at least {least}")
        for name in ("lr", "temperature"):
            _check(name, getattr(self, name), getattr(self, name) > 0, "above 0")
        _check("distill", self.distill, 0 <= self.distill <= 1, "at least 0 and at most 1")
        _check("warmup", self.warmup, 0 <= self.warmup < 1, "at least 0 and less than 1")
        _check("held_out", self.held_out, 0 < self.held_out < 1, "above 0 and less than 1")
        _check("weight_decay", self.weight_decay, self.weight_decay >= 0, "at least 0")
        micro = self.batch if self.micro_batch is None else self.micro_batch
        _check("micro_batch", micro, micro >= 1 and self.batch % micro == 0, f"a divisor of batch = {self.batch}")
        for name, value in (("alpha", self.alpha), ("evaluate_every", self.evaluate_every)):
            _check(name, value, value is None or value > 0, "above 0")
        _check("schedule", self.schedule, self.schedule in ("joint", "left-then-right"), "joint or left-then-right")
        _check("precision", self.precision, self.precision in _PRECISIONS, ", ".join(_PRECISIONS))
        if self.schedule == "left-then-right":
            _check("steps", self.steps, self.steps >= 2, "at least 2 with left-then-right")


@dataclass(frozen=True)
class Heal:
    """How to refine a compressed model block by block (method 10). Defaults are **choices**.

    Attributes:
        mix: `m` in [0, 1]. 1 aims at what the dense layer makes of the dense model's stream (AA-SVD), 0 at what it
            makes of the stream that really enters the compressed layer.
        passes: over the training windows, for every layer; 0 leaves the layers as they are, for `distill_steps` alone.
        batch: windows a step. Fewer make more steps of the same windows, which helps more than it costs.
        metric_damping: of the output metric, where gradients give one: the share of the mean diagonal that every
            direction has.
        lr: peak learning rate of AdamW; a cosine down to 0 over all steps of a layer, after `warmup`. None: 1e-3 for a
            layer whose squared relative error on the held-out windows is 0.25 or more, below that in proportion to
            its root: large steps make a layer worse that is nearly right.
        warmup: fraction of the steps in which the rate rises.
        weight_decay: of AdamW, on everything that is trained.
        held_out: fraction of the windows, at least one, that is not trained on but tells which state of a layer was
            best. They come from the end of the text, the others from what is before it.
        patience: end a layer after so many passes without improvement; 0 never, for the last pass, when the rate is
            small, gains most. The best state is kept in any case.
        precision: "auto" is bfloat16 on GPUs that have it, else float32; weights and sums are float32 in any case.
        distill_steps: then so many steps of the whole model, all factors at once, on the divergence from the dense
            model (temperature 1). A tenth of them lies between two looks at its divergence on the held-out
            windows; after `patience` looks without improvement it ends. Needs both models in memory. 0 is none.
        distill_lr: peak learning rate of these steps. None: 1e-4 where the divergence on the held-out windows is 0.4
            nats a token or more, below that in proportion: what is near the dense model is thrown off by large steps.
        distill_sampled: share of their windows that the dense model writes itself, by sampling; the calibration text
            gives the others, and where it is too short for so many, the model writes more. 0 is the text alone: at
            best a little better on texts like it, and worse on another (docs/experiments.md).
    """

    mix: float = 0.5
    passes: int = 3
    batch: int = 2
    metric_damping: float = 0.1
    lr: float | None = None
    warmup: float = 0.1
    weight_decay: float = 0.0
    held_out: float = 0.1
    patience: int = 0
    precision: Precision = "auto"
    distill_steps: int = 0
    distill_lr: float | None = None
    distill_sampled: float = 0.5

    def __post_init__(self) -> None:
        for name, least in (("passes", 0), ("batch", 1), ("patience", 0), ("distill_steps", 0)):
            _check(name, getattr(self, name), getattr(self, name) >= least, f"at least {least}")
        if not self.passes and not self.distill_steps:
            raise InputError("passes and distill_steps are both 0: nothing would be trained.")
        _check("mix", self.mix, 0 <= self.mix <= 1, "at least 0 and at most 1")
        _check("metric_damping", self.metric_damping, self.metric_damping > 0, "above 0")
        for name, value in (("lr", self.lr), ("distill_lr", self.distill_lr)):
            _check(name, value, value is None or value > 0, "above 0")
        _check("warmup", self.warmup, 0 <= self.warmup < 1, "at least 0 and less than 1")
        _check("weight_decay", self.weight_decay, self.weight_decay >= 0, "at least 0")
        _check("held_out", self.held_out, 0 < self.held_out < 1, "above 0 and less than 1")
        _check("distill_sampled", self.distill_sampled, 0 <= self.distill_sampled <= 1, "at least 0 and at most 1")
        _check("precision", self.precision, self.precision in _PRECISIONS, ", ".join(_PRECISIONS))

    @property
    def samples(self) -> bool:
        """Whether the dense model has to write windows."""
        return self.distill_steps > 0 and self.distill_sampled > 0

    def sampled(self, windows: int) -> int:
        """How many of the `windows` of distillation the dense model writes."""
        return round(self.distill_sampled * windows)


def _check(name: str, value: Any, good: bool, legal: str) -> None:
    if not good or (isinstance(value, float) and not math.isfinite(value)):
        raise InputError(f"{name} = {value!r} is not legal; it must be {legal}.")
