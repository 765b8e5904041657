"""Beside a GPU nothing that passes between layers is on disk; gradients are the same bytes, also after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.support.pretend import pretend_gpu
from tests.support.stores import contents
from tests.support.tiny import WORDS, made_up_identity
from unirank.analysis import gradient_pass, hidden
from unirank.analysis.store import AnalysisStore, create_or_resume
from unirank.layerwise import recording
from unirank.types import LoadedModel

WINDOWS = torch.randint(2, len(WORDS), (5, 24), generator=torch.Generator().manual_seed(2))
LAYERS = 3


def passed(loaded: LoadedModel, path: Path, **options: Any) -> AnalysisStore:
    store = create_or_resume(path, made_up_identity(gradient_windows=len(WINDOWS)), loaded.linears)
    with sdpa_kernel(SDPBackend.MATH):  # the attention that both devices have
        gradient_pass.gradient_pass(loaded, WINDOWS, store, batch=2, **options)
    return store


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are written into stores."""
    from unirank.analysis import store

    names: list[str] = []
    plain = store.write_tensors

    def write(path: Path, *rest: Any) -> None:
        names.append(path.name.removesuffix(".safetensors"))
        plain(path, *rest)

    monkeypatch.setattr(store, "write_tensors", write)
    return names


@pytest.mark.parametrize("free", [64 << 30, 0])
def test_a_gpu_writes_gradients_and_nothing_else(free: int, make_model, tmp_path: Path, written: list[str]) -> None:
    wanted = passed(make_model(), tmp_path / "cpu")
    assert {name.split("-")[0] for name in written} == {"forward", "backward", "gradient"}
    written.clear()
    loaded, steps = make_model(), []
    with pretend_gpu(free=free) as gpu:
        loaded.model.to("cuda")
        passed(loaded, tmp_path / "gpu", progress=lambda _, done, __: steps.append(done))
    assert written == [f"gradient-{layer:04d}" for layer in reversed(range(LAYERS))]
    assert steps == sorted(steps)
    assert steps[-1] == 2 * LAYERS
    assert contents(tmp_path / "gpu") == contents(wanted.path)
    brought_back = gpu.count("to device", "queues.py")
    assert bool(brought_back) == (free == 0)  # without room they are in the host's memory meanwhile


def test_a_pass_that_was_killed_adds_up_the_missing_layers_alone(make_model, tmp_path, written, monkeypatch) -> None:
    whole = passed(make_model(), tmp_path / "whole", keep=False)
    written.clear()
    sums: list[bool] = []
    plain = gradient_pass.backward_layer

    def watched(*args: Any, sums_of: list[bool] = sums, **options: Any) -> Any:
        sums_of.append(options["sums"])
        return plain(*args, **options)

    def killed(_stage: str, done: int, _total: int) -> None:
        if done == 2 * LAYERS - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        passed(make_model(), tmp_path / "killed", keep=False, progress=killed)
    assert written == ["gradient-0002", "gradient-0001"]
    written.clear()
    monkeypatch.setattr(gradient_pass, "backward_layer", watched)
    passed(make_model(), tmp_path / "killed", keep=False)
    assert written == ["gradient-0000"]
    assert sums == [False, False, True]
    assert contents(tmp_path / "killed") == contents(whole.path)


def test_what_a_pass_left_on_the_disk_is_gone_on_from(make_model, tmp_path: Path, written: list[str]) -> None:
    """A run that keeps nothing, behind one that kept."""

    def killed(_stage: str, done: int, _total: int) -> None:
        if done == 2 * LAYERS - 1:
            raise KeyboardInterrupt

    whole = passed(make_model(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        passed(make_model(), tmp_path / "killed", keep=True, progress=killed)
    passed(make_model(), tmp_path / "killed", keep=False)
    store = create_or_resume(tmp_path / "killed", whole.identity, whole.linears)  # deletes what is not needed any more
    assert contents(store.path) == contents(whole.path)


def test_without_room_in_any_memory_they_are_in_mapped_files(make_model, tmp_path: Path, monkeypatch) -> None:
    whole = passed(make_model(), tmp_path / "whole")
    folders: list[Path] = []
    plain = recording.mapped_copy

    def mapped(folder: Path, tensor: torch.Tensor) -> torch.Tensor:
        folders.append(folder)
        return plain(folder, tensor)

    monkeypatch.setattr(hidden, "free_bytes", lambda _: 0)
    monkeypatch.setattr(recording, "mapped_copy", mapped)
    passed(make_model(), tmp_path / "mapped", keep=False)
    assert folders == [tmp_path / "mapped"] * 3 * (2 * LAYERS + 1)  # 3 batches enter and leave layers, there and back
    assert contents(tmp_path / "mapped") == contents(whole.path)
