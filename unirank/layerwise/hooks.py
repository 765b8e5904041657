"""Hooks on what modules read, and their end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

Hook = Callable[[nn.Module, tuple[Any, ...]], None]


@contextmanager
def reading(modules: Mapping[str, nn.Module], hook_of: Callable[[str], Hook]) -> Iterator[None]:
    """`hook_of(name)` is called with the positional inputs of each module whenever it runs inside."""
    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_pre_hook(hook_of(name)).remove)
        yield
