"""What runs at the same time on a GPU, seen on a pretend one: a store has a CPU's bytes, whatever the order of work."""

from __future__ import annotations

import dataclasses
import importlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import unirank
from tests.support.pretend import Journal, pretend_gpu
from tests.support.tiny import build
from unirank import queues
from unirank.analysis import decompose
from unirank.analysis.overlap import Solvers, needs_of_decomposition, shares_of
from unirank.analysis.scheme import scheme
from unirank.analysis.scheme.base import Problem
from unirank.types import Factors, LinearSpec

fill_store = importlib.import_module("unirank.analysis.fill_store")
LAYERS = 3
NO_ROOM = 1000  # bytes that are free on the GPU: neither hidden states nor a second layer have room


@pytest.fixture(scope="module")
def of_a_cpu(tokenizer, settings: unirank.Calibration, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The layers' files of an analysis on the CPU."""
    store = tmp_path_factory.mktemp("cpu") / "store"
    unirank.analyze(unirank.describe(model(), tokenizer, source="tiny"), store, calibration=settings)
    return layers(store)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model() -> Any:
    return build("llama", num_hidden_layers=LAYERS, attn_implementation="eager")


def layers(store: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(store.glob("layer-*"))}


def analyze(tokenizer: Any, settings: unirank.Calibration, store: Path, free: int = 64 << 30, **more: Any) -> Journal:
    with pretend_gpu(free=free) as gpu:
        loaded = unirank.describe(model().to("cuda"), tokenizer, source="tiny")
        unirank.analyze(loaded, store, calibration=settings, **more)
    return gpu


def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensor files that are written from here on."""
    module, names = importlib.import_module("unirank.analysis.store"), []
    original: Callable[..., None] = module.write_tensors

    def noted(path: Path, *given: Any) -> None:
        names.append(path.name)
        original(path, *given)

    monkeypatch.setattr(module, "write_tensors", noted)
    return names


@pytest.mark.parametrize(("keep", "streams"), [(None, 0), (False, 0), (True, LAYERS - 1)])
def test_hidden_states_are_written_only_where_that_was_asked_for(
    keep: bool | None, streams: int, tokenizer, settings, of_a_cpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = written(monkeypatch)
    analyze(tokenizer, settings, tmp_path / "store", keep_hidden=keep)
    assert sum(name.startswith("stream-") for name in names) == streams
    assert layers(tmp_path / "store") == of_a_cpu


@pytest.mark.parametrize(("keep", "streams"), [(None, LAYERS - 1), (True, LAYERS - 1), (False, 0)])
def test_a_cpu_writes_hidden_states_unless_that_was_denied(
    keep: bool | None, streams: int, tokenizer, settings, of_a_cpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = written(monkeypatch)
    loaded = unirank.describe(model(), tokenizer, source="tiny")
    unirank.analyze(loaded, tmp_path / "store", calibration=settings, keep_hidden=keep)
    assert sum(name.startswith("stream-") for name in names) == streams
    assert layers(tmp_path / "store") == of_a_cpu


@pytest.mark.parametrize("keep", [False, True])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    keep: bool, tokenizer, settings, of_a_cpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without hidden states on the disk it runs the layers that are done again, and does not write them again."""

    def stop(stage: str, done: int, total: int) -> None:
        if stage.startswith("calibrate") and done == 1:
            raise KeyboardInterrupt

    store = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        analyze(tokenizer, settings, store, keep_hidden=keep, progress=stop)
    times = {name: (store / name).stat().st_mtime_ns for name in layers(store)}
    assert 0 < len(times) < LAYERS
    original, ran = fill_store.calibrate_layer, []

    def noted(loaded: Any, index: int, *args: Any, **more: Any) -> Any:
        ran.append(index)
        return original(loaded, index, *args, **more)

    monkeypatch.setattr(fill_store, "calibrate_layer", noted)
    analyze(tokenizer, settings, store, keep_hidden=keep)
    assert ran == list(range(len(times) if keep else 0, LAYERS))
    assert {name: (store / name).stat().st_mtime_ns for name in times} == times
    assert layers(store) == of_a_cpu


def test_a_layer_is_decomposed_while_the_next_one_is_calibrated(
    tokenizer, settings, of_a_cpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither goes on before the other has begun, so it ends only where both run."""
    begun = [threading.Event() for _ in range(LAYERS + 1)]
    solving = [threading.Event() for _ in range(LAYERS)]
    calibrate, solve = fill_store.calibrate_layer, fill_store.decompose_layer

    def calibrated(loaded: Any, index: int, *args: Any, **more: Any) -> Any:
        begun[index].set()
        assert index == 0 or solving[index - 1].wait(30)
        return calibrate(loaded, index, *args, **more)

    def decomposed(loaded: Any, stats: Any, *args: Any, **more: Any) -> Any:
        solving[stats.layer].set()
        assert stats.layer + 1 == LAYERS or begun[stats.layer + 1].wait(30)
        return solve(loaded, stats, *args, **more)

    monkeypatch.setattr(fill_store, "calibrate_layer", calibrated)
    monkeypatch.setattr(fill_store, "decompose_layer", decomposed)
    analyze(tokenizer, settings, tmp_path / "store")
    assert layers(tmp_path / "store") == of_a_cpu


@pytest.mark.parametrize("on_gpu", [False, True])
def test_work_takes_turns_on_a_cpu_and_on_a_gpu_without_room(
    on_gpu: bool, tokenizer, settings, of_a_cpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, calibrate, solve = [], fill_store.calibrate_layer, fill_store.decompose_layer

    def calibrated(loaded: Any, index: int, *args: Any, **more: Any) -> Any:
        order.append(("calibrate", index))
        result = calibrate(loaded, index, *args, **more)
        order.append(("calibrated", index))
        return result

    def decomposed(loaded: Any, stats: Any, *args: Any, **more: Any) -> Any:
        order.append(("decompose", stats.layer))
        return solve(loaded, stats, *args, **more)

    monkeypatch.setattr(fill_store, "calibrate_layer", calibrated)
    monkeypatch.setattr(fill_store, "decompose_layer", decomposed)
    store = tmp_path / "store"
    if on_gpu:
        analyze(tokenizer, settings, store, free=NO_ROOM)
    else:
        unirank.analyze(unirank.describe(model(), tokenizer, source="tiny"), store, calibration=settings)
    assert order == [(kind, i) for i in range(LAYERS) for kind in ("calibrate", "calibrated", "decompose")]
    assert layers(store) == of_a_cpu


def test_hidden_states_go_to_the_hosts_memory_before_they_go_to_files(
    tokenizer, settings, of_a_cpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    record = fill_store.record

    def recorded(*args: Any, **more: Any) -> Any:
        kept.append((more["folder"], more["host"]))
        return record(*args, **more)

    monkeypatch.setattr(fill_store, "record", recorded)
    for name, more in (("gpu", {}), ("host", {"free": NO_ROOM}), ("asked", {"hidden_limit": 0})):
        analyze(tokenizer, settings, tmp_path / name, **more)
    memory = psutil.virtual_memory()._replace(available=NO_ROOM)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    analyze(tokenizer, settings, tmp_path / "files", free=NO_ROOM)
    assert kept[0] == (None, None)
    assert kept[1][0] is None
    assert isinstance(kept[1][1], queues.PageLocked)
    assert kept[2:] == [(tmp_path / "asked", None), (tmp_path / "files", None)]
    for name in ("gpu", "host", "asked", "files"):
        assert layers(tmp_path / name) == of_a_cpu, name


def test_weights_of_a_streamed_layer_stay_until_they_are_decomposed(
    model_dir: Path, settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next layer takes the place of one whose decomposition has not begun."""
    left = threading.Event()
    calibrate, solve = fill_store.calibrate_layer, fill_store.decompose_layer

    def calibrated(loaded: Any, index: int, *args: Any, **more: Any) -> Any:
        if index == 1:
            left.set()
        return calibrate(loaded, index, *args, **more)

    def decomposed(loaded: Any, stats: Any, *args: Any, **more: Any) -> Any:
        assert stats.layer > 0 or left.wait(30)
        assert stats.layer > 0 or next(loaded.model.get_submodule(f"{loaded.layers}.0").parameters()).is_meta
        return solve(loaded, stats, *args, **more)

    whole = tmp_path / "whole"
    unirank.analyze(model_dir, whole, calibration=settings, device="cpu")
    monkeypatch.setattr(fill_store, "calibrate_layer", calibrated)
    monkeypatch.setattr(fill_store, "decompose_layer", decomposed)
    with pretend_gpu(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        unirank.analyze(model_dir, tmp_path / "streamed", calibration=settings, device="cuda", stream=True)
    found, expected = (unirank.open_store(tmp_path / name).energies() for name in ("streamed", "whole"))
    for name, energies in expected.items():
        torch.testing.assert_close(found[name], energies, rtol=1e-4, atol=1e-6 * float(energies[0]))


def test_writers_follow_the_queue_that_the_caller_is_in(tokenizer, settings, of_a_cpu, tmp_path: Path) -> None:
    """Row 9 of the review: a writer's copies were in the default queue, which waits for no other."""
    with pretend_gpu() as gpu:
        loaded = unirank.describe(model().to("cuda"), tokenizer, source="tiny")
        gpu.entries.clear()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            unirank.analyze(loaded, tmp_path / "store", calibration=settings)
    marked = {entry.detail for entry in gpu.entries if entry.kind == "record"}
    assert f"stream {side.stream_id}" in marked
    assert "stream 0" not in marked
    assert gpu.count("to host", "disk/") == gpu.count("to host", "analysis/store") == 0  # all by `queues.to_host`
    assert layers(tmp_path / "store") == of_a_cpu


# -- matrices of a layer ----------------------------------------------------------------------------------------------


def problems(*shapes: tuple[int, int]) -> list[Problem]:
    return [Problem(str(i), torch.ones(shape).to("cuda"), None, 1) for i, shape in enumerate(shapes)]


def test_what_a_gpu_solves_together_follows_from_the_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompose, "_ROOM", 2 * 8 * 6 * 64)  # two square matrices of 8
    with pretend_gpu():
        given = problems((8, 8), (4, 8), (8, 8), (8, 8), (4, 8), (20, 20))
        parts = [[problem.name for problem in part] for part in decompose._parts(given)]
    assert parts == [["5"], ["0", "2"], ["3"], ["1", "4"]]


def test_solvers_work_at_the_same_time_as_far_as_there_is_room() -> None:
    met = threading.Barrier(2, timeout=30)
    running, most, lock = 0, 0, threading.Lock()

    def solve(part: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        if part < 2:
            met.wait()  # the first two must meet
        with lock:
            running -= 1
        return part * 10

    with queues.Beside(torch.device("cpu"), threads=4) as threads:
        assert list(Solvers(threads, room=2).map(solve, range(6), lambda part: 1)) == [0, 10, 20, 30, 40, 50]
        assert most == 2
        most, met = 0, threading.Barrier(1)
        assert list(Solvers(threads, room=1).map(solve, range(6), lambda part: 3)) == [0, 10, 20, 30, 40, 50]
        assert most == 1


@pytest.mark.parametrize("error", [ValueError("matrix 0 is not finite"), RuntimeError("CUDA out of memory")])
def test_what_goes_wrong_in_a_thread_is_told_as_ever(
    error: Exception, tokenizer, settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr("unirank.ops.batched_eigh", fail)
    ours = isinstance(error, ValueError)
    told = r"layers\.0 failed: matrix 0" if ours else "out of memory"
    with pytest.raises(unirank.UnirankError if ours else RuntimeError, match=told):
        analyze(tokenizer, settings, tmp_path / "store")


def test_half_of_the_free_memory_decomposes_where_a_layer_has_room_in_it() -> None:
    shapes = [("a", 0, 100, 50), ("b", 0, 50, 100), ("c", 1, 9, 9)]
    specs = [LinearSpec(name, layer, "mlp", name, m, n) for name, layer, m, n in shapes]
    largest, held = needs_of_decomposition(specs, torch.float64)
    assert largest == 8 * (2 * 100 * 50 + 4 * 50 * 50)
    assert held == 8 * (50 * 50 + 100 * 100) + 2 * 2 * 8 * 50 * 150
    assert needs_of_decomposition(specs, torch.float32)[0] == largest // 2
    free = 2 * (largest + held)
    assert dataclasses.astuple(shares_of(free, specs, torch.float64)) == (True, largest)
    assert dataclasses.astuple(shares_of(free - 2, specs, torch.float64)) == (False, free - 2 - held)


def test_a_factor_is_handed_over_whole(tokenizer, settings) -> None:
    """Threads or none: equal bits, in the order of the linears."""
    with pretend_gpu():
        loaded = unirank.describe(model().to("cuda"), tokenizer, source="tiny")
        specs = [spec for spec in loaded.linears if spec.layer == 0]
        eye = {spec.name: torch.eye(spec.n, dtype=torch.float64).to("cuda") for spec in specs}
        moments = {name: unirank.types.Moment(c, 0 * c[0], 9, c.sum(0)) for name, c in eye.items()}
        stats = unirank.types.LayerStats(0, moments, {name: name for name in moments}, {})
        alone = decompose.decompose_layer(loaded, stats, scheme("whiten"))
        with queues.Beside(torch.device("cuda", 0), threads=3) as threads:
            found = decompose.decompose_layer(loaded, stats, scheme("whiten"), solvers=Solvers(threads, 1 << 40))
    assert list(found) == list(alone) == [spec.name for spec in specs]
    for name, factors in alone.items():
        assert_equal(factors, found[name])


def assert_equal(one: Factors, other: Factors) -> None:
    for key in ("left", "right", "energy"):
        assert torch.equal(getattr(one, key).cpu(), getattr(other, key).cpu())
