"""Faults planted in the pipeline: a tensor that stays on the CPU is found, wherever it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import unirank
from tests.support.pretend import PretendTensor, pretend_gpu
from unirank.compression import refine, second_fit
from unirank.layerwise import statistics

# Each plants one fault and says what runs into it.
Plant = Callable[[pytest.MonkeyPatch, unirank.LoadedModel], None]


def on_cpu(tensor: Any) -> Any:
    return tensor.cpu() if isinstance(tensor, PretendTensor) else tensor


def positions(patch: pytest.MonkeyPatch, loaded: unirank.LoadedModel) -> None:
    rotary = type(loaded.model.model.rotary_emb)
    forward = rotary.forward
    patch.setattr(rotary, "forward", lambda *args, **more: tuple(map(on_cpu, forward(*args, **more))))


def weight(_: pytest.MonkeyPatch, loaded: unirank.LoadedModel) -> None:
    norm = loaded.model.model.layers[1].input_layernorm
    norm.weight = torch.nn.Parameter(norm.weight.detach().cpu())


def clipped(patch: pytest.MonkeyPatch, _: unirank.LoadedModel) -> None:
    clip = statistics.clipped
    patch.setattr(statistics, "clipped", lambda x, limit: on_cpu(clip(x, limit)))


def moments(patch: pytest.MonkeyPatch, _: unirank.LoadedModel) -> None:
    finish = statistics._Grams.finish
    patch.setattr(
        statistics._Grams,
        "finish",
        lambda self: {name: replace(moment, c=on_cpu(moment.c)) for name, moment in finish(self).items()},
    )


def sums(patch: pytest.MonkeyPatch, _: unirank.LoadedModel) -> None:
    zeros = second_fit.Pair.zeros
    patch.setattr(second_fit.Pair, "zeros", lambda n, _device, **more: zeros(n, torch.device("cpu"), **more))


def metric(patch: pytest.MonkeyPatch, _: unirank.LoadedModel) -> None:
    """What the code did until it ran here: gradients came from the store on the CPU, and stayed there."""
    fit = refine.fit
    patch.setattr(refine, "fit", lambda *args: fit(*args[:4], on_cpu(args[4]), *args[5:]))


def windows(patch: pytest.MonkeyPatch, _: unirank.LoadedModel) -> None:
    embed = torch.nn.Embedding.forward
    patch.setattr(torch.nn.Embedding, "forward", lambda self, tokens: embed(self, on_cpu(tokens)))


@pytest.mark.parametrize("plant", [positions, weight, clipped, moments, windows])
def test_an_analysis_runs_into_it(plant: Plant, twice, monkeypatch: pytest.MonkeyPatch) -> None:
    with pretend_gpu():
        loaded = twice.load("cuda")
        plant(monkeypatch, loaded)
        with pytest.raises((RuntimeError, unirank.UnirankError), match=r"same device|result is on"):
            unirank.analyze(loaded, twice.folder / "store", calibration=twice.calibration)


@pytest.mark.parametrize("plant", [sums, metric])
def test_a_second_pass_runs_into_it(plant: Plant, twice, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = replace(twice.calibration, gradient_windows=2)
    with pretend_gpu():
        loaded = twice.load("cuda")
        store = unirank.analyze(loaded, twice.folder / "store", calibration=calibration)
        tokens = unirank.make_workbench(loaded, store, text=str(twice.text)).windows
        plan, settings = unirank.plan(store, 0.4), unirank.Refine(metric=True)
        plant(monkeypatch, loaded)
        with pytest.raises((RuntimeError, unirank.UnirankError), match=r"same device|result is on"):
            unirank.apply(loaded, store, plan, refine=settings, windows=tokens)
