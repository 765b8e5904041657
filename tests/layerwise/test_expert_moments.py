"""What each expert reads: its own tokens, shrunk to all tokens, in one pass or in several."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import unirank
from unirank.analysis.calibration import texts_of, windows_of
from unirank.experts import called_with, second_input
from unirank.layerwise.expert_moments import PRIOR, parts_of
from unirank.layerwise.recording import record
from unirank.layerwise.statistics import calibrate_layer, calibrate_parts
from unirank.types import ExpertSpec, LoadedModel


@pytest.fixture
def loaded(make_model) -> LoadedModel:
    return make_model("mixtral")


def recorded(loaded: LoadedModel, calibration: unirank.Calibration) -> Any:
    windows = windows_of(loaded, texts_of(loaded, calibration), calibration)
    return record(loaded, windows, batch=calibration.batch)


def experts_of(loaded: LoadedModel, layer: int) -> list[ExpertSpec]:
    return [spec for spec in loaded.linears if isinstance(spec, ExpertSpec) and spec.layer == layer]


@torch.no_grad()
def test_moments_and_shares_are_those_of_the_tokens_that_are_routed_to_an_expert(
    loaded: LoadedModel, calibration: unirank.Calibration
) -> None:
    recording = recorded(loaded, calibration)
    module: Any = loaded.model.get_submodule("model.layers.0.mlp.experts")
    seen: list[tuple[torch.Tensor, ...]] = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args))
    stats = calibrate_layer(loaded, 0, recording, recording.start)
    hook.remove()
    hidden, index, weights = (torch.cat(parts) for parts in zip(*seen[1:], strict=True))  # the first is the probe's
    outer, inner = [], []
    for expert in range(4):
        tokens, _ = (index == expert).nonzero(as_tuple=True)
        outer.append(hidden[tokens].double())
        inner.append(second_input(module, expert, hidden[tokens]).double())
    common = {"gate_up_proj": hidden.double(), "down_proj": torch.cat(inner)}
    for name, own in (("gate_up_proj", outer), ("down_proj", inner)):
        every = common[name]
        for expert, x in enumerate(own):
            moment = stats.moments[stats.input_of[f"model.layers.0.mlp.experts.{name}.{expert}"]]
            n, lent = len(x), PRIOR * x.shape[1] / (len(x) + PRIOR * x.shape[1])
            c, c_all = x.T @ x / n, every.T @ every / len(every)
            scale = c.trace() / c_all.trace()
            torch.testing.assert_close(moment.c, (1 - lent) * c + lent * scale * c_all, rtol=1e-5, atol=1e-7)
            mean = (1 - lent) * x.mean(0) + lent * scale.sqrt() * every.mean(0)
            torch.testing.assert_close(moment.mean, mean, rtol=1e-4, atol=1e-6)
            received = weights[index == expert].sum() / weights.sum()
            assert stats.shares[f"model.layers.0.mlp.experts.{name}.{expert}"] == pytest.approx(
                float(received), rel=1e-5
            )
    assert sum(stats.shares.values()) == pytest.approx(2)


def test_parts_give_the_moments_of_one_pass_and_move_the_streams_once(
    loaded: LoadedModel, calibration: unirank.Calibration
) -> None:
    one, several = recorded(loaded, calibration), recorded(loaded, calibration)
    whole = calibrate_layer(loaded, 1, one, one.start, clip=2.0, mean_abs=True)
    found: dict[str, Any] = {}
    count = 0
    for part in calibrate_parts(loaded, 1, several, several.start, clip=2.0, mean_abs=True, room=1):
        found |= {name: part.moments[owner] for name, owner in part.input_of.items()}
        assert part.cosines == whole.cosines
        assert part.shares == whole.shares
        count += 1
    assert count == 4
    assert found.keys() == whole.input_of.keys()
    for name, owner in whole.input_of.items():
        for key in ("c", "mean", "mean_abs"):
            expected = getattr(whole.moments[owner], key)
            torch.testing.assert_close(getattr(found[name], key), expected, rtol=1e-12, atol=1e-15)
    for a, b in zip(one.start.batches, several.start.batches, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(one.start.probe, several.start.probe)


@torch.no_grad()
def test_an_expert_that_no_token_reaches_has_the_moment_of_all(
    loaded: LoadedModel, calibration: unirank.Calibration
) -> None:
    router: Any = loaded.model.get_submodule("model.layers.0.mlp.gate")
    router.weight.zero_()  # all alike: the first two are taken
    recording = recorded(loaded, calibration)
    stats = calibrate_layer(loaded, 0, recording, recording.start)
    shares = [stats.shares[f"model.layers.0.mlp.experts.down_proj.{expert}"] for expert in range(4)]
    idle = shares.index(0.0)
    moment = stats.moments[f"model.layers.0.mlp.experts.gate_up_proj.{idle}"]
    busy = stats.moments[f"model.layers.0.mlp.experts.gate_up_proj.{shares.index(max(shares))}"]
    torch.testing.assert_close(moment.c, busy.c, rtol=1e-9, atol=1e-12)  # which sees every token


def test_groups_keep_the_matrices_of_an_expert_together(loaded: LoadedModel) -> None:
    specs = experts_of(loaded, 0)
    each = 8 * (32 * 32 + 48 * 48)
    assert [len(group) for group in parts_of(specs, 2 * each)] == [4, 4]
    assert [len(group) for group in parts_of(specs, 2 * each - 1)] == [2] * 4
    assert [len(group) for group in parts_of(specs, None)] == [8]
    assert {spec.expert for spec in parts_of(specs, 1)[2]} == {2}


def test_another_way_to_be_called_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(unirank.InputError, match=r"x must be called with .* got \[3, 2\]\.$"):
        called_with("x", loaded.model.get_submodule("model.layers.0.mlp.experts"), (torch.zeros(3, 2),), {})
