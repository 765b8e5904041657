"""One layer, run further and further: what its modules have given is not computed again, as far as memory goes.

The second pass stops at every input of a layer, fits the linears that read it, and goes on. All that ran before the
stop is final, for each linear before it was fitted; so a run that starts again at the layer's input hands out what
the modules gave in the run before, with the same bits, and computes only what stands between them (the attention
itself, norms, sums) and what is new.

What is kept has a bound in bytes. The first batches are kept as far as it goes; the others run from the start every
time, with the same bits too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn

from unirank.layerwise.recording import LayerCall, shadowed


class _Reached(BaseException):
    """A layer got as far as the input that was asked for. No Exception: who explains a layer's errors lets it pass."""


class Replay:
    """Runs of one layer over all batches, each as far as an input that comes after that of the run before."""

    def __init__(
        self,
        layer: nn.Module,
        calls: Sequence[LayerCall],
        stream: Sequence[torch.Tensor],
        linears: Sequence[str],
        probe: tuple[LayerCall, torch.Tensor],
        *,
        room: int | None = None,
    ) -> None:
        """`stream` enters the layer, one tensor `[B, T, D]` a batch; a few tokens, `probe`, show how it runs.

        Only what has one of the `linears` in it (paths in the layer) is kept: the rest is cheap, and its memory would
        not be. It is at most `room` bytes, but for what one batch gives while it runs; None is no bound.
        """
        self._layer = layer
        self._calls, self._stream = calls, list(stream)
        self._kept = _run_once(layer, linears, probe)
        self._given: list[dict[str, _Given]] = [{} for _ in stream]
        self._room, self._sizes = room, [0] * len(stream)
        self._remembered = len(stream)  # batches, from the first one on, of which anything is kept

    def inputs(self, path: str) -> Iterator[torch.Tensor]:
        """What enters the linear at `path` in the layer, `[T, N]`, batch after batch. Every batch must be taken."""
        for position, (call, x) in enumerate(zip(self._calls, self._stream, strict=True)):
            reached: list[torch.Tensor] = []
            stop = _caught(self._layer.get_submodule(path), reached)
            with suppress(_Reached), self._replayed(position, keep=position < self._remembered), stop:
                call.run(self._layer, x)
            self._keep_to_room(position)
            yield reached.pop()

    def _keep_to_room(self, position: int) -> None:
        """Forget the last batches where all that was given, by that of `position` now, is too much."""
        self._sizes[position] = sum(given.size for given in self._given[position].values())
        while self._room is not None and sum(self._sizes) > self._room:
            self._remembered -= 1
            self._given[self._remembered].clear()
            self._sizes[self._remembered] = 0

    def outputs(self) -> list[torch.Tensor]:
        """What leaves the layer, one tensor `[B, T, D]` a batch; ends the replay."""
        for position, call in enumerate(self._calls):
            with self._replayed(position, keep=False):
                self._stream[position] = call.run(self._layer, self._stream[position])
            self._given[position].clear()
        return self._stream

    @contextmanager
    def _replayed(self, position: int, *, keep: bool) -> Iterator[None]:
        given = self._given[position]
        modules = dict(self._layer.named_modules())
        with ExitStack() as stack:
            for path in self._kept:
                stack.enter_context(shadowed(modules[path], _replaying(path, modules[path].forward, given, keep)))
            yield


class Inputs:
    """What enters linears of a layer that stays as it is, for one linear after the other.

    Of the first batches, which run once, what enters all the linears is kept, as far as `room` bytes go. The others run
    up to each of the linears, and from the last one on to the end.
    """

    def __init__(
        self,
        layer: nn.Module,
        calls: Sequence[LayerCall],
        stream: list[torch.Tensor],
        linears: Sequence[str],
        *,
        room: int | None = None,
    ) -> None:
        """`stream` enters the layer, one tensor `[B, T, D]` a batch. Each is replaced by what leaves the layer; those
        that are not kept, when the inputs of the last linear are taken.

        Args:
            linears: paths in the layer, in the order in which they run; their inputs must be asked for in that order.
        """
        self._calls, self._stream, self._linears = calls, stream, linears
        self._seen: list[dict[str, torch.Tensor]] = []
        self._layer: nn.Module | None = layer
        used = 0
        for position in range(len(stream)):
            seen, output = self._run(position, linears)
            used += sum(x.nbytes for x in seen.values())
            if room is not None and used > room:
                return
            self._seen.append(seen)
            stream[position] = output
        self._layer = None  # its memory is needed

    def inputs(self, path: str) -> Iterator[torch.Tensor]:
        """What enters the linear at `path`, `[T, N]`, batch after batch. Every batch must be taken."""
        for seen in self._seen:
            yield seen.pop(path)
        for position in range(len(self._seen), len(self._stream)):
            yield self._again(position, path)

    def _again(self, position: int, path: str) -> torch.Tensor:
        if path == self._linears[-1]:
            seen, self._stream[position] = self._run(position, [path])
            return seen[path]
        assert self._layer is not None
        reached: list[torch.Tensor] = []
        with suppress(_Reached), _caught(self._layer.get_submodule(path), reached):
            self._calls[position].run(self._layer, self._stream[position])
        return reached.pop()

    def _run(self, position: int, linears: Sequence[str]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The inputs of `linears`, and what leaves the layer."""
        assert self._layer is not None
        seen: dict[str, torch.Tensor] = {}
        with ExitStack() as stack:
            for path in linears:

                def hook(_module: nn.Module, args: tuple[Any, ...], _path: str = path) -> None:
                    seen[_path] = args[0].reshape(-1, args[0].shape[-1])

                stack.callback(self._layer.get_submodule(path).register_forward_pre_hook(hook).remove)
            output = self._calls[position].run(self._layer, self._stream[position])
        return seen, output


class _Given:
    """What a module gave, and whether somebody has written to it since (Falcon adds to its MLP's output in place)."""

    def __init__(self, output: Any) -> None:
        self.output = output
        self._tensors = _tensors(output)
        self._versions = [tensor._version for tensor in self._tensors]
        self.size = sum(tensor.nbytes for tensor in self._tensors)

    @property
    def untouched(self) -> bool:
        return self._versions == [tensor._version for tensor in self._tensors]


def _replaying(path: str, forward: Callable[..., Any], given: dict[str, _Given], keep: bool) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if path in given:
            if given[path].untouched:
                return given[path].output
            del given[path]
        output = forward(*args, **kwargs)
        if keep and _is_plain(output):
            for inner in [name for name in given if name.startswith(path + ".")]:
                del given[inner]
            given[path] = _Given(output)
        return output

    return run


def _is_plain(output: Any) -> bool:
    """Tensors, Nones and tuples of them; anything else may hold what is not seen here."""
    if isinstance(output, tuple):
        return all(_is_plain(value) for value in output)
    # Torch does not count what is written to a tensor of inference mode.
    return output is None or (isinstance(output, torch.Tensor) and not output.is_inference())


def _tensors(output: Any) -> list[torch.Tensor]:
    if isinstance(output, tuple):
        return [tensor for value in output for tensor in _tensors(value)]
    return [] if output is None else [output]


def _run_once(layer: nn.Module, linears: Sequence[str], probe: tuple[LayerCall, torch.Tensor]) -> list[str]:
    """The paths of `linears` and of the modules around them, without those that the layer runs more than once."""
    runs: dict[str, int] = {}
    for path in linears:
        parts = path.split(".")
        runs |= {".".join(parts[: i + 1]): 0 for i in range(len(parts))}
    call, x = probe
    with ExitStack() as stack:
        for path in runs:

            def count(_module: nn.Module, _args: tuple[Any, ...], _path: str = path) -> None:
                runs[_path] += 1

            stack.callback(layer.get_submodule(path).register_forward_pre_hook(count).remove)
        call.run(layer, x)
    return [path for path, count in runs.items() if count == 1]


@contextmanager
def _caught(module: nn.Module, reached: list[torch.Tensor]) -> Iterator[None]:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
        reached.append(args[0].reshape(-1, args[0].shape[-1]))
        raise _Reached

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
