"""Warnings of the library in a terminal: one yellow line each, without a path, in the options of the command."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape

from unirank.errors import UnirankWarning


@contextmanager
def warnings_in_yellow(console: Console, translate: Callable[[str], str], *, enabled: bool = True) -> Iterator[None]:
    """Inside, our own warnings are lines of `console`, each once; those of others go where they went.

    Args:
        translate: from the library's arguments to options.
        enabled: off, ours are not shown at all; of several processes one shows them.
    """
    said: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("always", UnirankWarning)
        elsewhere = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if not issubclass(category, UnirankWarning):
                elsewhere(message, category, *place, **more)
            elif enabled and (sentence := translate(str(message))) not in said:
                said.add(sentence)
                console.print(f"[yellow]warning:[/] {escape(sentence)}", highlight=False, soft_wrap=True)

        warnings.showwarning = show
        yield
