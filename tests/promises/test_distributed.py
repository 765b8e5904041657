"""Several processes under torchrun: the same analysis to rounding, the same bytes every time, and a lost one."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import unirank
from tests.support.stores import contents
from tests.support.tiny import build
from unirank import distributed
from unirank.analysis.store import AnalysisStore, open_store

pytestmark = pytest.mark.slow

WORKER = """
import os, signal, sys
from importlib import import_module
module = import_module("unirank.analysis.fill_store")
victim, layer = int(os.environ["VICTIM"]), int(os.environ["AT"])
def deadly(plain):
    def calibrate(loaded, index, *arguments, **options):
        if int(os.environ["RANK"]) == victim and index == layer:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(loaded, index, *arguments, **options)
    return calibrate
for name in ("calibrate_layer", "calibrate_parts"):
    setattr(module, name, deadly(getattr(module, name)))
from unirank.cli.main import main
main()
"""


def torchrun(processes: int, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    return subprocess.run(
        [str(part) for part in (*command, *arguments)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer, text_file: Path) -> Path:
    """A tiny checkpoint, and stores made from it by 1, 2 and 4 processes."""
    folder = tmp_path_factory.mktemp("distributed")
    build("llama").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for processes in (1, 2, 4):
        assert analyze(folder, processes, f"store-{processes}", text_file).returncode == 0
    return folder


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory, tokenizer, text_file: Path) -> Path:
    """A tiny mixture of experts, and stores made from it by 1 and 2 processes."""
    folder = tmp_path_factory.mktemp("experts")
    build("mixtral").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for processes in (1, 2):
        done = analyze(folder, processes, f"store-{processes}", text_file)
        assert done.returncode == 0, done.stderr
    return folder


def arguments(folder: Path, out: str, text_file: Path) -> list[object]:
    common = ["--calib", text_file, "--windows", 10, "--window", 24, "--batch", 2, "--device", "cpu", "--json"]
    return ["analyze", folder / "model", "-o", folder / out, "--scheme", "afm", *common]


def analyze(folder: Path, processes: int, out: str, text: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return torchrun(processes, "-m", "unirank.cli", *arguments(folder, out, text), *more)


@pytest.mark.parametrize("processes", [2, 4])
def test_plans_are_equal_and_numbers_differ_by_rounding(processes: int, place: Path) -> None:
    equal_to_rounding(place, processes)


def test_experts_are_shared_out_too(experts: Path, text_file: Path) -> None:
    equal_to_rounding(experts, 2)
    shares, others = (open_store(experts / f"store-{processes}").shares() for processes in (1, 2))
    assert len(shares) == 3 * 4 * 2  # layers, experts, matrices
    assert others == pytest.approx(shares)
    done = analyze(experts, 2, "streamed", text_file, "--stream")
    assert done.returncode == 0, done.stderr
    assert contents(experts / "streamed") == contents(experts / "store-2")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_analysis_of_experts_resumes(processes: int, experts: Path, text_file: Path, tmp_path: Path) -> None:
    worker, out = tmp_path / "worker.py", f"killed-{processes}"
    worker.write_text(WORKER)
    done = torchrun(processes, worker, *arguments(experts, out, text_file), VICTIM="0", AT="2")
    assert done.returncode != 0
    assert 1 <= open_store(experts / out).layers_done() < 3
    assert analyze(experts, processes, out, text_file).returncode == 0
    assert contents(experts / out) == contents(experts / f"store-{processes}")


def equal_to_rounding(place: Path, processes: int) -> None:
    """The store of several processes is that of one, to rounding."""
    one, many = open_store(place / "store-1"), open_store(place / f"store-{processes}")
    assert many.complete
    assert many.identity == dataclasses.replace(one.identity, processes=processes)
    for remove in (0.2, 0.4, 0.6):
        assert unirank.plan(many, remove).ranks == unirank.plan(one, remove).ranks
    ours, theirs = many.energies(), one.energies()
    for name, energy in theirs.items():
        torch.testing.assert_close(ours[name], energy, rtol=1e-6, atol=1e-9 * float(energy[0]))
    for layer, stats in enumerate(one.cosines()):
        for key, stat in stats.items():
            other = many.cosines()[layer][key]
            assert other.tokens == stat.tokens == 240
            assert other.mean == pytest.approx(stat.mean, rel=1e-6)


def test_the_same_number_of_processes_gives_the_same_bytes(place: Path, text_file: Path) -> None:
    done = analyze(place, 2, "again", text_file)
    assert json.loads(done.stdout)["layers"] == 3  # one process prints
    assert contents(place / "again") == contents(place / "store-2")


def test_streamed_layers_give_the_same_bytes_too(place: Path, text_file: Path) -> None:
    """How a model that is larger than each process's memory is shared."""
    done = analyze(place, 2, "streamed", text_file, "--stream")
    assert done.returncode == 0, done.stderr
    assert contents(place / "streamed") == contents(place / "store-2")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_ends_the_job_with_its_rank_and_the_job_resumes(
    victim: int, place: Path, text_file: Path, tmp_path: Path
) -> None:
    worker, out = tmp_path / "worker.py", f"killed-{victim}"
    worker.write_text(WORKER)
    done = torchrun(2, worker, *arguments(place, out, text_file), VICTIM=str(victim), AT="2")
    assert done.returncode != 0
    assert f"rank      : {victim} (local_rank: {victim})" in done.stderr
    assert "Signal 9 (SIGKILL)" in done.stderr
    store = open_store(place / out)
    assert 1 <= store.layers_done() < 3
    assert analyze(place, 2, out, text_file).returncode == 0
    assert contents(place / out) == contents(place / "store-2")


def test_another_number_of_processes_is_another_analysis(place: Path, text_file: Path) -> None:
    done = analyze(place, 4, "store-2", text_file)
    assert done.returncode != 0
    assert "process 0: The store" in done.stderr.replace("\n", " ")
    assert "processes (store: 2, now: 4)" in done.stderr.replace("\n", " ")


def test_compress_writes_one_checkpoint(place: Path, text_file: Path) -> None:
    common = ["--calib", text_file, "--windows", 10, "--window", 24, "--batch", 2, "--device", "cpu", "--scheme", "afm"]
    command = ["compress", place / "model", "-r", 0.3, "-o", place / "out", "--store", place / "store-2", *common]
    done = torchrun(2, "-m", "unirank.cli", *command)
    assert done.returncode == 0, done.stderr
    assert unirank.open_compressed(place / "out", device="cpu").plan == unirank.plan(open_store(place / "store-2"), 0.3)


def test_too_few_batches_and_other_commands_are_refused(place: Path, text_file: Path) -> None:
    few = [*arguments(place, "few", text_file), "--windows", 2]
    done = torchrun(2, "-m", "unirank.cli", *few)
    assert "2 processes need a batch of windows each, and there are 1 of 2" in done.stderr.replace("\n", " ")
    assert not (place / "few").exists()
    done = torchrun(2, "-m", "unirank.cli", "plan", place / "store-1", "--remove", 0.3)
    assert "torchrun is for `unirank analyze` and `unirank compress`" in done.stderr.replace("\n", " ")


@pytest.mark.parametrize("count", [0, 1, 5, 8])
@pytest.mark.parametrize("processes", [1, 3])
def test_shares_cover_everything_once(count: int, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "size", lambda: processes)
    found: list[int] = []
    for process in range(processes):
        monkeypatch.setattr(distributed, "rank", lambda process=process: process)
        found += distributed.share(count)
    assert found == list(range(count))
    owners = distributed.owners([float(i % 3) for i in range(count)])
    assert all(0 <= owner < processes for owner in owners)
    assert len(owners) == count


def test_dear_things_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "size", lambda: 2)
    assert distributed.owners([1.0, 8.0, 3.0, 4.0, 2.0]) == [0, 0, 1, 1, 1]


def test_a_single_process_is_left_alone(place: Path) -> None:
    assert open_store(place / "store-1").identity.processes is None
    assert isinstance(open_store(place / "store-1"), AnalysisStore)
    assert not distributed.is_distributed()
    assert (distributed.rank(), distributed.size(), distributed.from_zero(7)) == (0, 1, 7)
