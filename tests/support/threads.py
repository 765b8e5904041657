"""The same work with several numbers of threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def with_threads(run: Callable[[], T], counts: tuple[int, ...] = (1, 2, 4)) -> list[T]:
    """What `run()` gives with each number of torch's threads; the number is then what it was."""
    before, found = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            found.append(run())
    finally:
        torch.set_num_threads(before)
    return found
