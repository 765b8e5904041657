"""An error of memory is never told as something else: whoever explains errors of others lets it pass."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MambaConfig, MambaForCausalLM, MambaModel

import unirank
from tests.support.tiny import word_tokenizer
from unirank import distributed, ops
from unirank.cli.main import main
from unirank.disk import files, tensorfile
from unirank.errors import UnirankError, is_out_of_memory
from unirank.finetuning.sampling import check_can_sample
from unirank.layerwise.recording import foreign
from unirank.models import configurations, loading, sources
from unirank.models.irregular import irregular_linears
from unirank.models.structure import find_linears

# As they arrive: of torch's allocators, the CUDA runtime, its libraries, the native ops and the system.
ERRORS = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"),
    "runtime": RuntimeError("CUDA error: out of memory"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cusolver": RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    "system": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "python": MemoryError(),
}
OTHERS = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("The algorithm did not converge"),
    OSError(errno.ENOSPC, "No space left on device"),
    unirank.InputError("windows = 0 is not legal"),
]


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_errors_of_memory_are_known(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: str(error)[:20])
def test_other_errors_are_none_of_memory(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise error.with_traceback(None)

    return fail


class Config:
    """A configuration that fails when it is asked for its text decoder."""

    def __init__(self, error: BaseException) -> None:
        self.get_text_config = failing(error)


def _process_group(error: BaseException, monkeypatch: pytest.MonkeyPatch, _folder: Path) -> None:
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    names = ("init_process_group", "destroy_process_group")
    for name in names:
        monkeypatch.setattr(distributed.dist, name, lambda *_, **__: None)
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 2)
    with distributed.process_group():
        failing(error)()


def _within(context: Callable[..., Any]) -> Callable[..., None]:
    def place(error: BaseException, _monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        with context(folder):
            failing(error)()

    return place


def _patched(module: Any, name: str, call: Callable[[Path], object]) -> Callable[..., None]:
    """`module.name` (or its method, with a dot) fails, and `call` is what needs it."""

    def place(error: BaseException, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        owner, _, attribute = name.rpartition(".")
        monkeypatch.setattr(getattr(module, owner) if owner else module, attribute, failing(error))
        call(folder)

    return place


def _of_config(call: Callable[[Any], object]) -> Callable[..., None]:
    def place(error: BaseException, _monkeypatch: pytest.MonkeyPatch, _folder: Path) -> None:
        call(Config(error))

    return place


def _mamba() -> tuple[Any, str, Any]:
    model = MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, state_size=2))
    return model, *find_linears(model)


COMMON = {"revision": None, "trust_remote_code": False}
CONFIG = LlamaConfig(architectures=["LlamaForCausalLM"])
SOURCE: Any = SimpleNamespace(path=".", config=CONFIG, dtype="auto", common={}, name="m", device=torch.device("cpu"))
PLACES: dict[str, Callable[..., None]] = {
    "a model's own code": _within(lambda _: foreign("never said")),
    "writing a file": _within(lambda folder: files.explained(folder / "file")),
    "reading a file": _within(lambda _: tensorfile._reading()),
    "several processes": _process_group,
    "reading a configuration": _patched(
        sources, "AutoConfig.from_pretrained", lambda folder: sources.read_config("m", str(folder), COMMON)
    ),
    "reading a tokenizer": _patched(
        sources, "AutoTokenizer.from_pretrained", lambda folder: sources._read_tokenizer("m", str(folder), COMMON)
    ),
    "a skeleton": _patched(
        configurations,
        "AutoModelForCausalLM.from_config",
        lambda _: sources.skeleton_of("m", CONFIG, trust_remote_code=False),
    ),
    "a device": _patched(sources.torch, "empty", lambda _: sources._usable_device("cpu")),
    "reading weights": _patched(
        configurations, "AutoModelForCausalLM.from_pretrained", lambda _: loading._read(SOURCE)
    ),
    "the text decoder": _of_config(configurations.text_part),
    "what a layer calls": _patched(MambaModel, "forward", lambda _: irregular_linears(*_mamba())),
    "a first text": _patched(MambaForCausalLM, "generate", lambda _: check_can_sample(_mamba()[0], word_tokenizer())),
    "the width": _of_config(lambda config: loading._check_width(SimpleNamespace(config=config))),  # pyright: ignore
}


@pytest.mark.parametrize("kind", ["gpu", "runtime"])
@pytest.mark.parametrize("place", PLACES)
def test_it_passes_whoever_explains_errors(
    place: str, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError) as caught:
        PLACES[place](ERRORS[kind], monkeypatch, tmp_path)
    assert caught.value is ERRORS[kind]


def test_a_read_that_the_system_has_no_memory_for_is_no_damage() -> None:
    with pytest.raises(OSError, match="Cannot allocate") as caught, tensorfile._reading():
        failing(ERRORS["system"])()
    assert caught.value is ERRORS["system"]


@pytest.mark.parametrize("kind", ERRORS)
def test_a_decomposition_without_memory_has_not_failed(kind, make_model, calibration, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(ops, "batched_eigh", failing(ERRORS[kind]))
    with pytest.raises(type(ERRORS[kind])) as caught:
        unirank.analyze(make_model(), tmp_path / "store", calibration=calibration)
    assert caught.value is ERRORS[kind]


def test_a_decomposition_that_fails_still_names_its_layer(make_model, calibration, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(ops, "batched_eigh", failing(OTHERS[1]))
    with pytest.raises(UnirankError, match=r"layers\.0 failed: .*converge"):
        unirank.analyze(make_model(), tmp_path / "store", calibration=calibration)


@pytest.mark.parametrize("kind", ["gpu", "cusolver"])
def test_the_command_line_says_what_to_lower(kind, model_dir, text_file, tmp_path, monkeypatch, capsys) -> None:
    arguments = ["analyze", str(model_dir), "-o", str(tmp_path / "store"), "--calib", str(text_file), "--windows", "4"]
    monkeypatch.setattr(sys, "argv", ["unirank", *arguments, "--window", "16", "--device", "cpu"])
    monkeypatch.setattr(ops, "batched_eigh", failing(ERRORS[kind]))
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert said.count("\n") == 1
    start = re.escape(str(ERRORS[kind]))
    assert re.match(rf"error: Out of memory: {start} .*--batch .*--window .*--stream .*--windows .*--device", said)
