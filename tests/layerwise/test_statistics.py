"""Layer-by-layer calibration sees exactly what the whole model computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn.functional import cosine_similarity

import unirank
from tests.support.threads import with_threads
from tests.support.tiny import WORDS
from unirank.layerwise.recording import Recording, layers_of, record
from unirank.layerwise.statistics import SublayerStreams, calibrate_layer
from unirank.layerwise.trace import traced_layer
from unirank.types import LayerStats, LoadedModel

# 24 tokens are three of tiny-gemma3's sliding windows.
WINDOWS = torch.randint(2, len(WORDS), (5, 24), generator=torch.Generator().manual_seed(2))
NAMES = ["llama", "gemma3", "gpt2", "opt", "gpt-neox"]


def calibrate(loaded: LoadedModel, *, batch: int = 2) -> Iterator[tuple[LayerStats, torch.Tensor]]:
    """Statistics of each layer and the stream `[5, 24, D]` that leaves it."""
    recording = record(loaded, WINDOWS, batch=batch)
    for index in range(loaded.layer_count):
        stats = calibrate_layer(loaded, index, recording, recording.start)
        yield stats, torch.cat(recording.start.batches)


@torch.no_grad()
def observe(loaded: LoadedModel) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """First input and output, by module path, of everything that ran in one forward of the whole model."""
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: object, args: tuple, kwargs: dict, output: object) -> None:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            if tensors:
                inputs[name] = tensors[0]
            outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [
        module.register_forward_hook(keep(name), with_kwargs=True) for name, module in loaded.model.named_modules()
    ]
    loaded.model(input_ids=WINDOWS, use_cache=False)
    for handle in handles:
        handle.remove()
    return inputs, outputs


@pytest.mark.parametrize("name", NAMES)
def test_recording_leaves_the_model_as_it_was(name: str, make_model) -> None:
    loaded = make_model(name)
    with torch.no_grad():
        before = loaded.model(input_ids=WINDOWS).logits
        record(loaded, WINDOWS, batch=2)
        assert all("forward" not in layer.__dict__ for layer in layers_of(loaded))
        assert torch.equal(loaded.model(input_ids=WINDOWS).logits, before)


def test_recording_keeps_a_forward_that_hangs_on_the_instance(make_model) -> None:
    loaded = make_model("llama")
    layer = layers_of(loaded)[1]
    wrapped, calls = layer.forward, []

    def forward(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return wrapped(*args, **kwargs)

    layer.forward = forward
    recording = record(loaded, WINDOWS, batch=2)
    assert layer.__dict__["forward"] is forward
    calls.clear()
    calibrate_layer(loaded, 1, recording, recording.start)
    assert len(calls) == 1 + 3  # the probe and the batches go through it


def test_recording_that_fails_restores_every_forward(make_model) -> None:
    loaded = make_model("llama")
    with pytest.raises(unirank.InputError, match=r"LlamaForCausalLM cannot be run .*: IndexError: index out of range"):
        record(loaded, WINDOWS + len(WORDS), batch=2)
    assert all("forward" not in layer.__dict__ for layer in layers_of(loaded))


def test_lm_head_never_runs(make_model) -> None:
    loaded = make_model("llama")

    def forward(*_: object) -> None:
        raise AssertionError("lm_head ran")

    loaded.model.lm_head.forward = forward
    with pytest.raises(AssertionError, match="lm_head ran"):
        loaded.model(input_ids=WINDOWS)
    assert len(list(calibrate(loaded))) == 3


@pytest.mark.parametrize("name", NAMES)
def test_streams_equal_the_hidden_states_of_the_whole_model(name: str, make_model) -> None:
    loaded = make_model(name)
    with torch.no_grad():
        expected = loaded.model(input_ids=WINDOWS, output_hidden_states=True, use_cache=False).hidden_states
        streams = [stream for _, stream in calibrate(loaded)]
        # transformers gives the last hidden state behind the final norm.
        decoder = getattr(loaded.model.base_model, "decoder", loaded.model.base_model)
        norms = ("norm", "ln_f", "final_layer_norm")
        norm = next(getattr(decoder, key) for key in norms if hasattr(decoder, key))
        streams[-1] = norm(streams[-1])
    assert len(streams) == len(expected) - 1
    for found, wanted in zip(streams, expected[1:], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_each_gemma_layer_runs_with_its_own_mask(make_model) -> None:
    loaded = make_model("gemma3")
    recording = record(loaded, WINDOWS, batch=5)
    layer, hidden = layers_of(loaded)[0], recording.start.batches[0]
    with torch.no_grad():
        sliding = recording.calls[0][0].run(layer, hidden)
        full = recording.calls[0][1].run(layer, hidden)
    torch.testing.assert_close(sliding[:, :8], recording.calls[0][2].run(layer, hidden)[:, :8])
    assert not torch.allclose(sliding[:, 8:], full[:, 8:], atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_moments_equal_those_of_the_inputs_of_the_whole_model(name: str, make_model) -> None:
    loaded = make_model(name)
    inputs, _ = observe(loaded)
    stats = {stats.layer: stats for stats, _ in calibrate(loaded)}
    for spec in loaded.linears:
        moment = stats[spec.layer].moments[stats[spec.layer].input_of[spec.name]]
        x = inputs[spec.name].reshape(-1, spec.n).double()
        assert moment.tokens == len(x) == WINDOWS.numel()
        assert moment.c.dtype == moment.mean.dtype == torch.float64
        scale = float(x.square().mean())
        torch.testing.assert_close(moment.c, x.T @ x / len(x), rtol=1e-5, atol=1e-5 * scale)
        torch.testing.assert_close(moment.mean, x.mean(0), rtol=1e-5, atol=1e-5 * scale**0.5)


@pytest.mark.parametrize(
    ("name", "attention", "mlp"),
    [
        ("llama", "self_attn", "mlp"),
        ("gemma3", "post_attention_layernorm", "post_feedforward_layernorm"),
        ("gpt2", "attn", "mlp"),
        ("opt", "self_attn", "fc2"),
        ("gpt-neox", "attention.dense", "mlp.dense_4h_to_h"),
    ],
)
def test_cosines_follow_the_definition(name: str, attention: str, mlp: str, make_model) -> None:
    loaded = make_model(name)
    inputs, outputs = observe(loaded)
    for stats, _ in calibrate(loaded):
        layer = f"{loaded.layers}.{stats.layer}"
        x, leaves = inputs[layer].double(), outputs[layer].double()
        a = outputs[f"{layer}.{attention}"].double().view_as(x)
        f = outputs[f"{layer}.{mlp}"].double().view_as(x)
        middle = x if name == "gpt-neox" else x + a  # GPT-NeoX is parallel: its MLP starts from x too
        pairs = {"attention": (x, x + a), "mlp": (middle, middle + f), "block": (x, leaves)}
        for key, (before, after) in pairs.items():
            cosine = cosine_similarity(before, after, dim=-1)
            found = stats.cosines[key]
            assert found.tokens == WINDOWS.numel()
            assert found.mean == pytest.approx(float(cosine.mean()), abs=1e-6)
            assert found.total_of_squares == pytest.approx(float(cosine.square().sum()), abs=1e-4)
        assert stats.cosines["attention"].mean < 0.999  # or the model would be too tame to tell anything


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parallel_sublayers_are_not_rounded_to_a_sum_that_the_model_never_makes(dtype: torch.dtype, make_model) -> None:
    loaded = make_model("gpt-neox")
    for name, parameter in loaded.model.named_parameters():
        if name.endswith(("attention.dense.weight", "mlp.dense_4h_to_h.weight")):
            parameter.data *= 1e-2  # sublayers that move the stream little, as in a large model
    loaded.model.to(dtype)
    recording = record(loaded, WINDOWS, batch=5)
    x, layer = recording.start.batches[0], layers_of(loaded)[0]
    traced, _ = traced_layer(loaded, 0, recording, recording.start.probe)
    caught, outputs = SublayerStreams(traced), {}
    for key, path in (("attention", "attention.dense"), ("mlp", "mlp.dense_4h_to_h")):
        layer.get_submodule(path).register_forward_hook(lambda *call, key=key: outputs.update({key: call[2]}))
    with torch.no_grad(), caught.hooked():
        pairs = caught.pairs(x, recording.calls[0][0].run(layer, x))
    stats = calibrate_layer(loaded, 0, recording, recording.start)
    for key, output in outputs.items():
        f = output.double().view_as(x)
        before, after = (stream.double() for stream in pairs[key])
        # What the sublayer did is what it gave, to float32's rounding of the stream.
        assert float((after - before - f).abs().max()) < 1e-6 * float(x.abs().max())
        lost = 1 - cosine_similarity(x.double(), x.double() + f, dim=-1).mean()
        assert 1 - stats.cosines[key].mean == pytest.approx(float(lost), rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_batch_size_changes_results_only_by_rounding(name: str, make_model) -> None:
    loaded = make_model(name)
    one, all_at_once = list(calibrate(loaded, batch=1)), list(calibrate(loaded, batch=5))
    for (a, stream_a), (b, stream_b) in zip(one, all_at_once, strict=True):
        torch.testing.assert_close(stream_a, stream_b, rtol=1e-4, atol=1e-4)
        assert a.input_of == b.input_of
        for key in a.moments:
            torch.testing.assert_close(a.moments[key].c, b.moments[key].c, rtol=1e-4, atol=1e-5)
        for key in a.cosines:
            assert a.cosines[key].mean == pytest.approx(b.cosines[key].mean, abs=1e-6)


def test_moments_are_not_gathered_when_nobody_needs_them(make_model) -> None:
    loaded = make_model("llama")
    recording = record(loaded, WINDOWS, batch=2)
    stats = calibrate_layer(loaded, 0, recording, recording.start, moments=False)
    assert stats.moments == {}
    assert stats.cosines["attention"].tokens == WINDOWS.numel()


@pytest.mark.parametrize("moments", [True, False])
@pytest.mark.parametrize(
    "weight", ["input_layernorm", "self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_turns_non_finite_later_is_an_error_that_names_the_layer(
    weight: str, value: float, moments: bool, make_model
) -> None:
    loaded = make_model("llama")
    recording: Recording = record(loaded, WINDOWS, batch=2)
    layers_of(loaded)[1].get_parameter(f"{weight}.weight").data[3] = value
    calibrate_layer(loaded, 0, recording, recording.start, moments=moments)
    with pytest.raises(unirank.NonFiniteError, match=r"model\.layers\.1\b"):
        calibrate_layer(loaded, 1, recording, recording.start, moments=moments)


def test_non_finite_embedding_is_an_error(make_model) -> None:
    loaded = make_model("llama")
    loaded.model.model.embed_tokens.weight.data[int(WINDOWS[3, 5])] = float("nan")
    with pytest.raises(unirank.NonFiniteError, match="embeddings"):
        record(loaded, WINDOWS, batch=2)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_statistics_do_not_depend_on_the_number_of_threads(name: str, make_model) -> None:
    first, *others = with_threads(lambda: list(calibrate(make_model(name))))
    for other in others:
        for (a, stream_a), (b, stream_b) in zip(first, other, strict=True):
            assert torch.equal(stream_a, stream_b)
            assert a.cosines == b.cosines
            for key in a.moments:
                assert torch.equal(a.moments[key].c, b.moments[key].c)
                assert torch.equal(a.moments[key].mean, b.moments[key].mean)
