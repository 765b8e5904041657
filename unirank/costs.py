"""What the stages of a job cost, so that they can be announced before they begin: one table, measured.

The unit is a multiplication with an addition of a forward pass. A forward pass over T tokens is `T` times the weights
that it multiplies by, the decoder's linears and the head; attention itself, norms and softmax are in no figure. The
table is from SmolLM2-135M in float32 on a CPU (`bench/pipeline/bench_stages.py` measures it again). Another model, or a
GPU, has other ratios: `unirank.estimate` corrects them while a job runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from unirank.progress import Stage
from unirank.types import LoadedModel

# Times a forward pass over the stage's tokens; of decoder layers alone where the head does not run.
_GRADIENTS = 6.0  # bench/README.md: 5.2 without the files that pass between layers; docs/results.json: 6 to 7
_GRADIENTS_FORWARD, _GRADIENTS_HEAD = 0.2, 0.12  # shares of that: the first half of the steps, and the first step back
_CALIBRATION = 1.95  # CPU seconds of 8 windows, and of 64 (docs/results.json, `analyze_seconds`)
_SECOND_PASS = 4.5  # the same, `apply_seconds`
_HEALING = 4.4  # for each pass; the same, `heal_seconds`
_BEHIND, _HEAD = 1.03, 1.53  # of the layers behind a linear, and of the head with its divergence; 8 windows
_DISTILLATION = 5.6  # the same, `distill_seconds`: 3 for the student, 1 for the dense model, AdamW, looks
_SAMPLING = 5.4  # CPU seconds of 32 windows of 512 tokens, written a token at a time
_TRAINING = 3.5  # counted, not measured: of adapters
_EVALUATION = 1.1  # the loss is computed in float32
# Times `M N min(M, N)` of every linear.
_DECOMPOSITION = {"whiten": 13.0, "afm": 13.0, "kfac": 30.0}  # what is left of 8 windows; `kfac` is a guess from 64
_DECOMPOSITION_OF_OTHERS = 15.0
_FIT = 23.0  # what is left of 8 windows
# Times the parameters: seconds, where a forward pass over 4096 tokens takes eleven.
_LOAD, _SAVE, _TRUNCATION = 1200.0, 400.0, 600.0


@dataclass(frozen=True)
class Sizes:
    """What costs depend on.

    Attributes:
        linears: layer, M and N of every target.
        layers: how many decoder layers.
        head: weights of the output head.
        parameters: of the whole model.
    """

    linears: tuple[tuple[int, int, int], ...] = ()
    layers: int = 0
    head: int = 0
    parameters: int = 0

    @classmethod
    def of(cls, loaded: LoadedModel | None) -> Sizes:
        """Of a model; of None, which is not loaded yet, nothing: all its stages then cost 0."""
        if loaded is None:
            return cls()
        config = loaded.model.config.get_text_config()
        shapes = tuple((spec.layer, spec.m, spec.n) for spec in loaded.linears)
        return cls._of(shapes, loaded.layer_count, config.vocab_size * config.hidden_size)

    @classmethod
    def of_shapes(cls, shapes: Iterable[tuple[int, int]], config: Any) -> Sizes:
        """Of matrices whose layers play no part: `(M, N)` each, and the configuration of the model."""
        text = config.get_text_config()
        return cls._of(tuple((0, m, n) for m, n in shapes), 1, text.vocab_size * text.hidden_size)

    @classmethod
    def _of(cls, linears: tuple[tuple[int, int, int], ...], layers: int, head: int) -> Sizes:
        return cls(linears, layers, head, sum(m * n for _, m, n in linears) + head)

    @property
    def targets(self) -> int:
        return sum(m * n for _, m, n in self.linears)

    @property
    def cubes(self) -> float:
        """`Σ M N min(M, N)`: what decompositions are in proportion to."""
        return float(sum(m * n * min(m, n) for _, m, n in self.linears))

    def forward(self, tokens: int) -> float:
        """Of a forward pass."""
        return float(tokens * (self.targets + self.head))


def load(sizes: Sizes) -> Stage:
    return Stage("load", _LOAD * sizes.parameters, typical=False)


def save(sizes: Sizes) -> Stage:
    return Stage("save", _SAVE * sizes.parameters, typical=False)


def gradients(sizes: Sizes, tokens: int) -> Stage:
    """The backward pass of an analysis: steps forward, the head with the first step back, steps back."""
    steps = 1 / (2 * max(1, sizes.layers))
    back = 1 - _GRADIENTS_FORWARD - _GRADIENTS_HEAD
    first = back * steps / 0.5
    parts = ((0.5, _GRADIENTS_FORWARD), (steps, _GRADIENTS_HEAD + first), (0.5 - steps, back - first))
    return Stage("gradients", _GRADIENTS * sizes.forward(tokens), parts)


def calibration(sizes: Sizes, scheme: str, tokens: int) -> Stage:
    """Calibrate and decompose; the head does not run."""
    passes = _CALIBRATION * float(tokens * sizes.targets)
    return Stage("calibrate and decompose", passes + _DECOMPOSITION.get(scheme, _DECOMPOSITION_OF_OTHERS) * sizes.cubes)


def measuring(sizes: Sizes, name: str, windows: int, tokens: int, linears: float = 1.0) -> Stage:
    """Every linear alone in its place: the layers behind it run, and the head. Early ones cost more.

    Args:
        linears: the share that is measured.
    """
    layers = max(1, sizes.layers)
    costs = [_BEHIND * (layers - layer) / layers * sizes.targets + _HEAD * sizes.head for layer, _, _ in sizes.linears]
    total = sum(costs)
    parts = tuple((1 / len(costs) / windows, cost / total / windows) for cost in costs) * windows if costs else ()
    return Stage(name, linears * windows * tokens * total, parts)


def evaluation(sizes: Sizes, name: str, tokens: int, times: float = 1.0) -> Stage:
    return Stage(name, _EVALUATION * times * sizes.forward(tokens))


def truncation(sizes: Sizes) -> Stage:
    return Stage("truncate", _TRUNCATION * sizes.targets)


def second_pass(sizes: Sizes, tokens: int) -> Stage:
    return Stage("refine", _SECOND_PASS * float(tokens * sizes.targets) + _FIT * sizes.cubes)


def healing(sizes: Sizes, tokens: int, passes: int) -> Stage:
    return Stage("heal", _HEALING * passes * float(tokens * sizes.targets))


def distillation(sizes: Sizes, steps: int, tokens: int) -> Stage:
    """Args: `tokens` of a step."""
    return Stage("distill", _DISTILLATION * steps * sizes.forward(tokens))


def sampling(sizes: Sizes, tokens: int) -> Stage:
    return Stage("sample", _SAMPLING * sizes.forward(tokens))


def training(sizes: Sizes, name: str, steps: int, tokens: int) -> Stage:
    """Args: `tokens` of a step."""
    return Stage(name, _TRAINING * steps * sizes.forward(tokens))
