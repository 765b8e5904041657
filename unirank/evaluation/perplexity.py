"""What a model is worth: perplexity, parameters, bytes, a sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unirank import looks
from unirank.disk.strictjson import Damaged, build
from unirank.display import shows_progress, told
from unirank.errors import InputError, NonFiniteError, warn
from unirank.models.low_rank import count_parameters
from unirank.models.wrappers import runnable
from unirank.progress import OnProgress, Progress, silent
from unirank.text.windows import (
    BUILTIN_HELD_OUT,
    bos_of,
    check_tokens,
    check_window,
    evaluation_windows,
    fitting_window,
    longest_window,
    read_text,
    tokenize,
)

WINDOW = 1024  # tokens, where the user says nothing and the model has so many positions (**choice**)


@dataclass(frozen=True)
class EvalReport:
    """Perplexity and everything needed to compare it (method 7)."""

    perplexity: float
    nll: float  # mean over predicted tokens, nats
    text: str
    text_sha256: str
    window: int
    windows: int
    predicted_tokens: int
    bos: bool
    dtype: str
    parameters: int

    def __repr__(self) -> str:
        behind = ", each behind a BOS" if self.bos else ""
        return looks.lines(
            f"EvalReport: perplexity {self.perplexity:.2f} ({self.nll:.4f} nats a token)",
            f"on {self.text} (sha256 {self.text_sha256[:12]})",
            f"{self.windows} windows of {self.window} tokens{behind}; {self.predicted_tokens:,} tokens predicted",
            f"{self.parameters:,} parameters, {self.dtype}",
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> EvalReport:
        """Read `as_dict`'s result. Raises Damaged for anything else."""
        report = build(cls, record)
        for field in fields(cls):
            value = getattr(report, field.name)
            if type(value).__name__ != field.type:
                raise Damaged(f"{field.name} is {str(value)[:80]!r}")
        return report


@shows_progress
def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text: str = BUILTIN_HELD_OUT,
    window: int | None = None,
    limit: int | None = None,
    split: str | None = None,
    stage: str = "perplexity",
    progress: Progress = None,
) -> EvalReport:
    """Perplexity of `model` on `text`, by the conventions of method 7.

    Args:
        text: path or builtin name, see `read_text`.
        window: tokens a window, non-overlapping; a BOS counts as one of them. None is 1024, or as many as the model has
            positions where these are fewer.
        limit: use the first `limit` windows; None uses all. Warns where the text has fewer.
        split: of a dataset; None is its own split for perplexity.
        stage: name in the progress report.
        progress: see `unirank.compress`.

    Raises:
        InputError: the text is unusable or shorter than a window; the window is longer than the model's positions.
        NonFiniteError: the loss of a window is NaN or infinity; names the window.
    """
    model = runnable(model)
    prepared = prepare(model, tokenizer, text=text, window=window, limit=limit, split=split)
    return prepared.measure(model, stage=stage, progress=told(progress))


@dataclass(frozen=True)
class EvalWindows:
    """A text, cut into the windows of a perplexity: made once, for several models of one tokenizer."""

    name: str
    sha256: str
    windows: torch.Tensor  # int64 [W, T]
    bos: bool

    def measure(
        self, model: PreTrainedModel, *, stage: str = "perplexity", progress: OnProgress = silent
    ) -> EvalReport:
        """Perplexity of `model`. Raises NonFiniteError like `evaluate`."""
        predicted = self.windows.numel() - len(self.windows)
        nll = total_nll(model, self.windows, stage=stage, progress=progress) / predicted
        return EvalReport(
            perplexity=_perplexity(nll),
            nll=nll,
            text=self.name,
            text_sha256=self.sha256,
            window=self.windows.shape[1],
            windows=len(self.windows),
            predicted_tokens=predicted,
            bos=self.bos,
            dtype=str(model.dtype).removeprefix("torch."),
            parameters=count_parameters(model),
        )


def prepare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text: str = BUILTIN_HELD_OUT,
    window: int | None = None,
    limit: int | None = None,
    split: str | None = None,
) -> EvalWindows:
    """The windows on which `evaluate` measures. Arguments, and InputError, as there."""
    window = fitting_window(model, WINDOW) if window is None else window
    check_window(model, window)
    content = read_text(text, tokenizer, split=split, held_out=True)
    tokens = tokenize(tokenizer, content, model)
    bos = bos_of(tokenizer, model)
    windows = evaluation_windows(tokens, window=window, limit=limit, bos=bos, name=content.name)
    if limit is not None and len(windows) < limit:
        warn(f"The text {content.name} gives {len(windows)} windows of {window} tokens, and limit= asks for {limit}.")
    return EvalWindows(content.name, content.sha256, windows, bos is not None)


@torch.no_grad()
def total_nll(
    model: PreTrainedModel, windows: torch.Tensor, *, stage: str = "perplexity", progress: OnProgress = silent
) -> float:
    """Summed negative log likelihood (nats) of all predicted tokens of `windows`, int64 `[W, T]`; loss in float32.

    Raises NonFiniteError for a window whose loss is NaN or infinity; it is never skipped.
    """
    model.eval()
    total = 0.0
    progress(stage, 0, len(windows))
    for index, ids in enumerate(windows):
        ids = ids.to(model.device)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        loss = float(F.cross_entropy(logits.float(), ids[1:], reduction="sum"))
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"The loss of window {index} is {loss}; the model is damaged or overflows in {model.dtype}."
            )
        total += loss
        progress(stage, index + 1, len(windows))
    return total


def _perplexity(nll: float) -> float:
    """`exp(nll)`. Raises NonFiniteError where that is beyond float64, which no working model reaches."""
    try:
        return math.exp(nll)
    except OverflowError:
        raise NonFiniteError(
            f"The mean loss is {nll:.0f} nats, so the perplexity is infinite; the model is damaged."
        ) from None


@torch.no_grad()
def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, *, tokens: int = 40) -> str:
    """Greedy continuation of `prompt` by at most `tokens` tokens (a sample to look at, not a measurement).

    It ends earlier where the model's table of positions ends (see `longest_window`). Raises InputError for a prompt
    that is longer than that table, or has a token without an embedding.
    """
    model = runnable(model)
    inputs = tokenizer(prompt, return_tensors="pt")
    check_tokens(inputs["input_ids"], tokenizer, model, "The prompt")
    inputs = inputs.to(model.device)
    length, longest = inputs["input_ids"].shape[1], longest_window(model)
    if longest is not None:
        if length > longest:
            raise InputError(
                f"The prompt has {length} tokens; {type(model).__name__} has positions for at most {longest}."
            )
        tokens = min(tokens, longest - length + 1)  # the last token is not read
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    run = cast("Callable[..., torch.Tensor]", model.generate)
    output = run(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=pad)
    return str(tokenizer.decode(output[0, length:], skip_special_tokens=True))
