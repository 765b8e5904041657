"""The loss in chunks is autograd's, in value and gradient, and keeps no copy of the logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from unirank.errors import InputError
from unirank.finetuning import losses
from unirank.finetuning.losses import NOTHING, token_loss

N, V = 13, 37


def plain(
    logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor | None, distill: float, temperature: float
) -> torch.Tensor:
    """The formulas as they are written, over the rows that count."""
    counts = labels != NOTHING
    logits = logits[counts]
    entropy = F.cross_entropy(logits, labels[counts])
    if teacher is None:
        return entropy
    p = (teacher[counts] / temperature).softmax(-1)
    divergence = (p * (p.log() - (logits / temperature).log_softmax(-1))).sum(-1).mean()
    return (1 - distill) * entropy + distill * temperature**2 * divergence


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(N, V, generator=generator)
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[::4] = NOTHING
    return logits, labels, 5 * torch.randn(N, V, generator=generator)


@pytest.mark.parametrize("chunk", [1, 3 * V, N * V, 1 << 22])
@pytest.mark.parametrize(("distill", "temperature"), [(0.0, 1.0), (0.5, 1.0), (0.3, 2.5), (1.0, 0.7)])
def test_value_and_gradient(distill: float, temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_CHUNK", chunk)
    logits, labels, teacher = inputs()
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    given = teacher if distill else None
    loss = token_loss(ours, labels, given, distill=distill, temperature=temperature)
    expected = plain(theirs, labels, None if given is None else given.double(), distill, temperature)
    (3 * loss).backward()
    (3 * expected).backward()
    assert loss.dtype == torch.float32
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-7)
    assert not ours.grad[labels == NOTHING].any()


def test_half_precision_logits() -> None:
    """The arithmetic is float32 whatever the model gives; only the gradient is rounded, to the logits' dtype."""
    logits, labels, _ = inputs(1)
    half = logits.bfloat16().requires_grad_()
    full = half.detach().double().requires_grad_()
    loss = token_loss(half, labels)
    loss.backward()
    plain(full, labels, None, 0.0, 1.0).backward()
    assert half.grad is not None
    assert full.grad is not None
    assert half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(half.grad, full.grad.bfloat16(), rtol=2**-7, atol=1e-6)
    torch.testing.assert_close(loss.double(), plain(full, labels, None, 0.0, 1.0), rtol=1e-6, atol=0)


def test_no_row_counts_and_damage_shows() -> None:
    logits, labels, _ = inputs()
    assert token_loss(logits, torch.full_like(labels, NOTHING)).isnan()
    logits[1, 2] = float("nan")
    assert token_loss(logits, labels).isnan()


def test_refusals() -> None:
    logits, labels, teacher = inputs()
    with pytest.raises(InputError, match=r"labels \[12\]; legal are"):
        token_loss(logits, labels[1:])
    with pytest.raises(InputError, match=r"Teacher logits are none and distill is 0\.5"):
        token_loss(logits, labels, distill=0.5)
    with pytest.raises(InputError, match=r"and distill is 0\.0"):
        token_loss(logits, labels, teacher)
    with pytest.raises(InputError, match=r"of shape \[13, 36\]"):
        token_loss(logits, labels, teacher[:, 1:], distill=0.5)
