"""How data flows through one decoder layer, found by watching tensors and never by names.

Which linears read the same input? Where does the attention sublayer end? A few tokens run through the layer with a hook
on every module, and object identity answers both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from unirank.errors import InputError
from unirank.layerwise.recording import Recording, layers_of
from unirank.types import SUBLAYERS, LinearSpec, LoadedModel


@dataclass(frozen=True)
class LayerTrace:
    """What the structure of a layer says."""

    input_of: dict[str, str]  # linear (full name) -> the first linear (full name) that read the same input
    middle: str | None  # module (path in the layer) whose input is the stream between the sublayers; None: parallel
    last_linear: dict[
        str, str
    ]  # sublayer -> its last linear to run (path in the layer); its output is f_s(x) if parallel


@dataclass(frozen=True)
class TracedLayer:
    """One decoder layer, its targets, and how data flows through it."""

    module: nn.Module
    prefix: str  # its path from the model's root
    specs: list[LinearSpec]
    trace: LayerTrace

    def path_of(self, name: str) -> str:
        """The path inside the layer of a linear that is named from the model's root."""
        return name.removeprefix(self.prefix + ".")


def traced_layer(
    loaded: LoadedModel, index: int, recording: Recording, probe: torch.Tensor
) -> tuple[TracedLayer, torch.Tensor]:
    """Layer `index`, traced by the probe's hidden states `[1, T, D]` that enter it; and those that leave it.

    Raises InputError like `trace_layer`.
    """
    module = layers_of(loaded)[index]
    prefix = f"{loaded.layers}.{index}"
    specs = [spec for spec in loaded.linears if spec.layer == index]
    trace, left = trace_layer(module, prefix, specs, recording.probe_calls[index].run, probe)
    return TracedLayer(module, prefix, specs, trace), left


@dataclass(frozen=True)
class _Event:
    name: str
    inputs: torch.Tensor
    output: torch.Tensor
    by_position: bool  # whether `inputs` is the first argument, as hooks need it


def trace_layer(
    layer: nn.Module,
    prefix: str,
    specs: Sequence[LinearSpec],
    run: Callable[[nn.Module, torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
) -> tuple[LayerTrace, torch.Tensor]:
    """Trace `run(layer, hidden)` and return the trace and the layer's output.

    The stream between the sublayers is found by walking back from the input of the MLP's first linear over modules
    that hold no target (norms, dropouts) to a tensor that no module made, that is a residual sum. Reaching the layer's
    own input instead means that the sublayers are parallel (GPT-NeoX, Falcon, Cohere).

    Raises InputError when a target does not run, when the MLP runs before the attention, or when what a sublayer reads
    or adds has not the size of the stream.
    """
    events: list[_Event] = []  # keeps every tensor alive, so that object identity is unique

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            inputs = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)), None)
            made = output[0] if isinstance(output, tuple | list) and output else output
            # A module that hands its input on (a dropout at rest) makes nothing.
            if inputs is not None and isinstance(made, torch.Tensor) and made is not inputs:
                events.append(_Event(name, inputs, made, bool(args) and args[0] is inputs))

        return hook

    handles = [
        module.register_forward_hook(watch(name), with_kwargs=True) for name, module in layer.named_modules() if name
    ]
    try:
        output = run(layer, hidden)
    finally:
        for handle in handles:
            handle.remove()
    return _read(events, prefix, specs, hidden), output


def _read(events: list[_Event], prefix: str, specs: Sequence[LinearSpec], hidden: torch.Tensor) -> LayerTrace:
    by_path = {spec.name.removeprefix(prefix + "."): spec for spec in specs}
    linears = [event for event in events if event.name in by_path]
    missing = by_path.keys() - {event.name for event in linears}
    if missing or len(linears) != len(specs):
        names = ", ".join(sorted(missing)) or "one of them more than once"
        raise InputError(
            f"{prefix} must run each of its linears exactly once for a token batch; it does not run {names}."
        )

    first_reader: dict[int, str] = {}
    input_of = {}
    for event in linears:
        owner = first_reader.setdefault(id(event.inputs), event.name)
        input_of[by_path[event.name].name] = by_path[owner].name

    order = {sublayer: [e for e in linears if by_path[e.name].sublayer == sublayer] for sublayer in SUBLAYERS}
    position = {event.name: index for index, event in enumerate(linears)}
    if position[order["mlp"][0].name] < position[order["attention"][0].name]:
        raise InputError(
            f"{prefix} runs {order['mlp'][0].name} before its attention (that is {order['attention'][0].name}, which "
            "comes first among its modules); that structure is not understood."
        )
    last_linear = {sublayer: members[-1].name for sublayer, members in order.items()}

    producer = {id(event.output): event for event in reversed(events)}  # the innermost module wins
    reader = order["mlp"][0]
    while (made_by := producer.get(id(reader.inputs))) is not None and reader.inputs is not hidden:
        if any(path == made_by.name or path.startswith(made_by.name + ".") for path in by_path):
            break
        reader = made_by
    middle = None if reader.inputs is hidden else reader.name
    if middle is not None:
        _check_size(prefix, f"what {middle} reads", reader.inputs, hidden)
    else:
        for members in order.values():
            _check_size(prefix, f"what {members[-1].name} gives", members[-1].output, hidden)
    for event in (*linears, reader):
        if not event.by_position:
            raise InputError(f"{prefix} must give {event.name} its input as the first argument by position.")
    return LayerTrace(input_of, middle, last_linear)


def _check_size(prefix: str, what: str, found: torch.Tensor, hidden: torch.Tensor) -> None:
    """Raise InputError where `found` is no stream like `hidden` `[B, T, D]`, with tokens in any shape."""
    if found.shape[-1] != hidden.shape[-1] or found.numel() != hidden.numel():
        raise InputError(
            f"{prefix} takes hidden states {list(hidden.shape)}, and {what} is {list(found.shape)}; both must be equal "
            "for the sublayers to be told apart."
        )
