"""The pipeline on the pretend GPU, compared with the CPU bit for bit: analyses, plans, models, files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import unirank
from unirank import recipes
from unirank.analysis import fill_store
from unirank.types import FORMS


def tensors(store: Path) -> dict[str, bytes]:
    """The files of a store but its manifest, which names the device."""
    return {file.name: file.read_bytes() for file in sorted(store.glob("*.safetensors"))}


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("scheme", unirank.schemes())
def test_a_scheme_gives_the_bytes_of_the_cpu(scheme: str, twice) -> None:
    def job(device: str, folder: Path) -> dict[str, bytes]:
        loaded, store = twice.analyzed(device, folder, scheme=scheme)
        assert loaded.device.type == device
        return tensors(store.path)

    on_cpu, on_gpu, journal = twice(job)
    assert on_cpu == on_gpu
    assert len(on_cpu) >= 2
    assert journal.count("to host") > 0


def test_every_allocator_gives_the_ranks_of_the_cpu(twice) -> None:
    def job(device: str, folder: Path) -> dict[str, object]:
        calibration = replace(twice.calibration, windows=4, gradient_windows=2)
        loaded, store = twice.analyzed(device, folder, calibration=calibration)
        workbench = unirank.make_workbench(loaded, store, text=str(twice.text))
        return {
            name: dict(unirank.plan(store, 0.3, allocator=name, workbench=workbench, options=OPTIONS.get(name)).ranks)
            for name in unirank.allocators()
        }

    on_cpu, on_gpu, _ = twice(job)
    assert on_cpu == on_gpu


# What keeps the allocators that train or measure short.
OPTIONS: dict[str, dict[str, int]] = {"ara": {"steps": 2}, "lems": {"tokens": 8}}


# Heal and distil by a few steps; the other settings are the preset's.
SHORT = {"healed": unirank.Heal(passes=1, batch=4), "distilled": unirank.Heal(passes=1, batch=4, distill_steps=2)}


@pytest.mark.parametrize("preset", unirank.presets())
def test_a_preset_gives_the_model_of_the_cpu(preset: str, twice, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = unirank.recipe(preset)
    options = OPTIONS["lems"] if whole.allocator == "lems" else whole.options
    brief = replace(whole, options=options, heal=SHORT.get(preset))
    monkeypatch.setitem(recipes._PRESETS, preset, lambda: brief)

    def job(device: str, folder: Path) -> tuple[dict[str, torch.Tensor], float, bytes, float]:
        made = unirank.compress(twice.dense, 0.4, preset=preset, calibration=twice.calibration, device=device)
        out = made.save(folder / "out")
        opened = unirank.open_compressed(out, device=device)
        for model in (made.model, opened.model):
            assert {tensor.device.type for tensor in model.state_dict().values()} == {device}
        assert (made.training is not None) == (preset in SHORT)
        return (
            weights(made.model),
            twice.perplexity(made.model),
            (out / "model.safetensors").read_bytes(),
            twice.perplexity(opened.model),
        )

    on_cpu, on_gpu, _ = twice(job)
    assert same(on_cpu[0], on_gpu[0])
    assert on_cpu[1:] == on_gpu[1:]
    assert on_cpu[1] == on_cpu[3]


def test_healing_in_bfloat16_as_a_gpu_does_by_itself(twice) -> None:
    def job(device: str, folder: Path) -> list[dict[str, float]]:
        small = twice.compressed(device, folder)
        healed = unirank.heal(
            small, twice.calibration, SHORT["healed"], work=folder / "work", against=twice.dense, device=device
        )
        return healed.training["layers"]

    on_cpu, on_gpu, _ = twice(job, bf16=True)
    for cpu, gpu in zip(on_cpu, on_gpu, strict=True):
        assert cpu["before"] == pytest.approx(gpu["before"], rel=0.02)
        assert gpu["after"] < gpu["before"]


@pytest.mark.parametrize("form", FORMS)
def test_streamed_layers_make_the_file_of_the_whole_model(form: str, twice) -> None:
    def job(device: str, folder: Path) -> bytes:
        out = twice.compressed(device, folder, stream=device == "cuda", form=form)
        return (out / "model.safetensors").read_bytes()

    on_cpu, on_gpu, _ = twice(job)
    assert on_cpu == on_gpu


def test_gradients_and_scheme_of_a_streamed_model(twice) -> None:
    def job(device: str, folder: Path) -> dict[str, bytes]:
        loaded = twice.load(device, stream=device == "cuda")
        return tensors(unirank.analyze(loaded, folder / "store", scheme="kfac", calibration=twice.calibration).path)

    on_cpu, on_gpu, _ = twice(job)
    assert on_cpu == on_gpu


@pytest.mark.parametrize(("free", "limit"), [(1 << 12, None), (64 << 30, 0)], ids=["in the host's memory", "in files"])
def test_where_hidden_states_are_changes_no_bit(free: int, limit: int | None, twice) -> None:
    def job(device: str, folder: Path) -> dict[str, bytes]:
        _, store = twice.analyzed(device, folder, hidden_limit=limit)
        return tensors(store.path)

    on_cpu, on_gpu, journal = twice(job, free=free)
    assert on_cpu == on_gpu
    if limit is None:
        assert journal.count("pinned") > 4, "a tier of page-locked memory, beyond the buffers of the writers"


def test_an_interrupted_analysis_resumes_to_the_same_bytes(twice, monkeypatch: pytest.MonkeyPatch) -> None:
    solve = fill_store.decompose_layer

    def job(device: str, folder: Path) -> dict[str, bytes]:
        if device == "cuda":
            layers = iter(range(9))

            def stopped(*args, **more):
                if next(layers) == 1:
                    raise KeyboardInterrupt
                return solve(*args, **more)

            monkeypatch.setattr(fill_store, "decompose_layer", stopped)
            with pytest.raises(KeyboardInterrupt):
                twice.analyzed(device, folder)
            monkeypatch.setattr(fill_store, "decompose_layer", solve)
            assert len(tensors(folder / "store")) == 1
        _, store = twice.analyzed(device, folder)
        return tensors(store.path)

    on_cpu, on_gpu, _ = twice(job)
    assert on_cpu == on_gpu


def test_compositions_serve_a_gpu_without_kernels(twice) -> None:
    """The torch compositions in the place of `unirank_cuda.so`: other sums, so a bound instead of bits."""

    def job(device: str, folder: Path) -> dict[str, torch.Tensor]:
        _, store = twice.analyzed(device, folder, scheme="kfac")
        return store.energies()

    on_cpu, on_gpu, _ = twice(job, compositions=True)
    for name, energy in on_cpu.items():
        assert torch.allclose(energy, on_gpu[name], rtol=0, atol=1e-5 * float(energy.max())), name
