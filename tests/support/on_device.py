"""The whole path on a device, beside the same on the CPU: what tests/gpu runs on a GPU, and tests/promises on the CPU.

Each check takes a `Bench`, raises AssertionError, and may return figures. `CHECKS` has them by name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import unirank
from tests.support.tiny import build
from unirank.analysis import fill_store
from unirank.analysis.store import AnalysisStore
from unirank.types import LoadedModel

Figures: TypeAlias = "dict[str, float]"
CPU = torch.device("cpu")
# Float32 models: products on two devices differ by some ulp, which grow through a few layers. Energies are held to the
# largest of their matrix, and perplexity to the same ranks (**choice**: a hundred times what rounding explains).
ENERGY, NLL = 1e-4, 1e-3
# What 16-bit weights and activations lose beside that.
SHORT = {torch.bfloat16: 3e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Bench:
    """Where checks run, on what text, and a folder for what they write."""

    device: torch.device
    folder: Path
    tokenizer: PreTrainedTokenizerFast
    text: Path

    def place(self, name: str) -> Path:
        """A fresh path."""
        return self.folder / f"{name}-{len(list(self.folder.iterdir()))}"

    def calibration(self, **more: Any) -> unirank.Calibration:
        return unirank.Calibration(**({"text": str(self.text), "windows": 6, "window": 24, "batch": 2} | more))

    def model(self, device: torch.device, name: str = "llama", dtype: torch.dtype = torch.float32) -> LoadedModel:
        return unirank.describe(build(name).to(device, dtype), self.tokenizer, source=f"tiny-{name}")

    def analyzed(self, device: torch.device, **how: Any) -> tuple[LoadedModel, AnalysisStore]:
        """A fresh model on `device` and its store; `how`: arguments of `model` and `analyze`, and those of Calibration
        as `calibration`."""
        built = {key: how.pop(key) for key in ("name", "dtype") if key in how}
        loaded = self.model(device, **built)
        chosen = self.calibration(**how.pop("calibration", {}))
        return loaded, unirank.analyze(loaded, self.place("store"), calibration=chosen, **how)

    def nll(self, model: Any) -> float:
        return unirank.evaluate(model, self.tokenizer, text=str(self.text), window=24, limit=3).nll


@dataclass(frozen=True)
class Difference:
    """How far two analyses are apart: energies, of each matrix's largest; and ranks at 30 % removed that are equal."""

    energy: float
    equal_ranks: float


def difference(one: AnalysisStore, other: AnalysisStore) -> Difference:
    a, b = one.energies(), other.energies()
    worst = max(float((a[name] - b[name]).abs().max() / a[name].max().clamp_min(1e-300)) for name in a)
    ranks, others = (dict(unirank.plan(store, 0.3).ranks) for store in (one, other))
    return Difference(worst, sum(ranks[name] == others[name] for name in ranks) / len(ranks))


def same_analysis(bench: Bench, *, energy: float = ENERGY, **how: Any) -> Figures:
    """Stores of both devices agree, and with the CPU's ranks the compressed models too."""
    found = []
    (here, store), (there, reference) = bench.analyzed(bench.device, **how), bench.analyzed(CPU, **how)
    apart = difference(reference, store)
    assert apart.energy <= energy, apart
    ranks = unirank.plan(reference, 0.3).ranks
    for loaded, own in ((here, store), (there, reference)):
        found.append(bench.nll(unirank.apply(loaded, own, unirank.plan(own, ranks=dict(ranks))).model))
    assert abs(found[0] - found[1]) <= max(NLL, energy) * abs(found[1]), found
    return {"energy": apart.energy, "equal_ranks": apart.equal_ranks, "nll": found[0], "nll_cpu": found[1]}


def saved(bench: Bench) -> None:
    """analyze, plan, apply, save; opened again on the device it is the same model, to the bit."""
    loaded, store = bench.analyzed(bench.device)
    small = unirank.apply(loaded, store, unirank.plan(store, 0.3))
    out = small.save(bench.place("out"))
    again = AutoModelForCausalLM.from_pretrained(out, device_map=str(bench.device)).eval()
    opened = unirank.open_compressed(out, device=str(bench.device))
    want = small.model.state_dict()
    for model in (again, opened.model):
        assert next(model.parameters()).device.type == bench.device.type
        got = model.state_dict()
        assert all(torch.equal(want[name], got[name]) for name in want)
    assert bench.nll(again) == bench.nll(opened.model) == bench.nll(small.model)


def second_pass(bench: Bench) -> Figures:
    """The second pass ends where it ends on the CPU."""
    found = []
    for device in (CPU, bench.device):
        loaded, store = bench.analyzed(device)
        windows = unirank.make_workbench(loaded, store, text=str(bench.text)).windows
        plan = unirank.plan(store, 0.3, allocator="uniform")
        refined = unirank.apply(loaded, store, plan, refine=unirank.Refine(centred=True), windows=windows)
        found.append(bench.nll(refined.model))
    assert abs(found[0] - found[1]) <= 10 * NLL * found[0], found
    return {"nll": found[1], "nll_cpu": found[0]}


def measured(bench: Bench) -> None:
    """Rules that measure the model, and the one that needs gradients, choose on the device."""
    loaded, store = bench.analyzed(bench.device, calibration={"gradient_windows": 2})
    work = unirank.make_workbench(loaded, store, text=str(bench.text))
    for name, options in (("lems", {"tokens": 16}), ("swift", None), ("zs-svd", None)):
        plan = unirank.plan(store, 0.3, allocator=name, workbench=work, options=options)
        assert plan.used <= plan.budget


def _on_disk(bench: Bench, device: torch.device) -> tuple[Path, Path]:
    """The dense checkpoint, and one with 40 % removed, analysed on `device`."""
    dense, out = bench.place("dense"), bench.place("small")
    build("llama").save_pretrained(dense)
    bench.tokenizer.save_pretrained(dense)
    compressed = unirank.compress(dense, 0.4, calibration=bench.calibration(), device=str(device))
    return dense, compressed.save(out)


def healed(bench: Bench) -> Figures:
    """Healing on the device brings the compressed model nearer to the dense one, about as far as on the CPU."""
    dense, small = _on_disk(bench, CPU)
    errors = []
    for device in (CPU, bench.device):
        settings = unirank.Heal(passes=2, batch=4)
        more = {"work": bench.place("work"), "against": dense, "device": str(device)}
        done = unirank.heal(small, bench.calibration(windows=8), settings, **more)
        assert done.training is not None
        layers = done.training["layers"]
        assert all(layer["after"] <= layer["before"] for layer in layers), layers
        errors.append(sum(layer["after"] for layer in layers))
    assert abs(errors[0] - errors[1]) <= 0.05 * errors[0], errors
    return {"error": errors[1], "error_cpu": errors[0]}


def finetuned(bench: Bench) -> Figures:
    """Fine-tuning on the device lowers the loss, about as far as on the CPU, and keeps the ranks."""
    _, small = _on_disk(bench, CPU)
    found = []
    for device in (CPU, bench.device):
        settings = unirank.Finetune(steps=6, batch=4, window=24, lr=5e-3, rank=3, precision="float32", held_out=0.1)
        tuned = unirank.finetune(small, str(bench.text), settings, work=bench.place("work"), device=str(device))
        assert dict(tuned.plan.ranks) == dict(unirank.open_compressed(small).plan.ranks)
        found.append(bench.nll(tuned.model))
    assert abs(found[0] - found[1]) <= 0.02 * found[0], found
    return {"nll": found[1], "nll_cpu": found[0]}


class Ended(BaseException):
    """Ends a run where a check wants it; nothing catches it."""


def resumed(bench: Bench) -> None:
    """A run that was ended in its second layer goes on to the energies of one that was not, to the bit."""
    _, undisturbed = bench.analyzed(bench.device)
    place, solve = bench.place("resumed"), fill_store.decompose_layer
    seen: list[int] = []

    def ending(loaded: Any, stats: Any, *rest: Any, **more: Any) -> Any:
        seen.append(stats.layer)
        if stats.layer == 1:
            raise Ended
        return solve(loaded, stats, *rest, **more)

    fill_store.decompose_layer = ending
    try:
        with contextlib.suppress(Ended):
            unirank.analyze(bench.model(bench.device), place, calibration=bench.calibration())
    finally:
        fill_store.decompose_layer = solve
    assert seen[:2] == [0, 1]
    again = unirank.analyze(bench.model(bench.device), place, calibration=bench.calibration())
    _same_bits(undisturbed, again)


def _same_bits(one: AnalysisStore, other: AnalysisStore) -> None:
    a, b = one.energies(), other.energies()
    assert all(torch.equal(a[name], b[name]) for name in a)


def hidden_in_files(bench: Bench) -> None:
    """Hidden states in mapped files change no bit, and two runs give the same bits."""
    _, whole = bench.analyzed(bench.device)
    _, mapped = bench.analyzed(bench.device, hidden_limit=0)
    _same_bits(whole, mapped)


def streamed(bench: Bench) -> None:
    """Layers that are read one at a time give the bits of the whole model."""
    dense = bench.place("dense")
    build("llama").save_pretrained(dense)
    bench.tokenizer.save_pretrained(dense)
    stores = []
    for stream in (False, True):
        loaded = unirank.load(dense, device=str(bench.device), stream=stream)
        stores.append(unirank.analyze(loaded, bench.place("store"), calibration=bench.calibration()))
    _same_bits(*stores)


def dry_run(bench: Bench) -> None:
    """The estimate works on the device, and names it."""
    dense = bench.place("dense")
    build("llama").save_pretrained(dense)
    bench.tokenizer.save_pretrained(dense)
    needs = unirank.dry_run(dense, bench.place("store"), calibration=bench.calibration(), device=str(bench.device))
    assert needs.memory > 0
    assert needs.seconds > 0


CHECKS: dict[str, Callable[[Bench], Figures | None]] = {
    **{name: partial(same_analysis, name=name) for name in ("llama", "gemma3", "gpt-neox", "gpt2", "opt")},
    **{
        f"scheme {name}": partial(same_analysis, scheme=name, energy=10 * ENERGY)
        for name in ("svd", "asvd", "awsvd", "fwsvd", "afm", "kfac")
    },
    **{str(kind).removeprefix("torch."): partial(same_analysis, dtype=kind, energy=SHORT[kind]) for kind in SHORT},
    "saved and opened": saved,
    "second pass": second_pass,
    "measuring allocators": measured,
    "healed": healed,
    "finetuned": finetuned,
    "resumed": resumed,
    "hidden states in files": hidden_in_files,
    "streamed": streamed,
    "dry run": dry_run,
}
