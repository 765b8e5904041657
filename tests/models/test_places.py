"""Linears are found again in a model of another class by the path of their layers, and only where that is certain."""

from __future__ import annotations

import pytest
import torch
import transformers as T
from torch import nn

import unirank
from tests.support.every_decoder import build as build_any
from tests.support.tiny import build
from unirank.models.low_rank import check_guards, make_low_rank
from unirank.models.places import places_of

UP = "mlp.up_proj"


def stack(*paths: str, layers: int = 2) -> nn.Module:
    """A model with a list of layers at each path."""
    model = nn.Module()
    for path in paths:
        inner = model
        *parents, last = path.split(".")
        for name in parents:
            if not hasattr(inner, name):
                inner.add_module(name, nn.Module())
            inner = inner.get_submodule(name)
        layer = nn.ModuleDict({"mlp": nn.ModuleDict({"up_proj": nn.Linear(2, 2)})})
        inner.add_module(last, nn.ModuleList([layer] * layers))
    return model


@pytest.mark.parametrize(
    ("saved", "opened"),
    [
        ("model.layers", "layers"),
        ("layers", "model.layers"),
        ("transformer.h", "h"),
        ("model.decoder.layers", "decoder.layers"),
        ("model.language_model.layers", "model.layers"),
        ("model.layers", "model.language_model.layers"),
        ("model.layers", "model.layers"),
    ],
)
def test_the_path_of_the_layers_may_be_longer_or_shorter(saved: str, opened: str) -> None:
    model = stack(opened, *(["vision_tower.layers"] if "." in saved else []))  # of which nothing fits by its path
    names = [f"{saved}.{layer}.{UP}" for layer in (0, 1)]
    assert places_of(model, names) == {name: name.replace(saved, opened, 1) for name in names}


def test_what_is_not_certain_stays_as_it_is() -> None:
    names = [f"layers.{layer}.{UP}" for layer in (0, 1)]
    same = {name: name for name in names}
    assert places_of(stack("encoder.layers", "decoder.layers"), names) == same  # two that fit
    assert places_of(stack("model.layers", layers=1), names) == same  # too few layers
    assert places_of(stack("model.blocks"), names) == same  # another name
    assert places_of(stack("model.layers"), [f"layers.0.{UP}", "layers.1.mlp.down_proj"])["layers.1.mlp.down_proj"]
    assert places_of(stack("model.layers"), ["head", *names]) == same | {"head": "head"}
    assert places_of(stack("model.layers"), []) == {}


@pytest.mark.parametrize("kind", ["gemma3", "fuyu", "opt", "bloom"])
def test_bodies_of_transformers_classes(kind: str) -> None:
    whole = build_any(kind)
    body = whole.base_model
    names = [spec.name for spec in unirank.models.structure.find_linears(whole)[1]]
    places = places_of(body, names)
    assert len(places) == len(names)
    for name, place in places.items():
        assert body.get_submodule(place) is whole.get_submodule(name)
    assert places_of(whole, list(places.values())) == {place: name for name, place in places.items()}


def test_a_low_rank_linear_without_its_weights_is_refused() -> None:
    """As transformers leaves it when its names are not in the files: initialised somehow, with a warning."""
    model = build("llama")
    low = make_low_rank(model, "model.layers.1.mlp.up_proj", 5)
    check_guards(model)
    low.state_dict()["weight"].zero_()
    with pytest.raises(unirank.InputError, match=r"no weights of rank 5 for model\.layers\.1\.mlp\.up_proj"):
        check_guards(model)
    low.to(torch.device("meta"))  # what stays on the disk is not looked at
    check_guards(model)


def test_a_class_for_which_transformers_finds_no_weights_is_refused(tmp_path, tokenizer, calibration) -> None:
    compressed = unirank.compress(unirank.describe(build("llama"), tokenizer), 0.3, calibration=calibration)
    compressed.save(tmp_path / "out")
    with pytest.raises(
        unirank.InputError, match=r"LlamaForQuestionAnswering has no linear model\.layers\.0.*AutoModel"
    ):
        T.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out")
