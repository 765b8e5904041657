"""One step of bench_bytes.py in a process of its own: a checkpoint, a row of figures, or all speeds.

    python -m bench.quality.bytes_job '{"step": "row", ...}' OUT.json

Run by bench_bytes.py, which says what the keys mean.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model

import unirank
from bench.pipeline.bench_inference import cache_of, decode, prefill
from unirank.compression.card import PLAN_FILE
from unirank.disk.files import staged_directory, write_json
from unirank.models.bits import check_bits
from unirank.models.quantizing import empty, quantized_of
from unirank.planning.ranks import fitting_multiple
from unirank.recipes import preset
from unirank.types import LinearSpec


def checkpoint(job: dict[str, Any]) -> dict[str, Any]:
    """`place` gets the model at `remove`, in float32; where it is already, it is looked at."""
    place, remove = Path(job["place"]), job["remove"]
    recipe = preset(job["preset"])
    start = time.perf_counter()
    if not (place / PLAN_FILE).is_file():
        calibration = unirank.Calibration(**job["calibration"])
        loaded = unirank.load(job["model"], dtype="float32", device="cpu")
        store = unirank.analyze(loaded, job["store"], scheme=recipe.scheme, calibration=calibration)
        workbench = unirank.make_workbench(loaded, store, text=str(calibration.text))
        plan = unirank.plan(store, remove, preset=job["preset"], workbench=workbench)
        unirank.apply(loaded, store, plan, refine=recipe.refine, windows=workbench.windows).save(place)
    plan = unirank.open_compressed(place, device="cpu").plan
    if plan.remove != remove:
        sys.exit(f"{place} has {plan.remove} removed, not {remove}")
    linears = [LinearSpec(name, 0, "mlp", name, *shape) for name, shape in plan.shapes.items()]
    multiple = fitting_multiple(linears, remove, recipe.multiple_of, form=recipe.form)
    asked = (recipe.scheme, recipe.allocator, recipe.form, multiple)
    got = (plan.scheme, plan.allocator, plan.form, plan.settings["multiple_of"])
    if got != asked:
        sys.exit(f"{place} was made by {got}, and the preset {job['preset']} is {asked}: take another folder")
    return {"seconds": time.perf_counter() - start, "used": plan.used, "budget": plan.budget, "total": plan.total}


def row(job: dict[str, Any]) -> dict[str, Any]:
    """Write the model of this row to `place`, open it from there, and measure bytes and perplexity.

    Keys of the job: `bits`, where 32 and 16 are dtypes, and 8 and 4 quantised weights beside bfloat16; `source`, a
    checkpoint of `checkpoint`, or "" for the dense model; `dense`, where that is in bfloat16, for 8 and 4 bits of it.
    """
    place, bits = Path(job["place"]), job["bits"]
    if not place.is_dir():
        _write(job, place, bits, "float32" if bits == 32 else "bfloat16")
    model, tokenizer = opened(place, job)
    record: dict[str, Any] = {
        "disk_bytes": sum(path.stat().st_size for path in place.glob("*.safetensors")),
        "memory_bytes": memory_bytes(model),
    }
    for text in job["texts"]:
        report = unirank.evaluate(model, tokenizer, text=text, window=job["window"], limit=job["limit"])
        name = "builtin-held-out" if text == "builtin-held-out" else "file"
        record |= {f"{name}_text": report.text, f"{name}_perplexity": report.perplexity}
    return record


def _write(job: dict[str, Any], place: Path, bits: int, dtype: str) -> None:
    if job["source"]:
        compressed = unirank.open_compressed(job["source"], dtype=dtype, device="cpu")
        (compressed if bits >= 16 else unirank.quantize(compressed, bits=bits)).save(place)
        return
    dense = unirank.load(job["model"] if bits >= 16 else job["dense"], dtype=dtype, device="cpu")
    with staged_directory(place) as folder:
        if bits >= 16:
            dense.model.save_pretrained(folder)
            dense.tokenizer.save_pretrained(folder)
        else:
            _replace(dense, bits, quantized_of)
            save_model(dense.model, str(folder / "model.safetensors"))


def opened(place: Path, job: dict[str, Any]) -> tuple[Any, Any]:
    """Model and tokenizer in `place`, in the dtype that it has there."""
    if job["source"]:
        compressed = unirank.open_compressed(place, device="cpu")
        return compressed.model.eval(), compressed.tokenizer
    dense = unirank.load(str(place if job["bits"] >= 16 else job["dense"]), device="cpu")
    if job["bits"] < 16:
        _replace(dense, job["bits"], empty)
        load_model(dense.model, place / "model.safetensors")
    return dense.model.eval(), dense.tokenizer


def _replace(dense: unirank.LoadedModel, bits: int, make: Any) -> None:
    """What `unirank.quantize` does to the linears of a compressed model, to those that it would compress."""
    for spec in dense.linears:
        linear = dense.model.get_submodule(spec.name)
        dense.model.set_submodule(spec.name, make(linear, *check_bits(bits, None)))


def memory_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, tied ones once."""
    found = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in found.values())


def speed(job: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second of every row, turn by turn, so that a busy machine hurts all alike."""
    generator = torch.Generator().manual_seed(0)
    models = {name: opened(Path(one["place"]), one)[0] for name, one in job["rows"].items()}
    vocabulary = min(model.get_input_embeddings().num_embeddings for model in models.values())
    ids = torch.randint(2, vocabulary, (1, job["prompt"]), generator=generator)
    for name, model in models.items():
        check(model, ids[:, :16], name)
    times: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in models}
    for turn in range(job["repeats"] + 1):  # the first warms up
        for name, model in models.items():
            for phase, run in (("prefill", prefill(model, ids)), ("decode", decode(model, ids, job["steps"]))):
                start = time.perf_counter()
                run()
                if turn:
                    times[name][phase].append(time.perf_counter() - start)
    counts = {"prefill": job["prompt"], "decode": job["steps"]}
    rates = {
        name: {phase: counts[phase] / statistics.median(seconds) for phase, seconds in phases.items()}
        for name, phases in times.items()
    }
    return {"rates": rates, "threads": torch.get_num_threads(), "prompt": job["prompt"]} | {
        key: job[key] for key in ("steps", "repeats")
    }


@torch.no_grad()
def check(model: Any, ids: torch.Tensor, name: str) -> None:
    """Decoding with the cache gives the logits of the whole; in float32, for bfloat16's own errors can be large."""
    dtype = model.dtype
    model.float()
    whole = model(ids).logits[:, -1]
    first = model(ids[:, :-1], use_cache=True)
    last = model(ids[:, -1:], **cache_of(model, first)).logits[:, -1]
    off = float((last - whole).norm() / whole.norm())
    model.to(dtype)
    if not off < 1e-3:
        sys.exit(f"{name}: decoding differs from the whole by {off:.1%}")


STEPS = {"checkpoint": checkpoint, "row": row, "speed": speed}


def main() -> None:
    job, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    write_json(out, STEPS[job["step"]](job))


if __name__ == "__main__":
    main()
