"""Linears that their layer does not call exactly once stay whole where the layer is an unusual one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

import unirank
from tests.support.every_decoder import build
from tests.support.tiny import build as plain
from unirank.models.low_rank import LowRankLinear


@pytest.mark.parametrize(
    ("kind", "whole", "sublayers"),
    [
        ("mamba", {"mixer.dt_proj"}, {"mixer"}),
        ("bart", {f"encoder_attn.{name}_proj" for name in ("q", "k", "v", "out")}, {"attention", "mlp"}),
        ("bert", set(), {"attention", "intermediate", "output"}),
        ("gemma3n_text", {"altup.modality_router"}, {"altup", "laurel", "mlp", "rest", "self_attn"}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_kept_whole(
    kind: str, whole: set[str], sublayers: set[str], stream: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    build(kind).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = unirank.load(tmp_path, device="cpu", stream=stream)
    layer = loaded.model.get_submodule(f"{loaded.layers}.0")
    held = {name for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    targets = {spec.kind for spec in loaded.linears if spec.layer == 0}
    assert held - targets == whole
    assert {spec.sublayer for spec in loaded.linears} == sublayers


def test_an_ordinary_layer_is_not_asked(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    model = plain("llama")

    def fail(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(model.model, "forward", fail)
    assert len(unirank.describe(model, tokenizer).linears) == 21


@pytest.mark.filterwarnings("ignore::unirank.UnirankWarning")
def test_model_that_cannot_run_is_left_to_the_calibration(
    tokenizer: PreTrainedTokenizerFast, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("mamba")

    def fail(*_: object, **__: object) -> None:
        raise KeyError("scan")

    monkeypatch.setattr(model.base_model, "forward", fail)
    loaded = unirank.describe(model, tokenizer)
    assert any(spec.kind == "mixer.dt_proj" for spec in loaded.linears)
    calibration = unirank.Calibration(text=str(text_file), windows=2, window=8)
    with pytest.raises(unirank.InputError, match="KeyError: 'scan'"), torch.no_grad():
        unirank.analyze(loaded, tmp_path / "store", calibration=calibration)


def test_the_bias_of_a_low_rank_linear_is_where_a_models_own_code_looks_for_it() -> None:
    """RecurrentGemma's does, when a checkpoint is read."""
    for form in ("factors", "pivoted"):
        linear = LowRankLinear(6, 4, 2, bias=True, form=form)
        assert linear.bias is linear.output_bias
        assert LowRankLinear(6, 4, 2, form=form).bias is None
        with pytest.raises(AttributeError, match="no attribute 'bios'"):
            _ = linear.bios
