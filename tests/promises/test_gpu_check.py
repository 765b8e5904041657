"""The command for a GPU that is there for minutes, as far as a machine without one can try it."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from tests.support.wheel import ROOT
from tools import gpu_installed, gpu_present, gpu_results, local_version
from tools.gpu_probe import job
from tools.gpu_probe.__main__ import STEPS, main, parser

without_gpu = pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU")


@without_gpu
def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "tools" / "gpu_check.sh")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OUT": str(tmp_path / "out")})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "gpu-check: no GPU on this machine, nothing to check.\n"
    assert not (tmp_path / "out").exists()


def test_a_python_that_cannot_do_it_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_present.missing("cpu") is None
    monkeypatch.setattr(torch.version, "cuda", None)
    assert str(gpu_present.missing("cuda")).endswith("is a CPU build; install a CUDA build.")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert str(gpu_present.missing("cuda")).endswith("cannot use it; see nvidia-smi.")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert str(gpu_present.missing("cuda")).startswith("torch is not installed for")


def test_gpu_tests_say_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_installed.missing() == "No CUDA device is usable here."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("unirank.ops.cuda_kernels_missing", lambda: "unirank_cuda.so was not built")
    said = str(gpu_installed.missing())
    assert said.startswith("unirank_cuda.so was not built. For this source tree: run `UNIRANK_CUDA=ON ")
    assert said.endswith("-m pip install --no-build-isolation --no-deps -e .` here.")


def test_gpu_tests_stop_for_our_own_warnings_alone() -> None:
    for place in ("Makefile", "tools/gpu_check.sh"):
        assert "-W default -W error::unirank.errors.UnirankWarning" in (ROOT / place).read_text()


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ('version = "0.1.0"\n', "cu130", 'version = "0.1.0+cu130"\n'),
        ('version = "0.1.0"\n', "+", "A local version is letters and digits"),
        ('version = "0.1.0+cu126"\n', "cu130", "found 0"),
    ],
)
def test_a_cuda_wheel_has_a_version_of_its_own(text: str, name: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "pyproject.toml"
    file.write_text(text)
    if said.startswith("version"):
        local_version.main([str(file), name])
        assert file.read_text() == said
    else:
        with pytest.raises(SystemExit, match=said):
            local_version.main([str(file), name])
    plain = (ROOT / "pyproject.toml").read_text()
    assert local_version.with_local(plain, "cu130").count("+cu130") == 1


def test_every_step_is_one_that_the_probe_knows() -> None:
    script = (ROOT / "tools" / "gpu_check.sh").read_text()
    calls = re.findall(r"^(?:OMP_NUM_THREADS=4 )?probe \S+ \d+ (\w+)((?: --[a-z]+ \w+)*)", script, re.MULTILINE)
    assert len(calls) > 8
    for step, options in calls:
        assert parser().parse_args([step, *options.split()]).step == step
    assert set(gpu_results.TITLES) == set(STEPS)


@pytest.mark.parametrize("step", ["layers", "smoke", "nan", "kernels"])
def test_the_probe_answers(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESULTS", str(tmp_path / "results.jsonl"))
    assert main([step, "--device", "cpu", "--tiny", "--work", str(tmp_path)]) == 0
    run = gpu_results.read(tmp_path)
    assert gpu_results.failures(run) == []
    assert len(run["answers"]) >= 4
    if step == "layers":
        counted = {row["name"].partition(",")[0]: row["calls"] for row in run["answers"] if "calls" in row}
        rare = "Householder QR"
        assert {label.partition(",")[0] for *_, label in job.PLACES} - set(counted) <= {rare}
    assert "## CPU, tiny" in gpu_results.page({run["device"]: run})


def test_what_is_timed_is_put_back() -> None:
    before = [getattr(job.owner(place), name) for place, name, _ in job.PLACES]
    probe = job.Probe(
        step="layers",
        device="cpu",
        tiny=True,
        shape="tiny",
        layers=1,
        windows=1,
        work=Path(),
        trace=Path(),
        results=Path(),
    )
    with job.timed(probe, waiting=True):
        assert all(getattr(job.owner(p), n) is not old for (p, n, _), old in zip(job.PLACES, before, strict=True))
    assert [getattr(job.owner(place), name) for place, name, _ in job.PLACES] == before


ANSWERS = [
    {"step": "env", "name": "gpu", "gpu": "NVIDIA H100", "memory": 85_000_000_000},
    {"step": "env", "name": "matmul float64", "tflops": 61.23456, "ms": 1.5},
    {"step": "whole", "name": "progress, 7b", "done": 1, "total": 32},
    {"step": "smoke", "name": "cosine", "ok": True, "difference": 1e-12},
    {"step": "smoke", "name": "gram", "ok": False, "error": "RuntimeError: a | b"},
    {"step": "whole", "name": "progress, 7b", "done": 2, "total": 32},
]


def test_the_page_is_made_of_the_answers(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, ANSWERS)) + '\n{"step": "cut o')
    steps = [
        {"step": "smoke", "code": 0, "seconds": 9, "limit": 60},
        {"step": "ncu", "code": 124, "seconds": 60, "limit": 60},
    ]
    (tmp_path / "steps.jsonl").write_text("\n".join(map(json.dumps, steps)))
    (tmp_path / "junit.xml").write_text(
        '<testsuites><testsuite tests="9" failures="1" errors="0" skipped="2"/></testsuites>'
    )
    run = gpu_results.read(tmp_path)
    page = gpu_results.page({run["device"]: run})
    for line in (
        "## NVIDIA H100",
        "Failed or cut off: ncu ended with 124; smoke: gram.",
        "Tests: 6 passed, 1 failed, 2 skipped.",
        "### Every op, against the CPU or float64",
        "| matmul float64 | 61.23 | 1.5 |",
        "| gram | False | RuntimeError: a / b |",
        "| progress, 7b | 2 | 32 |",
    ):
        assert f"{line}\n" in page
    assert "| progress, 7b | 1 | 32 |" not in page
    assert "\nFAILED [smoke] gram: error RuntimeError: a / b\n" in gpu_results.summary(run)
    assert gpu_results.summary(run).endswith("\n2 failed: ncu ended with 124; smoke: gram")
    assert gpu_results.main(["--failed", str(tmp_path)]) == 1


def test_the_page_in_the_docs_is_what_is_kept() -> None:
    kept = json.loads(gpu_results.KEPT.read_text()) if gpu_results.KEPT.exists() else {}
    assert gpu_results.PAGE.read_text() == gpu_results.page(kept)
    assert "**Nothing has run on a GPU yet.**" in gpu_results.page({})
