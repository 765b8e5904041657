"""Queues of a GPU: nothing is read before it is there, or let go before it was read; no GPU is needed to see it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.pretend import pretend_gpu
from tests.support.queue_order import HOST, Order, watched
from unirank import queues
from unirank.disk.hashing import sha256_tree
from unirank.disk.tensorfile import write_tensors
from unirank.layerwise.recording import Streams

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


class Deaf(Order):
    """Planted fault: no queue waits for another."""

    def wait(self, queue: Any, mark: Any) -> None: ...


class Hasty(Order):
    """Planted fault: the program waits for no queue."""

    def settle(self, mark: Any) -> None: ...


@pytest.fixture
def ordered(monkeypatch: pytest.MonkeyPatch) -> Iterator[Order]:
    order = Order()
    with pretend_gpu(), watched(order, monkeypatch):
        yield order


def given_and_made(order: Order) -> list[str]:
    """Work beside a caller that is in a queue of its own; what comes out is read in a third one. Races."""
    with order.use(order.queue(GPU)):
        order.write("given")
        with queues.Beside(GPU) as beside:
            done = beside.submit(lambda: (order.read("given"), order.write("made")))
            done.result()
    with order.use(order.queue(GPU)):
        order.read("made")
        order.write("given")  # its memory, for something else
    return order.races


@pytest.mark.parametrize(("kind", "races"), [(Order, False), (Deaf, True), (Hasty, True)])
def test_work_beside_comes_behind_the_callers_queue_and_before_whoever_takes_the_result(
    kind: type[Order], races: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = kind()
    monkeypatch.setattr(queues, "CALLS", order)
    assert bool(given_and_made(order)) == races


def test_what_work_was_given_is_held_until_its_queue_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    held = []

    class Watching(Order):
        def settle(self, mark: Any) -> None:
            held.append(tensor() is not None)

    monkeypatch.setattr(queues, "CALLS", Watching())
    given = torch.ones(3)
    tensor = weakref.ref(given)
    with queues.Beside(GPU) as beside:
        done = beside.submit(lambda given: None, given)
        del given
        done.result()
    assert held == [True]


def test_a_thread_keeps_its_queue_and_threads_have_one_each(monkeypatch: pytest.MonkeyPatch) -> None:
    order, met = Order(), threading.Barrier(2, timeout=30)
    monkeypatch.setattr(queues, "CALLS", order)

    def where() -> Any:
        met.wait()
        return order.current()

    with queues.Beside(GPU, threads=2) as beside:
        rounds = [{done.result() for done in [beside.submit(where), beside.submit(where)]} for _ in range(3)]
    assert rounds == [{"queue 1", "queue 2"}] * 3


def test_an_error_comes_through_behind_what_its_queue_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    order = Order()
    monkeypatch.setattr(queues, "CALLS", order)

    def fail() -> None:
        order.write("half")
        raise ValueError("no")

    with queues.Beside(GPU) as beside, pytest.raises(ValueError, match="no"):
        beside.submit(fail).result()
    order.read("half")
    assert not order.races


def test_a_cpu_has_no_queues(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queues, "CALLS", None)
    with queues.Beside(CPU, threads=2) as beside:
        assert beside.submit(lambda a, b: a + b, 1, b=2).result() == 3
    tensor = torch.arange(6).view(2, 3)
    assert queues.to_host(tensor).data_ptr() == tensor.data_ptr()
    assert queues.to_host(tensor.T).is_contiguous()


@pytest.mark.parametrize("shape", [(), (0, 4), (3,), (16,), (7, 9), (64, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool])
def test_copies_to_the_host_are_whole_through_buffers_of_a_bounded_size(
    shape: tuple[int, ...], dtype: torch.dtype, ordered: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queues, "BUFFER", 64)
    monkeypatch.setattr(queues, "_buffers", threading.local())
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    on_gpu = values.to(GPU)
    for tensor, expected in ((on_gpu, values), (on_gpu.T, values.T)) if len(shape) == 2 else ((on_gpu, values),):
        found = queues.to_host(tensor)
        assert found.device == CPU
        assert found.is_contiguous()
        assert torch.equal(found, expected)
    assert ordered.locked <= 2 * 64
    assert not ordered.races


def test_copies_to_the_host_follow_the_callers_queue_and_no_buffer_is_filled_before_it_was_emptied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(queues, "BUFFER", 64)
    found = {}
    for kind in (Order, Hasty):
        monkeypatch.setattr(queues, "_buffers", threading.local())
        order = kind()
        with pretend_gpu(), watched(order, monkeypatch), order.use(order.queue(GPU)):
            tensor = torch.empty(100).to(GPU)
            tensor.copy_(torch.ones(100), non_blocking=True)
            queues.to_host(tensor)
        found[kind] = bool(order.races)
    assert found == {Order: False, Hasty: True}


@pytest.mark.parametrize("kind", [Order, Deaf, Hasty])
def test_hidden_states_in_the_hosts_memory_come_and_go_in_order(
    kind: type[Order], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer that runs over batches which are kept there: each comes while the one before it is at work."""
    order = kind()
    with pretend_gpu(), watched(order, monkeypatch):
        streams = Streams([], torch.zeros(1).to(GPU), host=queues.PageLocked(GPU))
        results = []
        for value in range(5):
            hidden = torch.full((1, 2, 3), float(value)).to(GPU)
            order.write(hidden.raw.data_ptr())
            streams.put(value, hidden)
        for _ in range(2):
            for position, hidden in enumerate(streams.entering()):
                assert hidden.is_cuda
                order.read(hidden.raw.data_ptr())
                result = hidden + 10
                order.write(result.raw.data_ptr())
                results.append(result)  # so that no address is used twice
                streams.put(position, result)
        assert not any(kept.is_cuda for kept in streams.batches)
        given = streams.settled()
        for kept in given.batches:
            order.read(kept.data_ptr(), by=HOST)
    assert [float(kept.mean()) for kept in given.batches] == [20.0, 21.0, 22.0, 23.0, 24.0]
    assert bool(order.races) == (kind is not Order)


def test_what_comes_back_does_not_take_memory_that_the_caller_still_reads(ordered: Order) -> None:
    host = queues.PageLocked(GPU)
    kept = host.keep(torch.zeros(3).to(GPU))
    ordered.read("an earlier tensor")  # let go since, so that its memory is free for the next one
    host.fetch(kept)
    with ordered.use("queue 1"):  # the one in which the next one comes
        ordered.write("an earlier tensor")
    assert not ordered.races


@pytest.mark.parametrize("what", ["file", "hash"])
def test_files_and_hashes_of_a_gpus_tensors_follow_the_callers_queue(what: str, ordered: Order, tmp_path: Path) -> None:
    """Row 9 of the review: threads copied in the default queue, whatever queue the caller was in."""
    plain = {name: torch.full((50,), float(index)) for index, name in enumerate("abc")}
    with ordered.use(ordered.queue(GPU)):
        tensors = {name: torch.empty(50).to(GPU) for name in plain}
        for name, tensor in tensors.items():
            tensor.copy_(plain[name], non_blocking=True)
        if what == "hash":
            assert sha256_tree(tensors.items()) == sha256_tree(plain.items())
        else:
            write_tensors(tmp_path / "gpu.safetensors", tensors, {"x": 1})
            write_tensors(tmp_path / "cpu.safetensors", plain, {"x": 1})
            assert (tmp_path / "gpu.safetensors").read_bytes() == (tmp_path / "cpu.safetensors").read_bytes()
    assert not ordered.races
