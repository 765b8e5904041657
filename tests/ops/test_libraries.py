"""The CUDA library: one that is damaged, or of another CUDA, costs one warning; devices without code are told apart."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from unirank import libraries, ops

OPS = ["cosine_accumulate_", "gram_accumulate_", "batched_eigh", "batched_svd", "global_topk"]

# A CUDA torch, as far as unirank asks, and a folder with a library that no loader takes.
BROKEN = """
import contextlib, io, json, sys, torch, unirank
torch.version.cuda, registered, impl = "13.0", [], torch.library.impl
unirank.__path__.append(sys.argv[1])
torch.library.impl = lambda name, key, *more: registered.append((str(name), str(key))) or impl(name, key, *more)
from unirank import ops
from unirank.cli.main import main
w, _ = ops.batched_eigh(torch.eye(3)[None])
sys.argv = ["unirank", "info", "--json"]
with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
    main()
print(json.dumps([registered, ops.has_cuda_kernels(), w.tolist(), json.loads(printed.getvalue())["cuda_kernels"]]))
"""


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    (tmp_path / "unirank_cuda.so").write_bytes(b"\x7fELF, and then nothing")
    return tmp_path


def test_a_library_that_does_not_load_is_one_warning_compositions_serve_and_info_says_why(broken: Path) -> None:
    done = subprocess.run([sys.executable, "-c", BROKEN, str(broken)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    registered, kernels, w, said = json.loads(done.stdout)
    assert [name for name, key in registered if key == "CUDA"] == [f"unirank::{name}" for name in OPS]
    assert not kernels
    assert w == [[1.0, 1.0, 1.0]]
    problem = f"unirank_cuda.so does not load into torch {torch.__version__} with CUDA 13.0 ("
    assert said.startswith(f"none, the ops run as torch compositions on a GPU: {problem}")
    assert done.stderr.count("does not load") == 1
    assert "file too short" in said or "ELF" in said  # the loader's own words, which say what is wrong
    assert f"UnirankWarning: CUDA tensors are served by torch compositions, which are slower: {problem}" in done.stderr


def test_of_a_cpu_build_the_reason_is_said_without_a_warning(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    missing = libraries.load_cuda_library().problem
    assert missing == f"unirank_cuda.so was not built; torch {torch.__version__} is a CPU build"
    monkeypatch.setattr(sys.modules["unirank"], "__path__", [str(broken)])
    missing = libraries.load_cuda_library().problem
    assert missing == f"unirank_cuda.so needs a CUDA build of torch, and torch {torch.__version__} is a CPU build"
    monkeypatch.setattr(sys.modules["unirank"], "__path__", [str(broken / "nowhere")])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "was not built; build it with `UNIRANK_CUDA=ON pip install" in str(libraries.load_cuda_library().problem)


@pytest.mark.parametrize(
    ("built", "runs", "runs_not"),
    [
        (["75-real"], [(7, 5)], [(7, 0), (8, 0)]),
        (["80-real"], [(8, 0), (8, 9)], [(7, 5), (9, 0)]),
        (["89-real"], [(8, 9)], [(8, 6)]),
        (["80-virtual"], [(8, 0), (11, 0)], [(7, 5)]),
        (["80"], [(8, 6), (11, 0)], [(7, 5)]),
        (["90a-real"], [(9, 0)], [(10, 0)]),
        (["100-real", "120"], [(10, 3), (12, 0), (13, 0)], [(9, 0), (11, 0)]),
        (["native"], [(8, 6)], []),
        ([], [(8, 6)], []),
    ],
)
def test_which_devices_code_runs_on(built: list[str], runs: list[tuple], runs_not: list[tuple]) -> None:
    assert [libraries.covers(built, device) for device in runs + runs_not] == [True] * len(runs) + [False] * len(
        runs_not
    )


def test_a_device_without_code_is_served_by_compositions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loaded library, as far as unirank sees, and a device that is too old for it."""
    monkeypatch.setattr(ops, "_cuda", libraries.CudaLibrary(None, ("80", "90-real")))
    assert ops.has_cuda_kernels() is not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    ops._has_code.cache_clear()
    try:
        assert not ops.has_cuda_kernels()
        said = "unirank_cuda.so has no code for NVIDIA T4 (capability 7.5); it was built for 80, 90-real"
        assert ops.cuda_kernels_missing() == said

        class OnGpu(torch.Tensor):
            is_cuda, device = True, torch.device("cuda", 0)

        assert ops._serving(torch.eye(2).as_subclass(OnGpu)) is ops._Compositions
        assert ops._serving(torch.eye(2)) is torch.ops.unirank
    finally:
        ops._has_code.cache_clear()
