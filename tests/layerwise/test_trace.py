"""The structure of a layer, read from one run: where the attention ends and who shares an input."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import unirank
from unirank.layerwise.recording import layers_of, record
from unirank.layerwise.trace import LayerTrace, Place, Span, trace_layer
from unirank.types import LinearSpec, LoadedModel

IDS = torch.arange(24).view(2, 12)


def traced(loaded: LoadedModel) -> tuple[LayerTrace, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Trace of layer 0, what enters and leaves it, and every module's first input ("name.in") and output ("name")."""
    layer, prefix = layers_of(loaded)[0], f"{loaded.layers}.0"
    specs = [spec for spec in loaded.linears if spec.layer == 0]
    recording = record(loaded, IDS, batch=2)
    hidden, run = recording.start.probe, recording.probe_calls[0].run
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str):
        def hook(_module: nn.Module, args: tuple, output: object) -> None:
            if args:
                seen[f"{name}.in"] = args[0]
            seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    for name, module in layer.named_modules():
        module.register_forward_hook(keep(name))
    with torch.no_grad():
        trace, output = trace_layer(layer, prefix, specs, run, hidden)
    return trace, hidden, output, seen


@pytest.mark.parametrize(
    ("name", "middle", "attention"),
    [
        ("llama", "post_attention_layernorm", "self_attn"),
        ("gemma3", "pre_feedforward_layernorm", "post_attention_layernorm"),  # the norm behind belongs to the sublayer
        ("gpt2", "ln_2", "attn"),
        ("opt", "final_layer_norm", "self_attn"),
    ],
)
def test_stream_between_the_sublayers_is_the_input_plus_what_the_attention_adds(
    name: str, middle: str, attention: str, make_model
) -> None:
    trace, hidden, _, seen = traced(make_model(name))
    assert trace.spans == {"attention": Span(end=Place(middle, "input")), "mlp": Span(start=Place(middle, "input"))}
    assert torch.equal(seen[f"{middle}.in"].view_as(hidden), hidden + seen[attention])
    assert not torch.equal(seen[f"{middle}.in"].view_as(hidden), hidden)


def test_parallel_sublayers_have_no_stream_between_them(make_model) -> None:
    trace, hidden, output, seen = traced(make_model("gpt-neox"))
    branches = {"attention": "attention.dense", "mlp": "mlp.dense_4h_to_h"}
    assert trace.spans == {key: Span(branch=Place(module, "output")) for key, module in branches.items()}
    torch.testing.assert_close(hidden + seen["attention.dense"] + seen["mlp.dense_4h_to_h"], output)


def test_gpt_neox_with_sequential_sublayers_is_told_from_the_parallel_kind(make_model) -> None:
    trace, hidden, _, seen = traced(make_model("gpt-neox", use_parallel_residual=False))
    assert trace.spans["mlp"] == Span(start=Place("post_attention_layernorm", "input"))
    assert torch.equal(seen["post_attention_layernorm.in"], hidden + seen["attention"])


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        ("llama", [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")]),
        ("gemma3", [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")]),
        ("opt", [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")]),
        ("gpt2", []),
        ("gpt-neox", []),
    ],
)
def test_linears_share_an_owner_exactly_when_they_read_the_same_input(
    name: str, shared: list[tuple[str, ...]], make_model
) -> None:
    loaded = make_model(name)
    trace, *_ = traced(loaded)
    readers: dict[str, list[str]] = {}
    for linear, owner in trace.input_of.items():
        readers.setdefault(owner, []).append(linear)
    names = {spec.name for spec in loaded.linears if spec.layer == 0}
    groups = {frozenset(f"{loaded.layers}.0.{kind}" for kind in kinds) for kinds in shared}
    alone = {frozenset([linear]) for linear in names - frozenset().union(*groups)}
    assert {frozenset(members) for members in readers.values()} == groups | alone
    assert all(owner in members for owner, members in readers.items())


def test_tracing_returns_the_layers_output_and_leaves_no_hook(make_model) -> None:
    loaded = make_model("llama")
    layer = layers_of(loaded)[0]
    specs = [spec for spec in loaded.linears if spec.layer == 0]
    recording = record(loaded, IDS, batch=2)
    run, hidden = recording.probe_calls[0].run, recording.start.probe
    with torch.no_grad():
        _, output = trace_layer(layer, "model.layers.0", specs, run, hidden)
        assert torch.equal(output, run(layer, hidden))
    with pytest.raises(ZeroDivisionError):
        trace_layer(layer, "model.layers.0", specs, lambda *_: 1 / 0, hidden)
    assert not any(module._forward_hooks for module in layer.modules())


def test_target_that_does_not_run_is_named(make_model) -> None:
    loaded = make_model("llama")
    loaded.model.model.layers[0].mlp.idle = nn.Linear(32, 4)
    loaded = unirank.describe(loaded.model, loaded.tokenizer)
    with pytest.raises(unirank.InputError, match=r"model\.layers\.0 .*does not run mlp\.idle"):
        traced(loaded)


def test_target_that_runs_twice_is_refused(make_model) -> None:
    loaded = make_model("llama")
    mlp = loaded.model.model.layers[0].mlp
    mlp.up_proj = mlp.gate_proj
    loaded = unirank.describe(loaded.model, loaded.tokenizer)
    with pytest.raises(unirank.InputError, match=r"model\.layers\.0 .*more than once"):
        traced(loaded)


def test_sublayers_come_in_the_order_in_which_they_run() -> None:
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(self.second(x))

    specs = [LinearSpec("l.0.first", 0, "attention", "first", 4, 4), LinearSpec("l.0.second", 0, "mlp", "second", 4, 4)]
    trace, _ = trace_layer(Reversed(), "l.0", specs, lambda layer, x: layer(x), torch.ones(1, 3, 4))
    middle = Place("first", "input")
    assert list(trace.spans.items()) == [("mlp", Span(end=middle)), ("attention", Span(start=middle))]
