"""A model that was lent is what it was, and its head alone is the head of the whole model."""

from __future__ import annotations

import pytest
import torch

from tests.support.tiny import WORDS
from unirank.layerwise.head import head_logits
from unirank.layerwise.lending import lent
from unirank.layerwise.recording import layers_of, record
from unirank.types import LoadedModel

IDS = torch.randint(2, len(WORDS), (2, 12), generator=torch.Generator().manual_seed(4))


def flags(loaded: LoadedModel) -> list[bool]:
    model = loaded.model
    return [p.requires_grad for p in model.parameters()] + [m.training for m in model.modules()]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, None])
def test_flags_come_back_as_they_were(error: type[BaseException] | None, make_model) -> None:
    loaded = make_model()
    loaded.model.train()
    layers_of(loaded)[1].eval()
    layers_of(loaded)[0].mlp.up_proj.weight.requires_grad_(False)
    before = flags(loaded)
    assert len(set(before)) == 2
    try:
        with lent(loaded.model):
            assert not any(flags(loaded))
            if error is not None:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert flags(loaded) == before


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt", "gpt-neox"])
def test_the_head_alone_gives_the_logits_of_the_whole_model(name: str, make_model) -> None:
    loaded = make_model(name)
    recording = record(loaded, IDS, batch=2)
    hidden = recording.start.batches[0]
    with torch.no_grad():
        wanted = loaded.model(input_ids=IDS, use_cache=False).logits
        for layer, call in zip(layers_of(loaded), recording.calls[0], strict=True):
            hidden = call.run(layer, hidden)
    leaf = hidden.requires_grad_()
    found = head_logits(loaded, recording, IDS, leaf)
    torch.testing.assert_close(found.detach(), wanted, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), leaf)
    assert gradient.abs().sum() > 0
    assert all("forward" not in layer.__dict__ for layer in layers_of(loaded))
