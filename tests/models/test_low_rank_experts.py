"""Stacked experts with low-rank matrices: at full rank the dense ones, in every layout; and no padding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import unirank
from tests.support.every_decoder import build
from unirank.experts import count_of, expert_weight, experts_in, routed, stacks_of
from unirank.models.low_rank_experts import LowRankExperts, RaggedFactors, make_low_rank_experts
from unirank.types import Form

IDS = torch.arange(2, 18)[None]


@pytest.fixture(params=["mixtral", "gpt_oss", "aria_text", "nemotron_h", "llama4_text"])
def model(request: pytest.FixtureRequest) -> Any:
    """Concatenated, interleaved with biases, transposed, without gates, called with all tokens for each expert."""
    model = build(request.param)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "experts" in name and name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


@torch.no_grad()
def cut(model: Any, rank_of: Any, form: Form) -> dict[str, LowRankExperts]:
    """All experts but the second become factors of the rank that `rank_of(k)` gives, from an SVD."""
    made = {}
    for path, dense in list(experts_in(model)):
        weights = {
            name: [expert_weight(dense, name, e).clone() for e in range(count_of(dense))] for name in stacks_of(dense)
        }
        chosen = [expert for expert in range(count_of(dense)) if expert != 1]
        ranks: Any = {name: dict.fromkeys(chosen, rank_of(min(own[0].shape))) for name, own in weights.items()}
        made[path] = make_low_rank_experts(model, path, ranks, form=form)
        for name, own in weights.items():
            factors: Any = made[path].factors(name)
            for expert in chosen:
                u, s, v = torch.linalg.svd(own[expert], full_matrices=False)
                r = factors.ranks[expert]
                factors.put(expert, u[:, :r] * s[:r], v[:r])
                best = (u[:, :r] * s[:r]) @ v[:r]
                torch.testing.assert_close(factors.dense_weight(expert), best, rtol=1e-3, atol=1e-5)
            assert torch.equal(factors.dense_weight(1), own[1])
    return made


@torch.no_grad()
def test_full_rank_is_the_dense_model(model: Any) -> None:
    dense = model(input_ids=IDS, use_cache=False).logits
    made = cut(model, lambda k: k, "factors")
    assert made
    found = model(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(found, dense, rtol=1e-5, atol=1e-6)
    again = copy.deepcopy(model)(input_ids=IDS, use_cache=False).logits
    assert torch.equal(again, found)


@pytest.mark.parametrize("form", ["factors", "pivoted"])
@torch.no_grad()
def test_a_dense_module_comes_back_with_the_products(model: Any, form: Form) -> None:
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    made = cut(model, lambda k: k // 2, form)
    low = model(input_ids=IDS, use_cache=False).logits
    for path, experts in made.items():
        stacks = {name: torch.nn.Parameter(experts.dense_stack(name)) for name in experts.stacks}
        model.set_submodule(path, experts.dense_module(stacks))
    torch.testing.assert_close(model(input_ids=IDS, use_cache=False).logits, low, rtol=1e-4, atol=1e-6)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes


def test_nothing_is_padded_and_every_expert_is_counted() -> None:
    for form in ("factors", "pivoted"):
        factors = RaggedFactors(6, 10, [3, None, 1, 5], form=form)
        held = sum(parameter.numel() for parameter in factors.parameters())
        assert held == sum(factors.count(expert) for expert in range(4))
        assert factors.right.shape == (9, 10)
        assert factors.dense is not None
        assert factors.dense.shape == (1, 6, 10)
    assert factors.count(0) == 3 * (6 + 10 - 3)
    assert factors.count(1) == 60


@torch.no_grad()
def test_only_experts_that_are_hit_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mixtral")
    (experts, *_) = cut(model, lambda k: k // 2, "factors").values()
    ran: list[int] = []
    whole = LowRankExperts.run
    monkeypatch.setattr(LowRankExperts, "run", lambda self, e, x: ran.append(e) or whole(self, e, x))
    index = torch.tensor([[3, 1], [1, 4]])  # 4 is no expert: transformers uses it where experts are elsewhere
    weights = torch.tensor([[0.25, 0.75], [1.0, 0.5]])
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    y = experts(x, index, weights)
    assert ran == [1, 3]
    expected = 0.25 * whole(experts, 3, x[:1]) + 0.75 * whole(experts, 1, x[:1])
    torch.testing.assert_close(y[:1], expected)
    torch.testing.assert_close(y[1:], whole(experts, 1, x[1:]))


def test_places_of_every_expert() -> None:
    assert [rows.tolist() for rows in routed(torch.tensor([[2, 0], [0, 3]]), 3)] == [[1, 2], [], [0]]


def test_what_does_not_fit_is_refused() -> None:
    model = build("mixtral")
    path = "model.layers.0.mlp.experts"
    for where, ranks, said in (
        ("model.layers.0.self_attn", {}, "has no stacked experts at"),
        ("model.layers.9.mlp.experts", {}, "has no stacked experts at"),
        (path, {"up": {0: 1}}, "ranks name 'up'"),
        (path, {"down_proj": {4: 1}}, "has 4 experts, and ranks name the number 4"),
        (path, {"down_proj": {0: 33}}, "legal are whole numbers from 1 to 32"),
        (path, {"down_proj": {0: True}}, "legal are whole numbers from 1 to 32"),
    ):
        with pytest.raises(unirank.InputError, match=said):
            make_low_rank_experts(model, where, ranks)  # pyright: ignore[reportArgumentType]
