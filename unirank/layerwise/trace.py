"""How data flows through one decoder layer, found by watching tensors and never by names.

Which linears read the same input? Between which states of the residual stream does each sublayer stand? A few tokens
run through the layer, with a hook on every module and all torch functions watched; object identity answers both.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from unirank.errors import InputError
from unirank.experts import as_modules
from unirank.layerwise.dataflow import Flow, is_stream
from unirank.layerwise.recording import Recording, layers_of
from unirank.types import LinearSpec, ListedSpec, LoadedModel, Sublayer


@dataclass(frozen=True)
class Place:
    """Where a tensor can be caught while the layer runs: what a module reads first by position, or what it gives."""

    module: str  # its path in the layer
    side: Literal["input", "output"]
    overwritten: bool = False  # the layer writes to the tensor afterwards, so whoever keeps it needs a copy


@dataclass(frozen=True)
class Span:
    """A sublayer's part of the residual stream.

    Attributes:
        start: the state that enters; None is what enters the layer.
        end: the state that leaves; None is what leaves the layer.
        branch: of sublayers in parallel, what this one adds to `start`; its stream out is `start` plus that.
    """

    start: Place | None = None
    end: Place | None = None
    branch: Place | None = None


@dataclass(frozen=True)
class LayerTrace:
    """What the structure of a layer says."""

    input_of: dict[str, str]  # linear (full name) -> the first linear (full name) that read the same input
    spans: dict[Sublayer, Span]  # in the order in which they run


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
    trace, left = trace_layer(module, prefix, as_modules(specs), recording.probe_calls[index].run, probe)
    return TracedLayer(module, prefix, specs, trace), left


@dataclass(frozen=True)
class _Event:
    """A module that ran."""

    name: str
    inputs: torch.Tensor
    reads: int | None  # the node that it reads first
    output: torch.Tensor
    gives: int | None
    at: int  # the last node that was made when it was done
    by_position: bool  # whether `inputs` is the first argument, as hooks need it


def trace_layer(
    layer: nn.Module,
    prefix: str,
    specs: Sequence[LinearSpec],
    run: Callable[[nn.Module, torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
) -> tuple[LayerTrace, torch.Tensor]:
    """Trace `run(layer, hidden)` and return the trace and the layer's output.

    Method 11: the stream has a state wherever everything passes that leads from the layer's input to its output. A
    sublayer goes from the state in which the one before it ended to the first state behind its own linears; norms
    before it belong to it, and what follows the last one too. Where two stand between the same two states, they are
    parallel (GPT-NeoX, Falcon, Cohere) if neither reads what the other makes, and each starts from the first state
    alone; else they share the step, and its cosine. They share it too where no module reads or gives the state between
    them (Gemma 3n, whose layers carry four streams at once).

    Raises InputError when a target does not run exactly once, when what leaves the layer cannot be followed back to
    what enters it, or when a module gets what has to be watched by keyword.
    """
    events: list[_Event] = []
    flow = Flow(hidden)
    entered: dict[str, int | None] = {}

    def before(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = _first_tensor(args, kwargs)
            entered[name] = None if inputs is None else flow.node(inputs)

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            inputs = _first_tensor(args, kwargs)
            made = output[0] if isinstance(output, tuple | list) and output else output
            # A module that hands its input on (a dropout at rest) makes nothing.
            if inputs is not None and isinstance(made, torch.Tensor) and made is not inputs:
                by_position = bool(args) and args[0] is inputs
                events.append(_Event(name, inputs, entered[name], made, flow.node(made), len(flow) - 1, by_position))

        return hook

    handles = []
    for name, module in layer.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(after(name), with_kwargs=True))
    try:
        with flow:
            output = run(layer, hidden)
    finally:
        for handle in handles:
            handle.remove()
    by_path = {spec.name.removeprefix(prefix + "."): spec for spec in specs}
    linears = [event for event in events if event.name in by_path]
    _check_linears(prefix, specs, by_path, linears)
    states = flow.states(output)
    if not states:
        raise InputError(
            f"What leaves {prefix} cannot be followed back to what enters it; that structure is not understood."
        )
    if flow.overwritten & {0}:
        raise InputError(f"{prefix} writes to the hidden states that enter it; unirank needs them as they are.")
    steps = _Steps(prefix, flow, states, events, by_path)
    return LayerTrace(_input_of(linears, by_path), steps.spans()), output


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)


def _check_linears(
    prefix: str, specs: Sequence[LinearSpec], by_path: dict[str, LinearSpec], linears: Sequence[_Event]
) -> None:
    ran = {event.name for event in linears}
    missing = {name for name, spec in by_path.items() if not isinstance(spec, ListedSpec)} - ran
    if missing or len(linears) != len(ran):
        names = ", ".join(sorted(missing)) or "one of them more than once"
        raise InputError(
            f"{prefix} must run each of its linears exactly once for a token batch; it does not run {names}."
        )
    for event in linears:
        if not event.by_position:
            raise InputError(f"{prefix} must give {event.name} its input as the first argument by position.")


def _input_of(linears: Sequence[_Event], by_path: dict[str, LinearSpec]) -> dict[str, str]:
    first_reader: dict[tuple[int, int | None], str] = {}
    found = {}
    for event in linears:
        if not isinstance(by_path[event.name], ListedSpec):
            owner = first_reader.setdefault((id(event.inputs), event.reads), event.name)
            found[by_path[event.name].name] = by_path[owner].name
    # Which tokens a network of a list sees is another matter for every batch.
    return found | {spec.name: spec.name for spec in by_path.values() if isinstance(spec, ListedSpec)}


class _Steps:
    """From states of the stream and modules that ran to the sublayers' spans."""

    def __init__(
        self,
        prefix: str,
        flow: Flow,
        states: list[int],
        events: Sequence[_Event],
        by_path: dict[str, LinearSpec],
    ) -> None:
        self._prefix, self._flow, self._states, self._events = prefix, flow, states, events
        self._members: dict[Sublayer, list[_Event]] = {}
        for event in events:
            if event.name in by_path:
                self._members.setdefault(by_path[event.name].sublayer, []).append(event)

    def spans(self) -> dict[Sublayer, Span]:
        found: dict[Sublayer, Span] = {}
        start, behind, members = None, 0, []
        steps = self._steps()
        for number, (state, until, names) in enumerate(steps, start=1):
            members = [*members, *names]
            end = self._place(state, until) if number < len(steps) else None
            if number < len(steps) and end is None:
                continue  # nobody can watch the state between this step and the next: they are one
            branches = self._branches(members, behind) if len(members) > 1 else {}
            for name in members:
                found[name] = Span(start, None, branches[name]) if branches else Span(start, end)
            start, behind, members = end, state, []
        return found

    def _steps(self) -> list[tuple[int, int, list[Sublayer]]]:
        """Of each step that has targets the state that ends it, the last one before the next step has made anything,
        and its sublayers. A sublayer that spans several steps joins them.
        """
        reach = {}
        for name, members in self._members.items():
            segments = [self._segment(event) for event in members]
            reach[name] = (min(segments), max(segments))
        steps: list[tuple[int, int, list[Sublayer]]] = []
        for name, (first, last) in sorted(reach.items(), key=lambda item: item[1]):
            if steps and first <= steps[-1][1]:
                begun, until, names = steps.pop()
                steps.append((begun, max(until, last), [*names, name]))
            else:
                steps.append((first, last, [name]))
        following = [first - 1 for first, _, _ in steps[1:]] + [len(self._states) - 1]
        return [
            (self._states[last], self._states[until], names)
            for (_, last, names), until in zip(steps, following, strict=True)
        ]

    def _segment(self, event: _Event) -> int:
        """The number of the first state that is made of what the linear gives, by the order in which things ran."""
        at = event.at + 1 if event.gives is None else event.gives
        return min(bisect_left(self._states, max(at, 1)), len(self._states) - 1)

    def _place(self, end: int, until: int) -> Place | None:
        """Where the first state from `end` to `until` can be caught that is read by a module, or given by one."""
        states = [state for state in self._states if end <= state <= until]
        for state in states:
            overwritten = state in self._flow.overwritten
            readers = [event for event in self._events if event.reads == state and event.by_position]
            if readers:
                return Place(readers[0].name, "input", overwritten)
            givers = [event for event in self._events if event.gives == state]
            if givers:
                return Place(givers[-1].name, "output", overwritten)
        by_name = next((event.name for event in self._events if event.reads in states), None)
        if by_name is not None:
            raise InputError(f"{self._prefix} must give {by_name} its input as the first argument by position.")
        return None

    def _branches(self, names: Sequence[Sublayer], behind: int) -> dict[Sublayer, Place]:
        """What each of several sublayers of one step adds by itself; empty where they depend on each other."""
        marks: dict[int, str] = {}
        for name in names:
            marks |= {event.gives: name for event in self._members[name] if event.gives is not None}
        made_of = self._flow.depends(marks, behind)
        around = self._flow.around(marks, behind)
        found: dict[Sublayer, Place] = {}
        for name in names:
            own = frozenset([name])
            if any(event.reads is not None and made_of[event.reads] - own for event in self._members[name]):
                return {}
            alone = [
                event
                for event in self._events
                if event.gives is not None
                and made_of[event.gives] == own
                and event.gives not in around
                and is_stream(event.output, self._flow.tensors[0])
            ]
            if not alone:
                return {}
            last = max(alone, key=lambda event: event.gives or 0)
            found[name] = Place(last.name, "output", last.gives in self._flow.overwritten)
        return found
