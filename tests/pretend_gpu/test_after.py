"""What goes on from a model or a checkpoint, on the pretend GPU: all figures are the CPU's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import unirank
from tests.support.command_line import Run
from tests.support.pretend import pretend_gpu
from unirank.models.low_rank import stored_tensors
from unirank.serving.members import Share, layout, member
from unirank.types import FORMS


def test_evaluate_generate_fuse_and_densify(twice) -> None:
    def job(device: str, folder: Path) -> list[Any]:
        opened = unirank.open_compressed(twice.compressed(device, folder), device=device)
        found: list[Any] = [twice.perplexity(opened.model)]
        found.append(unirank.generate(opened.model, twice.load("cpu").tokenizer, "w1 w2 w3", tokens=4))
        unirank.fuse(opened.model)
        found.append(twice.perplexity(opened.model))
        plain = unirank.densify(unirank.open_compressed(folder / "small", device=device).model)
        assert {tensor.device.type for tensor in plain.state_dict().values()} == {device}
        found.append(twice.perplexity(plain))
        return found

    on_cpu, on_gpu, _ = twice(job)
    assert on_cpu == on_gpu
    assert on_gpu[2] == pytest.approx(on_gpu[0], rel=1e-4)


def test_quantize(twice) -> None:
    def job(device: str, folder: Path) -> tuple[float, float]:
        small = unirank.quantize(twice.compressed(device, folder), 8, device=device)
        out = small.save(folder / "bits")
        return twice.perplexity(small.model), twice.perplexity(unirank.open_compressed(out, device=device).model)

    on_cpu, on_gpu, _ = twice(job)
    assert on_cpu == on_gpu


def test_finetune_on_the_device_and_resume(twice) -> None:
    text = twice.folder / "few.txt"
    text.write_text(" ".join(twice.text.read_text().split()[:400]))
    settings = unirank.Finetune(steps=2, batch=2, window=16, rank=2, held_out=0.1, distill=0.5)

    def job(device: str, folder: Path) -> tuple[float, int]:
        small, more = twice.compressed(device, folder), {"work": folder / "work", "against": str(twice.dense)}
        tuned = unirank.finetune(small, str(text), settings, device=device, **more)
        again = unirank.finetune(small, str(text), settings, device=device, **more)
        assert twice.perplexity(tuned.model) == twice.perplexity(again.model)
        return twice.perplexity(tuned.model), sum(tuned.plan.ranks[name] != "dense" for name in tuned.plan.ranks)

    on_cpu, on_gpu, _ = twice(job)
    assert on_cpu == on_gpu


def test_heal_a_checkpoint_layer_by_layer_and_go_on_after_an_interruption(twice) -> None:
    settings = unirank.Heal(passes=1, batch=4)

    def job(device: str, folder: Path) -> float:
        small = twice.compressed(device, folder)
        against = twice.load(device, stream=True)

        def stop(stage: str, done: int, total: int) -> None:
            if stage == "heal" and done == total - 1:
                raise KeyboardInterrupt

        work = {"work": folder / "work", "device": device}
        with pytest.raises(KeyboardInterrupt):
            unirank.heal(small, twice.calibration, settings, against=against, progress=stop, **work)
        healed = unirank.heal(small, twice.calibration, settings, against=against, **work)
        return twice.perplexity(unirank.open_compressed(healed.save(folder / "healed"), device=device).model)

    on_cpu, on_gpu, _ = twice(job)
    assert on_cpu == on_gpu


def test_curve_and_target(twice) -> None:
    def job(device: str, folder: Path) -> tuple[list[float], str]:
        asked: dict[str, Any] = {"calibration": twice.calibration, "device": device, "place": folder / "curve"}
        curve = unirank.curve(
            twice.dense, presets=("unirank",), remove=(0.2, 0.4), more=0, texts=str(twice.text), window=16, limit=3,
            **asked,
        )  # fmt: skip
        target = unirank.Target(max_perplexity_increase=0.5, text=str(twice.text), window=16, limit=3, evaluations=1)
        result = unirank.auto(twice.dense, target, presets=("unirank",), **asked)
        return [point.evaluations[0].perplexity for point in curve.points], result.preset

    on_cpu, on_gpu, _ = twice(job)
    assert on_cpu == on_gpu
    assert len(on_gpu[0]) == 2


def test_diagnose(twice) -> None:
    def job(device: str, folder: Path) -> str:
        loaded, store = twice.analyzed(device, folder)
        return repr(unirank.diagnose(store, loaded, text=str(twice.text), windows=2, permutations=20))

    on_cpu, on_gpu, _ = twice(job)
    assert on_cpu == on_gpu


def test_dry_run_asks_the_gpu_for_its_memory(twice) -> None:
    with pretend_gpu() as journal:
        needs = unirank.dry_run(twice.dense, twice.folder / "store", calibration=twice.calibration)
    assert needs.memory > 0
    assert journal.count("synchronize") > 0


def test_commands_take_the_gpu_by_themselves(twice, run_unirank: Run) -> None:
    out, asked = twice.folder / "out", ("--calib", twice.text, "--windows", "4", "--window", "16")
    with pretend_gpu() as journal:
        code, _, stderr = run_unirank("compress", twice.dense, "-r", "0.3", "-o", out, *asked)
        assert code == 0, stderr
        code, stdout, stderr = run_unirank("eval", out, "--text", twice.text, "--window", "16", "--limit", "2")
        assert code == 0, stderr
    assert "perplexity" in stdout
    assert journal.count("to device") > 0
    assert unirank.open_compressed(out, device="cpu").plan.used > 0


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_a_layer_of_an_engine_multiplies_on_the_device(form: Any) -> None:
    """What is ours in vLLM's plugin: the members of a fused layer, one of low rank and one dense.

    vLLM itself runs on a GPU by its own platform, kernels and memory, which no tensor of another class can enter.
    """
    left, right, weight, x = (torch.randn(*shape) for shape in ((24, 6), (6, 16), (8, 16), (5, 16)))
    found = []
    for device in ("cpu", "cuda"):
        with pretend_gpu():
            pieces = stored_tensors(left.to(device), right.to(device), form)
            pieces["weight"] = torch.tensor([6])
            low = member("q", 6, pieces, Share(24, 16))
            dense = member("k", None, {"weight": weight.to(device)}, Share(8, 16))
            where, own = layout((low, dense)), x.to(device)
            assert low.up is not None
            h = torch.cat([own @ each.down.dense(torch.float32).T for each in (low, dense)], 1)
            ((first, count),) = where.inner
            y = torch.cat([h, h[:, first : first + count] @ low.up.dense(torch.float32).T], 1)
            found.append(y[:, where.gather].cpu())
    assert torch.equal(*found)
    assert torch.allclose(found[0], x @ torch.cat([left @ right, weight]).T, atol=1e-4)
