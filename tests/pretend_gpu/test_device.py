"""The pretend GPU itself: what it lets meet, what it refuses as torch does, and that torch works on it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from tests.support.pretend import PretendTensor, pretend_gpu

CPU = torch.arange(6.0).reshape(2, 3)


def on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("cuda")


# Each leaves one tensor, or what draws its numbers, on the CPU.
FAULTS: dict[str, Callable[[torch.Tensor], object]] = {
    "an operand": lambda x: x + CPU,
    "a weight": lambda x: nn.functional.linear(x, CPU),
    "a bias": lambda x: nn.functional.linear(x, on_gpu(CPU), torch.ones(2)),
    "a product": lambda x: x @ CPU.T,
    "a product in a wider dtype": lambda x: torch.mm(x.bfloat16(), CPU.T.bfloat16(), out_dtype=torch.float32),
    "a triangular solve": lambda x: torch.linalg.solve_triangular(torch.eye(2), x, upper=False),
    "tokens of an embedding": lambda x: nn.functional.embedding(torch.tensor([0, 1]), x),
    "an index to gather by": lambda x: x.gather(1, torch.zeros(2, 1, dtype=torch.int64)),
    "an index to select by": lambda x: x.index_select(0, torch.tensor([0])),
    "an index of the GPU for a tensor of the CPU": lambda x: CPU[on_gpu(torch.tensor([0]))],
    "a mask to fill by": lambda x: x.masked_fill(CPU > 2, 0.0),
    "a mask to choose by": lambda x: torch.where(CPU > 2, x, x),
    "an attention mask": lambda x: nn.functional.scaled_dot_product_attention(
        x[None], x[None], x[None], attn_mask=torch.zeros(2, 2)
    ),
    "values that are put": lambda x: x.index_put_((on_gpu(torch.tensor([0])),), torch.ones(1, 3)),
    "a part of a whole": lambda x: torch.cat([x, CPU]),
    "a number in a stack": lambda x: torch.stack([x.sum(), torch.tensor(1.0)]),
    "a running sum": lambda x: torch.zeros(2, 3).add_(x),
    "a running sum of one number": lambda x: torch.tensor(0.0).add_(x.sum()),
    "where a result goes": lambda x: torch.add(x, x, out=torch.empty(2, 3)),
    "a generator": lambda x: torch.randn(3, device="cuda", generator=torch.Generator()),
    "a generator for a permutation": lambda x: torch.randperm(3, device="cuda", generator=torch.Generator()),
    "a gradient": lambda x: (x.requires_grad_() * x).backward(CPU),
    "a tensor without numbers": lambda x: x + torch.empty(2, 3, device="meta"),
    "what numpy is to see": lambda x: x.numpy(),
    "labels": lambda x: nn.functional.cross_entropy(x, torch.tensor([0, 1])),
    "an op of unirank": lambda x: torch.ops.unirank.gram_accumulate_(torch.zeros(3, 3), torch.zeros(3), x),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tensor_left_on_the_cpu_is_an_error(fault: str) -> None:
    with pretend_gpu():
        x = on_gpu(CPU)
        with pytest.raises((RuntimeError, TypeError), match=r"device|cuda|cpu|result is on"):
            FAULTS[fault](x)


# What torch allows between a GPU and a CPU.
LEGAL: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a number without dimensions": lambda x: x * torch.tensor(2.0),
    "indices of the CPU": lambda x: x[torch.tensor([1, 0])],
    "a list as an index": lambda x: x[[1, 0]],
    "a mask of the CPU as an index": lambda x: x[CPU > 2],
    "a copy to the GPU": lambda x: x.clone().copy_(CPU),
    "a copy from the GPU": lambda x: torch.empty(2, 3).copy_(x),
    "made like another": lambda x: torch.zeros_like(x) + x.new_ones(3) + x.new_tensor([1.0, 2.0, 3.0]),
    "made of numbers": lambda x: (
        torch.tensor([[1.0, 2.0, 3.0]], device=x.device) + torch.as_tensor([1.0], device="cuda")
    ),
    "drawn by nobody's generator": lambda x: torch.rand(3, device="cuda") * 0 + x,
    "one of two shapes": lambda x: torch.where(x > 2, x, 0.0),
    "a wider product": lambda x: torch.mm(x.bfloat16(), x.T.bfloat16(), out_dtype=torch.float32),
}


@pytest.mark.parametrize("meeting", LEGAL)
def test_what_torch_allows_gives_what_the_cpu_gives(meeting: str) -> None:
    with pretend_gpu():
        found = LEGAL[meeting](on_gpu(CPU)).cpu()
    if meeting == "a wider product":
        assert found.dtype is torch.float32
        assert torch.equal(found, CPU @ CPU.T)
    elif "device" not in meeting and "made of" not in meeting and "made like" not in meeting and "drawn" not in meeting:
        assert torch.equal(found, LEGAL[meeting](CPU).cpu())
    assert type(found) is torch.Tensor


def test_writing_through_indices_and_views_arrives() -> None:
    with pretend_gpu():
        x = on_gpu(torch.arange(6))
        x[[0, 5]] = x[[5, 0]]
        x[2:4].add_(10)
        x[1] = 7
        x[torch.tensor([4])] = 9
    assert x.tolist() == [5, 7, 12, 13, 9, 0]


def test_it_says_that_it_is_a_gpu_and_takes_everything_back() -> None:
    assert not torch.cuda.is_available()
    with pretend_gpu(free=123):
        x = torch.ones(2, device="cuda")
        assert (x.device, x.is_cuda, x.is_cpu, x.is_meta) == (torch.device("cuda", 0), True, False, False)
        assert x.to("cuda") is x
        assert torch.cuda.is_available()
        assert torch.cuda.mem_get_info() == (123, 80 << 30)
    assert not torch.cuda.is_available()
    assert type(torch.ones(2).to("cpu")) is torch.Tensor
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        torch.ones(2, device="cuda")


def test_modules_move_there_and_back_with_their_ties() -> None:
    tied = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    tied[1].weight = tied[0].weight
    before = tied[0].weight.detach().clone()
    with pretend_gpu():
        tied.to("cuda")
        assert tied[0].weight is tied[1].weight
        assert isinstance(tied[0].weight, nn.Parameter)
        assert isinstance(tied[0].weight, PretendTensor)
        twin = copy.deepcopy(tied)
        assert twin[0].weight is twin[1].weight
        tied.to(torch.float64).to("cpu")
    assert type(tied[0].weight) is nn.Parameter
    assert tied[0].weight is tied[1].weight
    assert torch.equal(tied[1].weight, before.double())


def test_training_there_is_training_here() -> None:
    found = []
    for device in ("cpu", "cuda"):
        with pretend_gpu():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 1)).to(
                device
            )
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                loss = torch.utils.checkpoint.checkpoint(model, CPU.to(device), use_reentrant=False).square().sum()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            found.append([parameter.detach().cpu() for parameter in model.parameters()])
    assert all(torch.equal(here, there) for here, there in zip(*found, strict=True))


def test_threads_that_start_inside_see_the_gpu() -> None:
    seen: list[str] = []

    def work() -> str:
        return str((torch.zeros(2, device="cuda") + CPU.to("cuda").sum()).device)

    with pretend_gpu(), ThreadPoolExecutor(2) as pool:
        thread = threading.Thread(target=lambda: seen.append(work()))
        thread.start()
        thread.join()
        seen += [pool.submit(work).result()]
    assert seen == ["cuda:0", "cuda:0"]


def test_streams_events_and_pinned_memory_are_in_the_journal() -> None:
    with pretend_gpu() as journal:
        side, done, x = torch.cuda.Stream(), torch.cuda.Event(blocking=True), torch.ones(3, device="cuda")
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            assert torch.cuda.current_stream() == side
            buffer = torch.empty(3, pin_memory=True).copy_(x, non_blocking=True)
            done.record(side)
        x.record_stream(side)
        torch.cuda.current_stream().wait_event(done)
        done.synchronize()
        assert buffer.is_pinned()
        assert torch.ones(3).pin_memory().is_pinned()
        assert not torch.ones(3).is_pinned()
        assert x.sum().item() == 3
    kinds = [entry.kind for entry in journal.entries]
    wanted = ["wait_stream", "enter stream", "pinned", "to host", "record", "record_stream", "wait_event"]
    assert [kind for kind in kinds if kind in wanted][: len(wanted)] == wanted
    assert journal.count("read") == 1
