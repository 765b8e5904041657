"""A model larger than the memory it gets: streamed compression against what `--dry-run` said about it.

    python -m bench.pipeline.bench_large --json large.json
    python -m bench.pipeline.bench_large --layers 2 --heal --json healing.json

Writes a random bfloat16 Llama of Llama 3.2 3B's shape (3.2 billion parameters, 6.4 GB) shard by shard, asks
`unirank compress --stream --dry-run` what it will need, runs the same command without it, and counts the parameters of
the checkpoint's files. With --heal also `unirank heal --stream`, one pass. Peaks are the kernel's, of the process that
ran. With --layers the model has only so many: one layer is in memory at a time, so the peak is that of the whole model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from bench.support import synthetic
from bench.support.record import write_result
from bench.support.timing import device_of

SHAPES: dict[str, dict[str, Any]] = {
    "3b": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
    },
}
SHARD = 1 << 30  # bytes


def write_model(shape: str, layers: int | None, folder: Path) -> int:
    """A checkpoint of random weights, one shard in memory at a time; returns its parameters."""
    sizes: dict[str, Any] = SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers})
    config = LlamaConfig(**sizes, max_position_embeddings=4096, tie_word_embeddings=True, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}
    shards: list[dict[str, torch.Tensor]] = [{}]
    files: list[str] = []

    def flush() -> None:
        name = f"model-{len(files):05d}.safetensors"
        save_file(shards[0], folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(shards[0], name))
        files.append(name)
        shards[0] = {}

    total = 0
    for name, parameter in skeleton.named_parameters():
        weight = torch.ones(parameter.shape) if parameter.ndim == 1 else torch.empty(parameter.shape)
        if parameter.ndim > 1:
            weight.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
        shards[0][name] = weight.bfloat16()
        total += parameter.numel()
        if sum(tensor.nbytes for tensor in shards[0].values()) > SHARD:
            flush()
    flush()
    record = {"metadata": {"total_size": 2 * total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(record))
    config.save_pretrained(folder)
    synthetic.tokenizer().save_pretrained(folder)
    return total


def timed(arguments: Sequence[str]) -> tuple[dict[str, Any], float, int]:
    """The JSON that a command printed, its seconds and the peak of its resident memory in bytes."""
    with tempfile.TemporaryFile("w+") as printed:
        started = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", "unirank.cli", *arguments, "--json"], stdout=printed)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise SystemExit(f"{' '.join(arguments)} ended with {process.returncode}")
        printed.seek(0)
        return json.load(printed), seconds, usage.ru_maxrss * 1024


def parameters(folder: Path) -> int:
    """Of a checkpoint's files, without the mark of one number that low-rank layers have."""
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            sizes = [torch.Size(tensors.get_slice(name).get_shape()).numel() for name in tensors.keys()]  # noqa: SIM118
            total += sum(size for size in sizes if size > 1)
    return total


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="3b")
    parser.add_argument("--quick", action="store_true", help="the tiny shape, to see that it runs")
    parser.add_argument("--remove", type=float, default=0.3)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--layers", type=int, help="decoder layers, where fewer than the shape has will do")
    parser.add_argument("--heal", action="store_true", help="then heal the result, one pass")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where all of it runs; default: cpu")
    parser.add_argument("--work", type=Path, help="keep model, store and checkpoint here; resumes")
    parser.add_argument("--json", type=Path, help="write rows and meta to this file")
    arguments = parser.parse_args(argv)
    device = device_of(arguments)
    shape = "tiny" if arguments.quick else arguments.shape
    with tempfile.TemporaryDirectory() as scratch:
        work = (arguments.work or Path(scratch)).absolute()
        model, out = work / "model", work / "small"
        model.mkdir(parents=True, exist_ok=True)
        total = parameters(model) if (model / "config.json").is_file() else write_model(shape, arguments.layers, model)
        text = synthetic.text(work)
        windows = ["--windows", str(arguments.windows), "--window", str(arguments.window), "--batch", "4"]
        command = [
            "compress",
            str(model),
            "-r",
            str(arguments.remove),
            "-o",
            str(out),
            "--calib",
            str(text),
            "--stream",
        ]
        command += [*windows, "--device", device.type, "--overwrite"]
        said, _, _ = timed([*command, "--dry-run"])
        _, seconds, peak = timed(command)
        report = json.loads((out / "provenance.json").read_text())["report"]
        assert (total, parameters(out)) == (report["model_before"], report["model_after"])
        row = {"op": "compress --stream", "shape": shape, "dtype": "bfloat16", "parameters": total}
        row |= {"remove": arguments.remove, "windows": arguments.windows, "window": arguments.window}
        row |= {"baseline": "--dry-run", "ratio": said["seconds"] / seconds, "seconds": seconds}
        row |= {"baseline_seconds": said["seconds"], "gbs": None, "gflops": None}
        row |= {"peak_bytes": peak, "said_bytes": said["memory"], "bytes_ratio": said["memory"] / peak}
        rows = [row]
        if arguments.heal:
            command = ["heal", str(out), "-o", str(work / "healed"), "--against", str(model), "--calib", str(text)]
            command += ["--stream", *windows[:4], "--passes", "1", "--device", device.type, "--overwrite"]
            healed, seconds, peak = timed(command)
            assert parameters(work / "healed") == report["model_after"]
            layers = healed["training"]["layers"]
            rows.append(row | {"op": "heal --stream", "seconds": seconds, "peak_bytes": peak, "baseline": ""})
            rows[-1] |= {"baseline_seconds": None, "ratio": None, "said_bytes": None, "bytes_ratio": None}
            rows[-1] |= {"layers": len(layers), "best": [layer["best"] for layer in layers]}
    for found in rows:
        Console().print(found)
    write_result(arguments.json, rows, device=device, seed=0)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
