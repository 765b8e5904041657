"""Layers that are not called, or do not answer, as decoder layers do: understood, or refused in a sentence."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import unirank
from unirank.errors import NonFiniteError
from unirank.layerwise.recording import foreign, layers_of, record
from unirank.layerwise.trace import Place, Span, trace_layer
from unirank.types import LinearSpec, LoadedModel

WINDOWS = torch.arange(24).view(2, 12)
Pair = namedtuple("Pair", ["states", "rest"])


def only(states: torch.Tensor, _: Any) -> torch.Tensor:
    return states


def answer(loaded: LoadedModel, change: Callable[[torch.Tensor], Any], read: Callable[[Any], torch.Tensor]) -> None:
    """Every layer returns `change(hidden states)`, and the decoder takes `read(...)` of it."""
    for layer in layers_of(loaded):
        own = layer.forward

        def forward(self: nn.Module, *args: Any, _own: Callable = own, **kwargs: Any) -> Any:
            return change(_own(*args, **kwargs))

        layer.forward = MethodType(forward, layer)

    def decoder(
        _self: nn.Module, input_ids: torch.Tensor, inner: Any = loaded.model.base_model, **_: Any
    ) -> SimpleNamespace:
        hidden = inner.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1])[None]
        for layer in inner.layers:
            rotary = inner.rotary_emb(hidden, positions)
            hidden = read(layer(hidden, position_embeddings=rotary, position_ids=positions))
        others = dict.fromkeys(("cache", "past_key_values", "hidden_states", "attentions"))
        return SimpleNamespace(last_hidden_state=inner.norm(hidden), **others)

    loaded.model.base_model.forward = MethodType(decoder, loaded.model.base_model)


@pytest.mark.parametrize(
    ("change", "read"),
    [
        (lambda hidden: hidden, lambda output: output),
        (lambda hidden: (hidden,), lambda output: output[0]),
        (lambda hidden: [hidden], lambda output: output[0]),  # OpenAI-GPT
        (lambda hidden: (hidden, None), lambda output: only(*output)),  # CpmAnt
        (lambda hidden: (hidden, hidden * 2), lambda output: output[0]),
        (lambda h: (h, h), lambda o: only(*o)),
    ],
    ids=["bare", "tuple", "list", "pair with None", "pair with a tensor that nobody reads", "pair that is unpacked"],
)
def test_hidden_states_are_found_in_what_a_layer_returns(change, read, make_model, calibration, tmp_path) -> None:
    stores = []
    for changed in (False, True):
        loaded = make_model()
        answer(loaded, change if changed else lambda hidden: hidden, read if changed else lambda output: output)
        store = unirank.analyze(loaded, tmp_path / str(changed), scheme="kfac", calibration=calibration)
        stores.append(store.energies())
    assert all(torch.equal(found, stores[0][name]) for name, found in stores[1].items())


@pytest.mark.parametrize(
    ("change", "read", "message"),
    [
        (lambda h: Pair(h, h), lambda o: o.states, r"model\.layers\.0 of .* must return hidden states .* got a Pair"),
        (lambda h: {"states": h}, lambda o: o["states"], "must return hidden states .* got a dict"),
        (lambda h: (), lambda o: o, "must return hidden states .* got a tuple"),
        (lambda h: None, lambda o: o, "must return hidden states .* got nothing"),
        (lambda h: h[0], lambda o: o[None], r"must return hidden states \[1, 8, 32\], got float32 \[8, 32\]"),
    ],
    ids=["named tuple", "dict", "nothing in a tuple", "None", "no windows"],
)
def test_other_answers_of_a_layer_are_refused(change, read, message: str, make_model) -> None:
    loaded = make_model()
    answer(loaded, change, read)
    with pytest.raises(unirank.InputError, match=message):
        record(loaded, WINDOWS, batch=2)
    assert all(isinstance(layer.__dict__["forward"], MethodType) for layer in layers_of(loaded))


def test_layer_that_answers_otherwise_than_the_first_one_is_refused(make_model, calibration, tmp_path) -> None:
    loaded = make_model()
    last = layers_of(loaded)[2]
    own = last.forward
    last.forward = lambda *args, **kwargs: own(*args, **kwargs)[..., :16]
    with pytest.raises(unirank.InputError, match=r"LlamaDecoderLayer must return .* got float32 \[1, 8, 16\]"):
        unirank.analyze(loaded, tmp_path / "store", calibration=calibration)


@pytest.mark.parametrize(
    "order", [(0, 1), (1, 0, 2), (0, 1, 2, 0), (0, 0, 1, 2), ()], ids=["few", "other", "more", "twice", "none"]
)
def test_layers_that_run_in_another_order_are_refused(order: tuple[int, ...], make_model) -> None:
    loaded = make_model()
    decoder = loaded.model.base_model
    layers = layers_of(loaded)

    def forward(input_ids: torch.Tensor, **_: Any) -> None:
        hidden = decoder.embed_tokens(input_ids)
        rotary = decoder.rotary_emb(hidden, torch.arange(input_ids.shape[1])[None])
        for index in order:
            hidden = layers[index](hidden, position_embeddings=rotary)

    decoder.forward = forward
    with pytest.raises(unirank.InputError, match=r"does not call every layer of model\.layers once, in order"):
        record(loaded, WINDOWS, batch=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda layer, hidden: layer(), "got nothing"),
        (lambda layer, hidden: layer(x=hidden), "got nothing"),
        (lambda layer, hidden: layer((hidden, hidden)), "got a tuple"),
        (lambda layer, hidden: layer(hidden[0]), r"got float32 \[8, 32\]"),
        (lambda layer, hidden: layer(hidden.long()), r"got int64 \[1, 8, 32\]"),
    ],
)
def test_layer_that_takes_something_else_is_refused(call, message: str, make_model) -> None:
    loaded = make_model()
    decoder = loaded.model.base_model
    decoder.forward = lambda input_ids, **_: call(decoder.layers[0], decoder.embed_tokens(input_ids))
    with pytest.raises(unirank.InputError, match=rf"model\.layers\.0 of LlamaForCausalLM must take .* {message}\.$"):
        record(loaded, WINDOWS, batch=2)


@pytest.mark.parametrize("own", [True, False])
def test_what_a_layer_returns_beside_its_hidden_states_reaches_no_other_layer(own: bool, make_model) -> None:
    """xLSTM returns a state, which its model unpacks; Zaya's is what the next layer reads."""
    loaded = make_model()
    decoder = loaded.model.base_model
    for layer in layers_of(loaded):
        before = layer.forward
        layer.forward = lambda *a, _before=before, given=None, **k: (_before(*a, **k), torch.ones(2) if own else given)

    def forward(input_ids: torch.Tensor, **_: Any) -> None:
        hidden, state = decoder.embed_tokens(input_ids), torch.zeros(2)
        rotary = decoder.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
        for layer in decoder.layers:
            hidden, state = layer(hidden, position_embeddings=rotary, given=state)

    decoder.forward = forward
    if own:
        with pytest.raises(
            unirank.InputError, match=r"model\.layers\.1 of .* takes more from the layer before it than"
        ):
            record(loaded, WINDOWS, batch=2)
    else:
        assert len(record(loaded, WINDOWS, batch=2).calls[0]) == 3


def test_windows_that_do_not_come_first_are_refused(make_model) -> None:
    """XLNet's layers take `[tokens, windows, D]`."""
    loaded = make_model()
    decoder = loaded.model.base_model

    def forward(input_ids: torch.Tensor, **_: Any) -> None:
        hidden = decoder.embed_tokens(input_ids).transpose(0, 1)
        rotary = decoder.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
        for layer in decoder.layers:
            hidden = layer(hidden, position_embeddings=rotary)

    decoder.forward = forward
    with pytest.raises(unirank.InputError, match=r"\[windows, tokens, D\], got float32 \[8, 1, 32\]"):
        record(loaded, WINDOWS, batch=2)


def test_model_that_writes_to_its_weights_is_refused(make_model) -> None:
    loaded = make_model()
    decoder = loaded.model.base_model
    own = decoder.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        decoder.layers[1].mlp.down_proj.weight.div_(2)  # RWKV
        return own(*args, **kwargs)

    decoder.forward = forward
    with pytest.raises(unirank.InputError, match=r"changes model\.layers\.1\.mlp\.down_proj\.weight when it runs"):
        record(loaded, WINDOWS, batch=2)


@pytest.mark.parametrize("where", ["decoder", "first layer", "last layer"])
@pytest.mark.parametrize("error", [KeyError("sliding"), RuntimeError("sizes differ\nby 2."), AssertionError()])
def test_errors_of_a_models_own_code_are_one_sentence(where: str, error: Exception, make_model, calibration, tmp_path):
    loaded = make_model()

    def fail(*_: Any, **__: Any) -> None:
        raise error.with_traceback(None)  # the object was raised in another test before

    {"decoder": loaded.model.base_model, "first layer": layers_of(loaded)[0], "last layer": layers_of(loaded)[2]}[
        where
    ].forward = fail
    with pytest.raises(unirank.InputError, match=rf"^[^\n]* {type(error).__name__}: [^\n]*[^.]\.$") as caught:
        unirank.analyze(loaded, tmp_path / "store", calibration=calibration)
    assert caught.value.__cause__ is error


def test_an_op_that_fails_while_it_is_watched_is_the_models(make_model, calibration, tmp_path) -> None:
    loaded = make_model()
    last = layers_of(loaded)[2]
    last.forward = lambda hidden, *_, **__: hidden + hidden[..., :7]
    with pytest.raises(unirank.InputError, match="LlamaDecoderLayer cannot be run by itself: RuntimeError: The size"):
        unirank.analyze(loaded, tmp_path / "store", calibration=calibration)


@pytest.mark.parametrize("error", [TypeError("a slip"), RuntimeError("of ours")])
def test_a_slip_of_ours_in_watching_is_not_called_the_models(error, make_model, calibration, tmp_path, monkeypatch):
    def slip(*_: Any) -> None:
        raise error

    monkeypatch.setattr("unirank.layerwise.dataflow.Flow._made", slip)
    with pytest.raises(type(error), match=str(error)):
        unirank.analyze(make_model(), tmp_path / "store", calibration=calibration)


@pytest.mark.parametrize(
    "error",
    [
        unirank.InputError("ours"),
        NonFiniteError("ours"),
        MemoryError(),
        KeyboardInterrupt(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_our_own_errors_and_those_of_memory_pass(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, foreign("never said"):
        raise error
    assert caught.value is error


# -- one layer ---------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """An attention and an MLP of one linear each, which `how` runs."""

    def __init__(self, how: Callable[[Any, torch.Tensor], torch.Tensor], inner: int = 4) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(4, inner), nn.Linear(inner, 4), nn.LayerNorm(inner)
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.how(self, x)


def spans_of(how: Callable[[Any, torch.Tensor], torch.Tensor], inner: int = 4, first: int | None = None):
    """The trace of a layer whose first linear gives `inner` (or `first`) and whose second one reads `inner`."""
    layer, x = Layer(how, inner), torch.randn(1, 3, 4)
    if first is not None:
        layer.first = nn.Linear(4, first)
    specs = [
        LinearSpec("l.0.first", 0, "attention", "first", first or inner, 4),
        LinearSpec("l.0.second", 0, "mlp", "second", 4, inner),
    ]
    return trace_layer(layer, "l.0", specs, lambda one, hidden: one(hidden), x)[0].spans


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda m, x: x + m.second(input=x + m.first(x)), "must give second its input as the first argument"),
        (lambda m, x: (h := x + m.first(x)) + m.second(m.norm(input=h)), "must give norm its input as the first"),
        (lambda m, x: x.detach().numpy() is not None and torch.tensor((x + m.second(m.first(x))).tolist()), "followed"),
        (lambda m, x: x.add_(m.second(m.first(x))), "writes to the hidden states that enter it"),
    ],
    ids=["linear by keyword", "norm by keyword", "through Python", "in place"],
)
def test_layer_whose_parts_cannot_be_watched_is_refused(how, message: str) -> None:
    with pytest.raises(unirank.InputError, match=rf"l\.0 .*{message}"):
        spans_of(how)


def add_in_place(m: Any, x: torch.Tensor) -> torch.Tensor:
    h = x + m.first(x)
    given = m.second(m.norm(h))
    return h.add_(given)


def assign_to_parts(m: Any, x: torch.Tensor) -> torch.Tensor:
    h = torch.empty_like(x)
    h[:, :1], h[:, 1:] = x[:, :1] + m.first(x)[:, :1], x[:, 1:] + m.first.forward(x)[:, 1:]
    return h + m.second(m.norm(h))


@pytest.mark.parametrize(
    ("how", "overwritten"),
    [
        (lambda m, x: (h := x + m.first(x)) + m.second(m.norm(h)), False),
        (lambda m, x: (h := 0.5 * x + 0.1 * m.first(x)).mul(2) + m.second(m.norm(h)), False),
        (lambda m, x: (h := torch.lerp(x, m.first(x), 0.3)) + m.second(m.norm(h)).reshape(h.shape), False),
        (add_in_place, True),
        (assign_to_parts, False),
    ],
    ids=["sum", "scaled", "gated", "sum in place", "by parts"],
)
def test_stream_is_found_however_it_is_summed(how, overwritten: bool) -> None:
    middle = Place("norm", "input", overwritten)
    assert spans_of(how) == {"attention": Span(end=middle), "mlp": Span(start=middle)}


def test_norm_behind_the_sum_belongs_to_the_next_sublayer() -> None:
    middle = Place("norm", "input")
    spans = spans_of(lambda m, x: (h := m.norm(x + m.first(x))) + m.second(h))
    assert spans == {"attention": Span(end=middle), "mlp": Span(start=middle)}


def test_module_that_gives_the_stream_serves_where_none_reads_it() -> None:
    class Adds(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + super().forward(x)

    layer = Layer(lambda m, x: (h := m.first(x)) + m.second(torch.tanh(h)))
    layer.first = Adds(4, 4)
    specs = [
        LinearSpec("l.0.first", 0, "attention", "first", 4, 4),
        LinearSpec("l.0.second", 0, "mlp", "second", 4, 4),
    ]
    spans = trace_layer(layer, "l.0", specs, lambda one, hidden: one(hidden), torch.randn(1, 3, 4))[0].spans
    assert spans == {"attention": Span(end=Place("first", "output")), "mlp": Span(start=Place("first", "output"))}


@pytest.mark.parametrize(
    ("how", "inner", "first"),
    [
        (lambda m, x: x + m.second(m.norm(m.first(x) * 2)), 6, None),
        (lambda m, x: x + m.second(m.norm(x + m.first(x))), 4, None),
        (lambda m, x: x + m.first(x)[..., :4] + m.second(x), 4, 8),
        (lambda m, x: (h := x + m.first(x)) + m.second(h * 2), 4, None),
    ],
    ids=["one behind the other", "the stream goes around", "parallel, cut", "nobody reads it"],
)
def test_sublayers_that_cannot_be_told_apart_share_their_step(how, inner: int, first: int | None) -> None:
    assert spans_of(how, inner, first) == {"attention": Span(), "mlp": Span()}


def test_parallel_sublayers_have_a_branch_each() -> None:
    assert spans_of(lambda m, x: x + m.first(x) + m.second(m.norm(x))) == {
        "attention": Span(branch=Place("first", "output")),
        "mlp": Span(branch=Place("second", "output")),
    }


@pytest.mark.parametrize("error", [TypeError("a slip"), RuntimeError("of ours"), IndexError("in a hook")])
def test_a_slip_of_ours_in_a_hook_is_not_called_the_models(
    error, make_model, calibration, tmp_path, monkeypatch
) -> None:
    def slip(*_: Any) -> None:
        raise error

    monkeypatch.setattr("unirank.ops.gram_accumulate_", slip)
    with pytest.raises(type(error), match=str(error)):
        unirank.analyze(make_model(), tmp_path / "store", calibration=calibration)
