"""Several processes, started by torchrun: who they are, and sums whose order is fixed.

Without torchrun everything here is that of a single process. NCCL serves tensors on GPUs, gloo those on CPUs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed as dist

from unirank.errors import UnirankError, is_out_of_memory

_PART = 1 << 23  # entries that go to the next process at once, 32 MiB in float32 (**choice**)
PATIENCE = timedelta(minutes=30)  # the longest that one process may keep the others waiting (**choice**)


def is_distributed() -> bool:
    """Whether torchrun started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number; 0 writes and prints."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0")) if is_distributed() else 0


@contextmanager
def process_group() -> Iterator[None]:
    """All processes know each other inside. Nothing happens in a single one, or inside another such block.

    Raises UnirankError, with this process's rank, when another one was lost.
    """
    if not is_distributed() or dist.is_initialized():
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(backend, timeout=PATIENCE)
    who = f"Process {dist.get_rank()} of {dist.get_world_size()}"
    try:
        yield
    except dist.DistError as error:
        raise UnirankError(f"{who} lost another one; run the same command again to resume.") from error
    except RuntimeError as error:
        if is_out_of_memory(error) or "gloo" not in str(error).lower():
            raise
        raise UnirankError(f"{who} lost another one; run the same command again to resume.") from error
    finally:
        dist.destroy_process_group()


def share(count: int) -> range:
    """Which of `count` things in a row are this process's: a part without gaps, the first ones one longer."""
    whole, rest = divmod(count, size())
    first = rank() * whole + min(rank(), rest)
    return range(first, first + whole + (rank() < rest))


def owners(costs: Sequence[float]) -> list[int]:
    """Process by thing: the most expensive first, each to the process with the least to do.

    Equal costs give equal answers."""
    load = [0.0] * size()
    found = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        found[index] = min(range(size()), key=lambda process: (load[process], process))
        load[found[index]] += costs[index]
    return found


def sum_in_order(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, in place: to 0's is added 1's, and so on, so that every run rounds alike.

    It goes down the processes in parts, so that all of them are at work, and none holds a second whole tensor.
    """
    if size() > 1:
        for part in tensor.view(-1).split(_PART):
            if rank() > 0:
                before = torch.empty_like(part)
                dist.recv(before, rank() - 1)
                part.copy_(before.add_(part))
            if rank() < size() - 1:
                dist.send(part, rank() + 1)
        dist.broadcast(tensor, size() - 1)
    return tensor


def from_zero(value: int) -> int:
    """Process 0's `value`, in all of them."""
    box = torch.tensor([value], dtype=torch.int64)
    if size() > 1:
        dist.broadcast(box, 0)
    return int(box)


def send_to_zero(tensors: Sequence[torch.Tensor], owner: int) -> None:
    """Give the tensors of process `owner` to process 0, which has empty ones of the same shapes; others do nothing."""
    for tensor in tensors:
        if rank() == owner:
            dist.send(tensor.contiguous(), 0)
        elif rank() == 0:
            dist.recv(tensor, owner)


def barrier() -> None:
    """Wait for all processes."""
    if size() > 1:
        dist.barrier()
