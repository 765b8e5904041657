"""No raw exception for any causal language model that the installed transformers knows: each works, or is refused.

`pytest tests/promises/test_every_decoder.py -v -rA` says which. test_architectures.py says of those that we claim that
they are right; here nobody is claimed, and a type may be refused in one transformers and work in the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

import unirank
from tests.support.every_decoder import TYPES, build
from unirank.compression.checkpoint import CompressedModel
from unirank.errors import InputError
from unirank.models.low_rank import LowRankLinear
from unirank.models.low_rank_experts import LowRankExperts
from unirank.types import LoadedModel

# Few tokens, for speed: what is asked here is whether a kind of model is understood, and some are wider than that.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::unirank.UnirankWarning")]

# What transformers itself cannot build from a configuration of the type; the third needs a package that tests lack.
NOT_TINY = {
    "musicgen": "its class wants the configuration of its decoder, and the type has that of the whole",
    "musicgen_melody": "its class wants the configuration of its decoder, and the type has that of the whole",
    "gemma3n": "its vision tower needs the package timm",
}
BUILT = [kind for kind in TYPES if kind not in NOT_TINY]

# One or two of each way to be understood or refused, for what is read from a directory.
FROM_DISK = ("llama", "openai-gpt", "cpmant", "mamba", "mixtral", "dbrx", "doge", "reformer", "rwkv", "git", "blt")


@pytest.fixture(scope="module")
def windows(text_file: Path) -> unirank.Calibration:
    """4 windows of 16 tokens, two at a time."""
    return unirank.Calibration(text=str(text_file), windows=4, window=16, seed=0, batch=2)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Some models say that a fast kernel is missing, once a layer."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


def compressed_or_refused(
    load: Callable[[], LoadedModel], windows: unirank.Calibration, store: Path
) -> CompressedModel | None:
    """What becomes of a model; any exception but a sentence of ours is the test's failure."""
    try:
        return unirank.compress(load(), 0.3, calibration=windows, store=store)
    except InputError as error:
        reason = str(error)
    print(reason)  # -rA shows it
    assert reason.endswith(".")
    assert "\n" not in reason
    return None


@pytest.mark.parametrize("kind", BUILT)
def test_it_works_or_is_refused(
    kind: str, tokenizer: PreTrainedTokenizerFast, windows: unirank.Calibration, tmp_path: Path
) -> None:
    model = build(kind)
    describe = partial(unirank.describe, model, tokenizer, source=kind)
    compressed = compressed_or_refused(describe, windows, tmp_path / "store")
    if compressed is None:
        return
    out = compressed.save(tmp_path / "out")
    # A few classes have a configuration that AutoModelForCausalLM does not know; the dense model fares no better.
    known = type(model.config) in AutoModelForCausalLM._model_mapping
    again = (AutoModelForCausalLM if known else type(model)).from_pretrained(out)
    assert any(isinstance(module, LowRankLinear | LowRankExperts) for module in again.modules())
    ids = torch.arange(2, 18)[None]
    with torch.no_grad():
        logits = again(input_ids=ids).logits
        assert torch.equal(logits, compressed.model(input_ids=ids).logits)
    assert logits.isfinite().all()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", FROM_DISK)
def test_from_a_directory_too(
    kind: str, stream: bool, tokenizer: PreTrainedTokenizerFast, windows: unirank.Calibration, tmp_path: Path
) -> None:
    build(kind).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    load = partial(unirank.load, tmp_path / "dense", device="cpu", stream=stream)
    compressed = compressed_or_refused(load, windows, tmp_path / "store")
    assert (compressed is not None) == (kind in ("llama", "openai-gpt", "cpmant", "doge", "mixtral"))


@pytest.mark.parametrize("kind", NOT_TINY)
def test_what_transformers_cannot_build_is_refused(
    kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    if kind not in TYPES:
        pytest.skip(f"this transformers has no {kind}")
    with pytest.raises((AttributeError, ImportError)):
        build(kind)
    CONFIG_MAPPING[kind]().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for stream in (False, True):
        with pytest.raises(InputError, match=r"^[^\n]*\.$"):
            unirank.load(tmp_path, device="cpu", stream=stream)


def test_all_types_but_these_are_tried() -> None:
    assert len(BUILT) + sum(kind in TYPES for kind in NOT_TINY) == len(TYPES)
    assert len(NOT_TINY) == 3
    assert len(BUILT) > 100
