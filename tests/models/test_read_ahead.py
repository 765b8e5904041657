"""Layers that are streamed: a thread reads the next one, and no more; what it meets shows where the layer is used."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import unirank
from tests.support.pretend import pretend_gpu
from tests.support.tiny import build
from unirank.models import streamed
from unirank.models.streamed import Pages
from unirank.types import LoadedModel

LAYERS = 3


class Reads(dict[str, torch.Tensor]):
    """The weights of a checkpoint, which note who reads what; those in `broken` cannot be read."""

    def __init__(self, weights: Any) -> None:
        super().__init__({name: weights[name] for name in weights})
        self.by_thread: list[str] = []
        self.by_caller: list[str] = []
        self.broken: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()

    def __getitem__(self, name: str) -> torch.Tensor:
        ours = threading.current_thread() is threading.main_thread()
        if not ours:
            self.gate.wait(10)
        (self.by_caller if ours else self.by_thread).append(name)
        if name in self.broken:
            raise OSError(5, "Input/output error", name)
        return super().__getitem__(name)


@pytest.fixture
def loaded(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> LoadedModel:
    build("llama").save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    found = unirank.load(tmp_path / "dense", device="cpu", stream=True)
    pages: Any = found.pages
    pages._weights = Reads(pages._weights)
    return found


def pages_of(loaded: LoadedModel) -> Any:
    assert isinstance(loaded.pages, Pages)
    return loaded.pages


def reads_of(loaded: LoadedModel) -> Reads:
    return pages_of(loaded)._weights


def inside(loaded: LoadedModel, index: int) -> dict[str, torch.Tensor]:
    layer = loaded.model.get_submodule(f"{loaded.layers}.{index}")
    return {f"{loaded.layers}.{index}.{name}": tensor for name, tensor in layer.named_parameters()}


def check(loaded: LoadedModel, index: int) -> None:
    for name, tensor in inside(loaded, index).items():
        assert torch.equal(tensor.cpu(), dict.__getitem__(reads_of(loaded), name)), name


def layers_in(names: list[str]) -> list[int]:
    return sorted({int(name.split(".")[2]) for name in names})


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_the_next_layer_is_read_by_a_thread_and_has_the_same_bits(order: tuple[int, ...], loaded: LoadedModel) -> None:
    reads, step = reads_of(loaded), order[1] - order[0]
    for index in order:
        with loaded.resident(index, then=index + step):
            check(loaded, index)
            with loaded.resident(index):  # as the recording does; what is read ahead stays
                check(loaded, index)
        assert all(tensor.is_meta for tensor in inside(loaded, index).values())
    assert layers_in(reads.by_caller) == [order[0]]
    assert sorted(reads.by_thread) == sorted(name for i in order[1:] for name in inside(loaded, i))
    assert pages_of(loaded)._ahead is None  # and behind the last layer there is nothing


def test_one_layer_is_read_ahead_and_no_more(loaded: LoadedModel) -> None:
    reads = reads_of(loaded)
    with loaded.resident(0, then=1):
        pages_of(loaded)._ahead.result()
        assert layers_in(reads.by_thread) == [1]
    with loaded.resident(2):  # not the one that was expected, which is forgotten
        check(loaded, 2)
        assert pages_of(loaded)._ahead is None
    with loaded.resident(1):
        check(loaded, 1)
    assert layers_in(reads.by_caller) == [0, 1, 2]


def test_what_the_thread_meets_is_raised_where_the_layer_is_used(loaded: LoadedModel) -> None:
    reads = reads_of(loaded)
    reads.broken = {f"{loaded.layers}.1.mlp.up_proj.weight"}
    with loaded.resident(0, then=1):
        check(loaded, 0)
    with pytest.raises(OSError, match=r"Input/output error.*layers\.1\.mlp\.up_proj"), loaded.resident(1, then=2):
        pytest.fail("the layer is not there")
    assert pages_of(loaded)._ahead is None
    assert all(tensor.is_meta for tensor in inside(loaded, 1).values())
    reads.broken.clear()
    with loaded.resident(1, then=2):
        check(loaded, 1)
    with loaded.resident(2):
        check(loaded, 2)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupt_ends_the_thread(error: type[BaseException], loaded: LoadedModel) -> None:
    reads, before = reads_of(loaded), threading.active_count()
    reads.gate.clear()
    threads: list[threading.Thread] = []

    def work() -> None:
        with loaded.resident(0, then=1):
            threads.extend(t for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor"))
            threading.Timer(0.05, reads.gate.set).start()
            raise error

    with pytest.raises(error):
        work()
    for thread in threads:
        thread.join(10)
    assert len(reads.by_thread) == 1  # it ends behind the tensor at hand
    assert pages_of(loaded)._ahead is None
    assert threading.active_count() <= before + 1  # the timer may still be there


def test_what_is_put_in_the_meantime_counts(loaded: LoadedModel) -> None:
    name = f"{loaded.layers}.1.mlp.up_proj.weight"
    new = torch.zeros_like(dict.__getitem__(reads_of(loaded), name))
    with loaded.resident(0, then=1):
        pages_of(loaded)._ahead.result()
        pages_of(loaded).put(name, lambda: new)
    with loaded.resident(1, then=0):
        assert torch.equal(inside(loaded, 1)[name], new)
    with loaded.resident(0, then=1):
        pages_of(loaded)._ahead.result()
    assert reads_of(loaded).by_thread.count(name) == 1  # what is made is not read


def test_without_room_nothing_is_read_ahead(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(tensor.nbytes for tensor in inside(loaded, 1).values())
    for free, ahead in ((4 * size, True), (4 * size - 1, False)):
        monkeypatch.setattr(streamed.psutil, "virtual_memory", lambda free=free: type("M", (), {"available": free}))
        with loaded.resident(0, then=1):
            assert (pages_of(loaded)._ahead is not None) == ahead
        with loaded.resident(2):
            pass


def test_a_gpu_gets_it_from_page_locked_memory(tokenizer: PreTrainedTokenizerFast, loaded: LoadedModel) -> None:
    pages = pages_of(loaded)
    with pretend_gpu() as gpu:
        pages._device = torch.device("cuda", 0)
        for index in range(LAYERS):
            with loaded.resident(index, then=index + 1):
                assert {str(tensor.device) for tensor in inside(loaded, index).values()} == {"cuda:0"}
                check(loaded, index)
    per_layer = len(inside(loaded, 0))
    assert gpu.count("pinned") == (LAYERS - 1) * per_layer


def test_an_analysis_reads_all_layers_ahead_but_the_first(
    loaded: LoadedModel, calibration: unirank.Calibration, tmp_path: Path
) -> None:
    reads = reads_of(loaded)
    reads.by_caller.clear()
    unirank.analyze(loaded, tmp_path / "store", scheme="kfac", calibration=calibration)
    forward = backward = LAYERS - 1
    each = len(inside(loaded, 0))
    assert len(reads.by_thread) == (forward + backward + forward) * each
