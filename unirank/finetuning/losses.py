"""Cross-entropy and distillation over logits as wide as the vocabulary, without a copy of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from unirank.errors import InputError, NonFiniteError
from unirank.evaluation.perplexity import total_nll

NOTHING = -100  # a label that is not counted
# Entries that are worked on at once, in float32: 16 MiB, which a processor's last cache holds. (choice)
_CHUNK = 1 << 22


def token_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    teacher: torch.Tensor | None = None,
    *,
    distill: float = 0.0,
    temperature: float = 1.0,
) -> torch.Tensor:
    """`(1 - d) CE(logits, labels) + d T² KL(teacher || logits)`, both softmaxes of the divergence at temperature T.

    Written as one function because autograd would keep the logits in float32, their log softmax, and both gradients:
    four times what the model gave. Here a few rows at a time go through float32; the gradient alone is as large as
    the logits, in their dtype.

    Args:
        logits: floating `[N, V]`, of any dtype.
        labels: int64 `[N]`, the token that each row predicts; -100 for a row that is not counted.
        teacher: logits `[N, V]` of the teacher; no gradient flows to it. Needed if and only if `distill` is not 0.
        distill: d, the share of the divergence.
        temperature: T, above 0.

    Returns the mean over the counted rows, nats a token, float32 scalar; NaN when no row is counted.

    Raises InputError for shapes that do not fit, and when only one of `teacher` and `distill` is given.

    Source: distillation of Hinton et al. (arXiv 1503.02531), section 2; the chunks are a choice.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise InputError(
            f"Logits have shape {list(logits.shape)} and labels {list(labels.shape)}; legal are [N, V] and [N]."
        )
    if (teacher is None) != (distill == 0) or (teacher is not None and teacher.shape != logits.shape):
        got = "none" if teacher is None else f"of shape {list(teacher.shape)}"
        raise InputError(
            f"Teacher logits are {got} and distill is {distill}; with distill = 0 there must be none, "
            f"with distill above 0 their shape must be the logits', {list(logits.shape)}."
        )
    return _TokenLoss.apply(logits, labels, teacher, distill, temperature)  # pyright: ignore[reportReturnType]


def mean_nll(model: PreTrainedModel, windows: torch.Tensor) -> float:
    """Mean cross-entropy over the predicted tokens of `windows`, int64 `[W, T]`; nats. Raises like `total_nll`."""
    return total_nll(model, windows) / (windows.numel() - len(windows))


@torch.no_grad()
def mean_divergence(model: PreTrainedModel, teacher: PreTrainedModel, windows: torch.Tensor) -> float:
    """Mean KL divergence of `model` from `teacher` over the predicted tokens of `windows`, int64 `[W, T]`; nats.

    Raises NonFiniteError for a window where it is NaN or infinity.
    """
    total = 0.0
    for index, ids in enumerate(windows.split(1)):
        ids = ids.to(model.device)
        logits, wanted = (one(input_ids=ids, use_cache=False).logits[0, :-1] for one in (model, teacher))
        found = float(token_loss(logits, ids[0, 1:], wanted, distill=1.0))
        if not math.isfinite(found):
            raise NonFiniteError(f"The divergence from the dense model on held-out window {index} is {found}.")
        total += found
    return total / len(windows)


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        teacher: torch.Tensor | None,
        distill: float,
        temperature: float,
    ) -> torch.Tensor:
        rows = max(1, _CHUNK // logits.shape[1])
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        for start in range(0, len(labels), rows):
            part = slice(start, start + rows)
            scores, target = logits[part].float(), labels[part]
            loss = F.cross_entropy(scores, target, reduction="none", ignore_index=NOTHING)
            if teacher is not None:
                log_q = (scores / temperature).log_softmax(-1)
                log_p = (teacher[part].float() / temperature).log_softmax(-1)
                divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
                divergence = divergence.masked_fill(target == NOTHING, 0.0)
                loss = (1 - distill) * loss + distill * temperature**2 * divergence
            total += loss.double().sum()
        ctx.save_for_backward(logits, labels, teacher)
        ctx.distill, ctx.temperature, ctx.rows = distill, temperature, rows
        return (total / (labels != NOTHING).sum()).float()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, labels, teacher = ctx.saved_tensors
        distill, temperature = ctx.distill, ctx.temperature
        scale = gradients[0].float() / (labels != NOTHING).sum()
        result = torch.empty_like(logits)
        for start in range(0, len(labels), ctx.rows):
            part = slice(start, start + ctx.rows)
            scores, target = logits[part].float(), labels[part]
            counts = (target != NOTHING).float()[:, None]
            slope = scores.softmax(-1)
            slope.scatter_add_(1, target.clamp(min=0)[:, None], -counts)
            if teacher is not None:  # the derivative of T² KL is T (softmax(z / T) - softmax(teacher / T))
                p = (teacher[part].float() / temperature).softmax(-1)
                q = (scores / temperature).softmax(-1)
                slope = (1 - distill) * slope + distill * temperature * (q - p)
            result[part] = slope * (counts * scale)
        return result, None, None, None, None
