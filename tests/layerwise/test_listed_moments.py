"""Experts as modules in a list: each linear has the moment of the tokens that come, and the share of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import unirank
from tests.support.tiny import build
from unirank.analysis.calibration import texts_of, windows_of
from unirank.layerwise.expert_moments import PRIOR
from unirank.layerwise.recording import record
from unirank.layerwise.statistics import calibrate_layer
from unirank.models.low_rank import LowRankLinear
from unirank.types import LinearSpec, ListedSpec, LoadedModel

pytestmark = pytest.mark.filterwarnings("ignore::unirank.UnirankWarning")  # of few tokens


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 24, bias=False), nn.Linear(24, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.up(x)))


class Mixture(nn.Module):
    """As mixtures of experts were written before stacks; the last expert is never chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 4, bias=False)
        self.experts = nn.ModuleList(Network() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, 32)
        weights, chosen = self.gate(flat)[:, :3].softmax(-1).topk(1)
        made = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows, _ = (chosen == number).nonzero(as_tuple=True)
            if len(rows):
                made.index_add_(0, rows, expert(flat[rows]) * weights[rows])
        return made.view_as(x)


@pytest.fixture
def loaded(tokenizer) -> LoadedModel:
    model = build("llama")
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.mlp = Mixture()
    return unirank.describe(model, tokenizer)


@torch.no_grad()
def test_moments_and_shares_are_those_of_the_tokens_that_come(
    loaded: LoadedModel, calibration: unirank.Calibration
) -> None:
    listed = [spec for spec in loaded.linears if isinstance(spec, ListedSpec)]
    assert len(listed) == 3 * 4 * 2
    assert not any(spec.name.endswith("gate") for spec in loaded.linears)
    assert listed[0].siblings == "model.layers.0.mlp.experts.*.up"
    assert LinearSpec.from_dict(vars(listed[0])) == listed[0]
    recording = record(loaded, windows_of(loaded, texts_of(loaded, calibration), calibration), batch=calibration.batch)
    layer: Any = loaded.model.get_submodule("model.layers.0")
    seen: list[list[torch.Tensor]] = [[] for _ in range(4)]
    hooks = [
        layer.mlp.experts[i].up.register_forward_pre_hook(lambda _, args, i=i: seen[i].append(args[0]))
        for i in range(4)
    ]
    stats = calibrate_layer(loaded, 0, recording, recording.start)
    for hook in hooks:
        hook.remove()
    total = 6 * 24
    counts = [round(stats.shares[f"model.layers.0.mlp.experts.{i}.up"] * total) for i in range(4)]
    assert sum(counts) == total
    assert counts[3] == 0
    own = [torch.cat(tokens)[-counts[i] :].double() if counts[i] else None for i, tokens in enumerate(seen)]
    every = torch.cat([x for x in own if x is not None])
    c_all = every.T @ every / total
    for i, x in enumerate(own):
        moment = stats.moments[f"model.layers.0.mlp.experts.{i}.up"]
        expected = c_all
        if x is not None:
            c, lent = x.T @ x / len(x), PRIOR * 32 / (len(x) + PRIOR * 32)
            expected = (1 - lent) * c + lent * c.trace() / c_all.trace() * c_all
        torch.testing.assert_close(moment.c, expected, rtol=1e-4, atol=1e-7)


def test_listed_experts_are_compressed_and_what_needs_all_tokens_is_refused(
    loaded: LoadedModel, calibration: unirank.Calibration, tmp_path: Path
) -> None:
    with pytest.raises(
        unirank.InputError, match=r"is not available for mixtures .* \(model\.layers\.0\.mlp\.experts\)"
    ):
        unirank.compress(loaded, 0.3, calibration=calibration, scheme="kfac")
    store = unirank.analyze(loaded, tmp_path / "store", calibration=calibration)
    assert store.linears == loaded.linears
    assert unirank.open_store(tmp_path / "store").linears == loaded.linears
    compressed = unirank.apply(loaded, store, unirank.plan(store, 0.3))
    assert isinstance(compressed.model.get_submodule("model.layers.0.mlp.experts.3.down"), LowRankLinear)
    with torch.no_grad():
        assert compressed.model(torch.arange(2, 40)[None]).logits.isfinite().all()


def test_a_list_that_no_token_reaches_is_refused(tokenizer, calibration: unirank.Calibration) -> None:
    model = build("llama")
    model.model.layers[1].mlp.adapters = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
    loaded = unirank.describe(model, tokenizer)
    with pytest.raises(unirank.InputError, match=r"No calibration token reaches model\.layers\.1\.mlp\.adapters\.0"):
        unirank.compress(loaded, 0.3, calibration=calibration)


def test_networks_that_all_see_every_token_are_ordinary(tokenizer, calibration: unirank.Calibration) -> None:
    model = build("llama")

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(Network() for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.parts[0](x) + self.parts[1](x)

    model.model.layers[1].mlp = Both()
    loaded = unirank.describe(model, tokenizer)
    recording = record(loaded, windows_of(loaded, texts_of(loaded, calibration), calibration), batch=calibration.batch)
    calibrate_layer(loaded, 0, recording, recording.start)
    stats = calibrate_layer(loaded, 1, recording, recording.start)
    assert stats.shares == {}
    one, other = (stats.moments[f"model.layers.1.mlp.parts.{i}.up"] for i in range(2))
    assert torch.equal(one.c, other.c)
    assert one.tokens == 6 * 24
