"""What is made of what while a layer runs: the chain of states of its residual stream, with no names (method 11).

Every torch function that is called is watched, its tensors told apart by identity. A state of the stream is a tensor of
the stream's size through which everything passes that leads from the layer's input to its output: behind an addition
nothing goes around the sum, inside a sublayer the stream itself goes around.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Flow(TorchFunctionMode):
    """Follows what depends on `start` through all torch functions that are called inside the context.

    A node is a number, in the order in which values were made; `start` is 0. A tensor that is written to in place is a
    new node from then on. Tensors are kept, so that identity stays unique: it is for a few tokens.
    """

    def __init__(self, start: torch.Tensor) -> None:
        super().__init__()
        self.tensors = [start]  # by node
        self.sources: list[tuple[int, ...]] = [()]  # by node: the nodes it was made of
        self.overwritten: set[int] = set()
        self._node = {id(start): 0}

    def __len__(self) -> int:
        return len(self.tensors)

    def node(self, tensor: torch.Tensor) -> int | None:
        """The node that `tensor` is now; None where it does not depend on the start."""
        return self._node.get(id(tensor))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        read = list(_tensors((args, kwargs or {})))
        sources = tuple(node for tensor in read if (node := self.node(tensor)) is not None)
        before = [_writes(tensor) for tensor in read]
        result = called(func, args, kwargs or {})
        if sources:
            for tensor, writes in zip(read, before, strict=True):
                if _writes(tensor) != writes:  # also where nothing is returned: an assignment to a part
                    self._made(tensor, sources)
            for tensor in _tensors(result):
                if not any(tensor is one for one in read):
                    self._made(tensor, sources)
        return result

    def _made(self, tensor: torch.Tensor, sources: tuple[int, ...]) -> None:
        if (old := self.node(tensor)) is not None:
            self.overwritten.add(old)
        self._node[id(tensor)] = len(self.tensors)
        self.tensors.append(tensor)
        self.sources.append(sources)

    def states(self, end: torch.Tensor) -> list[int]:
        """The nodes of the stream from the start to `end`, both among them, in order; empty where none leads there."""
        last = self.node(end)
        if last is None:
            return []
        on_the_way = {last}
        for node in range(last, 0, -1):
            if node in on_the_way:
                on_the_way.update(self.sources[node])
        farthest = dict.fromkeys(on_the_way, 0)  # by node: the last one that is made of it
        for node in on_the_way:
            for source in self.sources[node]:
                farthest[source] = max(farthest[source], node)
        states, reach = [], 0
        stream = self.tensors[0]
        for node in sorted(on_the_way):
            if reach <= node and is_stream(self.tensors[node], stream):
                states.append(node)
            reach = max(reach, farthest[node])
        return states if states and states[0] == 0 and states[-1] == last else []

    def depends(self, marks: Mapping[int, str], behind: int) -> list[frozenset[str]]:
        """By node: the marks of the nodes it was made of and its own, of those nodes that were made after `behind`."""
        found: list[frozenset[str]] = []
        for node, sources in enumerate(self.sources):
            own = frozenset([marks[node]]) if node in marks and node > behind else frozenset()
            found.append(own.union(*(found[source] for source in sources if source > behind)))
        return found

    def around(self, marks: Mapping[int, str], behind: int) -> set[int]:
        """The nodes that the node `behind` leads to on a way on which no node is marked."""
        found = {behind}
        for node in range(behind + 1, len(self.sources)):
            if node not in marks and found.intersection(self.sources[node]):
                found.add(node)
        return found


def called(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The watched function, by a frame that tells its errors from those of the watching (see `recording.foreign`)."""
    return func(*args, **kwargs)


def is_stream(tensor: torch.Tensor, stream: torch.Tensor) -> bool:
    """Whether `tensor` has the size of `stream` `[B, T, D]`, with tokens in any shape."""
    same = tensor.dim() > 1 and tensor.shape[-1] == stream.shape[-1] and tensor.numel() == stream.numel()
    return same and tensor.is_floating_point()


def _writes(tensor: torch.Tensor) -> int:
    """How often the tensor was written to; torch does not count in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, Iterable) and isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)
