"""What becomes of each kind of causal language model: the rows of docs/decoders.md, and how a refusal is classed."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import unirank
from unirank.errors import InputError
from unirank.models.low_rank import LowRankLinear
from unirank.models.low_rank_experts import LowRankExperts
from unirank.types import LoadedModel, sublayers_of

PAGE = Path(__file__).parents[2] / "docs" / "decoders.md"
WORKS = "works"
# Every refusal is for one of these reasons, known by what its sentence says.
REASONS = {
    "its layers hand each other more than hidden states": "takes more from the layer before it than hidden states",
    "its layers do not run once each, in order": "does not call every layer of",
    "its layers share weights": "are one weight",
    "its experts are held in a way of their own": "mixture of experts is not supported|stacks experts|sub-networks",
    "it has several stacks of layers, of several widths": "states no hidden_size",
    "it changes its weights when it runs": "when it runs; unirank needs weights that stay",
    "its layers take or return something else than hidden states": "must (take|return|hand)",
    "it runs only beside another model, whose states it reads": "cannot be run(:| over token ids)",
}


def reason_of(sentence: str) -> str:
    """The reason of a refusal. Raises AssertionError for a sentence that is of none, or no single sentence."""
    assert sentence.endswith(".")
    assert "\n" not in sentence
    found = [reason for reason, pattern in REASONS.items() if re.search(pattern, sentence)]
    assert found, sentence
    return found[0]


def outcome(load: Callable[[], LoadedModel], calibration: unirank.Calibration, place: Path) -> tuple[str, str]:
    """`("works", its sublayers)`, after all checks of a model that works; or `("refused", the reason)`.

    A model that works is compressed by 30 %, read again to the same bits, generates, and is densified to rounding.
    """
    try:
        loaded = load()
        generates = _generates(copy.deepcopy(loaded.model))  # RWKV changes its weights when it first runs
        compressed = unirank.compress(loaded, 0.3, calibration=calibration, store=place / "store")
    except InputError as error:
        return "refused", reason_of(str(error))
    out = compressed.save(place / "out")
    again = _read(type(compressed.model), out)
    assert any(isinstance(module, LowRankLinear | LowRankExperts) for module in again.modules())
    ids = torch.arange(2, 18)[None]
    with torch.no_grad():
        logits = again(input_ids=ids, use_cache=False).logits
        assert torch.equal(logits, compressed.model(input_ids=ids, use_cache=False).logits)
        assert logits.isfinite().all()
    assert _generates(again) or not generates
    dense = unirank.densify(again)
    assert not any(isinstance(module, LowRankLinear | LowRankExperts) for module in dense.modules())
    with torch.no_grad():
        torch.testing.assert_close(dense(input_ids=ids, use_cache=False).logits, logits, rtol=1e-3, atol=1e-3)
    return WORKS, ", ".join(sublayers_of(loaded.linears))


def _generates(model: PreTrainedModel) -> bool:
    """Whether it makes three tokens; of two layers it may not, as where a cache wants one of attention."""
    ids = torch.arange(2, 18)[None]
    try:
        made = model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    except Exception:  # it is the model's own code
        return False
    return made.shape == (1, 19)


def _read(kind: type[PreTrainedModel], out: Path) -> PreTrainedModel:
    # A few classes have a configuration that AutoModelForCausalLM does not know; the dense model fares no better.
    config = kind.config_class
    known = config in AutoModelForCausalLM._model_mapping
    return (AutoModelForCausalLM if known else kind).from_pretrained(out)


def recorded() -> dict[str, tuple[str, str]]:
    """Outcomes by kind, as the page has them."""
    rows = re.findall(r"^\| `([^`]+)` \| (works|refused) \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {kind: (what, more) for kind, what, more in rows}


def page(outcomes: dict[str, tuple[str, str]], not_tiny: dict[str, str]) -> str:
    """The text of the page."""
    works = sum(what == WORKS for what, _ in outcomes.values())
    refused: dict[str, list[str]] = {}
    for kind, (what, more) in outcomes.items():
        if what != WORKS:
            refused.setdefault(more, []).append(f"`{kind}`")
    version = ".".join(transformers.__version__.split(".")[:2])
    lines = [
        "# Which decoders",
        "",
        f"Every type of causal language model of transformers {version} that a tiny random model can be made of: "
        f"{len(outcomes)} types, {works} work and {len(outcomes) - works} are refused by a sentence. None is known by "
        "its name: [how layers are read](architecture.md).",
        "",
        "*Works* means: calibrated and compressed at 30 %, saved, read again to the same bits, generates where the "
        "dense model does, and is densified to rounding. The page is made by `python -m tools.decoders`, and "
        "`tests/promises/test_every_decoder.py` holds every row.",
        "",
        "| reason | refused |",
        "|---|---|",
        *(f"| {reason} | {', '.join(kinds)} |" for reason, kinds in sorted(refused.items())),
        "",
        "Not tried: " + "; ".join(f"`{kind}` ({why})" for kind, why in not_tiny.items()) + ".",
        "",
        "| type | | sublayers, or the reason |",
        "|---|---|---|",
        *(f"| `{kind}` | {what} | {more} |" for kind, (what, more) in sorted(outcomes.items())),
        "",
    ]
    return "\n".join(lines)


def loads(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kind: str) -> Callable[[], LoadedModel]:
    """`outcome`'s first argument for a model in memory."""
    return lambda: unirank.describe(model, tokenizer, source=kind)
