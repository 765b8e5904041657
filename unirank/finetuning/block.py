"""One layer of healing: all its parameters are trained on the dense layer's outputs (method 10)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from unirank.errors import NonFiniteError
from unirank.finetuning.healing_streams import Aim, Group
from unirank.finetuning.settings import Heal
from unirank.layerwise.recording import LayerCall

_CLIP = 1.0  # of the gradient's norm
_LR, _FAR = 1e-3, 0.25  # peak learning rate, and from which error on it is that (**choice**, docs/experiments.md)


@dataclass(frozen=True)
class Look:
    """Held-out windows with what a layer's outputs of them are compared with."""

    group: Group
    aims: Sequence[Aim]


@dataclass(frozen=True)
class Healed:
    """What became of one layer.

    Attributes:
        before, after: mean squared relative error on held-out windows, of the layer as it was and as it is.
        passes: that were made.
        best: after how many of them the layer was as it is now; 0 is the layer as it was.
        metric: whether errors counted by what the loss feels of them.
        lr: peak learning rate; None in files of earlier versions, which did not say it.
    """

    before: float
    after: float
    passes: int
    best: int
    metric: bool = False
    lr: float | None = None


class Block:
    """A compressed layer in its model, and its float32 copy, which is trained.

    Args:
        layer: of the compressed model; in memory.
        trained: names of the parameters that may change.
        bf16: whether the copy computes in bfloat16, where that is safe.
    """

    def __init__(self, layer: nn.Module, index: int, trained: Sequence[str], *, bf16: bool) -> None:
        self._layer, self._index, self._bf16 = layer, index, bf16
        self._own = {name: layer.get_parameter(name) for name in trained}
        self._copy = copy.deepcopy(layer).float()
        self._masters = {name: self._copy.get_parameter(name).requires_grad_(True) for name in trained}

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of the parameters that may change, in the model's dtype."""
        return {name: parameter.detach().clone() for name, parameter in self._own.items()}

    @torch.no_grad()
    def put(self, state: Mapping[str, torch.Tensor]) -> None:
        """Write parameters into the model's layer."""
        for name, tensor in state.items():
            self._own[name].copy_(tensor)

    @torch.no_grad()
    def error(self, looks: Sequence[Look]) -> float:
        """Of the model's layer, in its own dtype: mean over texts of the mean over held-out tokens."""
        errors = []
        for look in looks:
            total, tokens = 0.0, 0
            for calls, x, aim in zip(look.group.own_calls, look.group.own.entering(), look.aims, strict=True):
                count = aim.weight.numel()
                total += count * float(aim.error(calls[self._index].run(self._layer, x)))
                tokens += count
            errors.append(total / tokens)
        return sum(errors) / len(errors)

    def train(
        self,
        group: Group,
        aims: Sequence[Aim],
        looks: Sequence[Look],
        settings: Heal,
        *,
        seed: int,
        step: Callable[[int], object],
    ) -> Healed:
        """Train on `group`; the layer is then in the state that was best on `looks`, which may be the one it was in.

        Args:
            aims: of the group's batches; a batch is a step of the optimizer.
            seed: of the order of batches.
            step: is told how many steps are done.

        Raises NonFiniteError when a loss or a gradient is NaN or infinity, with layer and step; the layer is then in
        the best state so far.
        """
        best_state, passes, best = self.state(), 0, 0
        before = least = self.error(looks)
        if not math.isfinite(before):
            raise NonFiniteError(f"The output of layer {self._index} of the compressed model is NaN or infinity.")
        parameters = list(self._masters.values())
        steps = settings.passes * len(aims)
        lr = peak_rate(before) if settings.lr is None else settings.lr
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=settings.weight_decay)
        generator = torch.Generator().manual_seed(seed)
        done = 0
        try:
            for passes in range(1, settings.passes + 1):
                for position in torch.randperm(len(aims), generator=generator).tolist():
                    optimizer.param_groups[0]["lr"] = lr * _rate(done, steps, settings.warmup)
                    call = group.own_calls[position][self._index]
                    self._step(call, group.own.at(position), aims[position], parameters, optimizer, done)
                    done += 1
                    step(done)
                self.put(self._masters)
                error = self.error(looks)
                if error < least:
                    best_state, least, best = self.state(), error, passes
                elif settings.patience and passes - best >= settings.patience:
                    break
        finally:
            self.put(best_state)
        return Healed(before, least, passes, best, aims[0].metric is not None, lr)

    def _step(
        self,
        call: LayerCall,
        x: torch.Tensor,
        aim: Aim,
        parameters: Sequence[torch.Tensor],
        optimizer: torch.optim.Optimizer,
        done: int,
    ) -> None:
        optimizer.zero_grad()
        with torch.enable_grad():
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self._bf16):
                output = in_float32(call).run(self._copy, x.float())
            loss = aim.error(output)
            where = f"of layer {self._index} is NaN or infinity at step {done + 1}; a lower Heal.lr may help."
            if not bool(loss.isfinite()):
                raise NonFiniteError(f"The loss {where}")
            loss.backward()
        if not bool(torch.nn.utils.clip_grad_norm_(parameters, _CLIP).isfinite()):
            raise NonFiniteError(f"The gradient {where}")
        optimizer.step()


def peak_rate(error: float) -> float:
    """The peak learning rate for a layer of this squared relative error: in proportion to its root, at most 1e-3.

    What AdamW's steps put into a layer grows with their square, and a layer that is nearly right has no room for it.
    """
    return _LR * math.sqrt(min(1.0, error / _FAR))


def _rate(step: int, steps: int, warmup: float) -> float:
    """The learning rate of a step (from 0) over its peak: a straight rise, then a cosine that ends near 0."""
    rise = math.ceil(warmup * steps)
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def in_float32(call: LayerCall) -> LayerCall:
    """The call with every floating tensor (masks, position embeddings) in float32, as the copy's weights are."""
    return replace(call, args=_floats(call.args), kwargs=_floats(call.kwargs))


def _floats(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_floats(item) for item in value)
    if type(value) is dict:
        return {key: _floats(item) for key, item in value.items()}
    return value
