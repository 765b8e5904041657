"""How fast vLLM serves the result: tokens a second of compressed models in both forms, against the dense one.

    make test-vllm  # once: installs vLLM beside unirank
    .venv-vllm/bin/python -m bench.pipeline.bench_vllm --json vllm.json --markdown docs/vllm-speed.md

Uniform ranks at every removed fraction, on SmolLM2-135M's shape and on a wide Llama (hidden 2048); weights are random,
for speed does not depend on them. Factors and pivoted have equally many parameters. Prefill: prompts of so many tokens,
one token back. Decode: short prompts, many tokens back; so many requests at a time. Every engine is a process of its
own with vLLM's defaults (torch.compile among them), whose first answer must be that of transformers. `allowed`: see
bench_inference. What the JSON file has already is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.pipeline.bench_inference import MODELS, compressed_model, dense_model
from bench.support.record import write_result
from unirank.disk.files import write_json, write_text
from unirank.models.low_rank import LowRankLinear, count_parameters
from unirank.models.quantizer import UniRankConfig
from unirank.provenance import meta as provenance
from unirank.types import FORMS

LOADS = ("prefill", "decode")
# A sum in another order, over logits of a few units.
AGREES = {"float32": 1e-3, "bfloat16": 0.3}


def write_model(folder: Path, name: str, form: str, remove: float, dtype: str) -> float:
    """Save the model that a job serves; the ratio of parameters that a token passes through, dense over this."""
    model: Any = dense_model(name, torch.device("cpu"), getattr(torch, dtype))
    whole = count_parameters(model)  # the head is the embedding
    if form != "dense":
        chosen: Any = form
        model, _ = compressed_model(model, remove, ranks_of=chosen, form=chosen)
        ranks = {path: part.rank for path, part in model.named_modules() if isinstance(part, LowRankLinear)}
        model.config.quantization_config = UniRankConfig(ranks, form=chosen)
    model.save_pretrained(folder)
    return whole / count_parameters(model)


def serve(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Seconds of every load at every number of requests, in this process."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    wanted = _logprobs(folder, job)
    engine = LLM(
        str(folder),
        dtype=job["dtype"],
        max_model_len=job["prompt"] + job["answer"] + 16,
        max_num_seqs=max(job["requests"]),
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        enforce_eager=job["eager"],
        distributed_executor_backend="uni",
    )
    vocabulary = MODELS[job["model"]]["vocab_size"]
    draw = torch.Generator().manual_seed(1)

    def run(count: int, length: int, answer: int) -> float:
        prompts: Any = [
            {"prompt_token_ids": torch.randint(2, vocabulary, (length,), generator=draw).tolist()} for _ in range(count)
        ]
        options = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        engine.generate(prompts, options, use_tqdm=False)
        return time.perf_counter() - start

    check: Any = [{"prompt_token_ids": list(range(2, 18))}]
    (answer,) = engine.generate(
        check, SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False), use_tqdm=False
    )
    said = [at[token].logprob for token, at in zip(range(3, 18), answer.prompt_logprobs[1:], strict=True)]
    off = max(abs(a - b) for a, b in zip(said, wanted, strict=True))
    if off > AGREES[job["dtype"]]:
        raise SystemExit(f"{job}: log-probabilities differ from those of transformers by {off}.")

    seconds = {}
    for count in job["requests"]:
        for load in LOADS:
            sizes = (job["prompt"], 1) if load == "prefill" else (8, job["answer"])
            run(count, *sizes)
            seconds[f"{load} {count}"] = statistics.median(run(count, *sizes) for _ in range(job["repeats"]))
    return {"seconds": seconds, "off": off}


def _logprobs(folder: Path, job: dict[str, Any]) -> list[float]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=job["dtype"], device_map="cpu")
    tokens = torch.arange(2, 18)[None]
    with torch.no_grad():
        logprobs = model(tokens).logits[0, :-1].float().log_softmax(-1)
    return logprobs.gather(1, tokens[0, 1:, None])[:, 0].tolist()


def cells(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every engine, the dense one of a model first."""
    found = []
    for model in arguments.models:
        found.append({"model": model, "form": "dense", "remove": 0.0})
        found += [{"model": model, "form": form, "remove": r} for r in arguments.remove for form in FORMS]
    return found


def rows_of(job: dict[str, Any], record: dict[str, Any], dense: dict[str, float]) -> list[dict[str, Any]]:
    """A row for every load and number of requests."""
    rows = []
    for key, seconds in record["seconds"].items():
        load, count = key.split()
        tokens = int(count) * (job["prompt"] if load == "prefill" else job["answer"])
        ratio = dense.get(key, seconds) / seconds
        rows.append(
            {name: job[name] for name in ("model", "form", "remove", "dtype")}
            | {"load": load, "requests": int(count), "tokens_per_second": tokens / seconds, "ratio": ratio}
            | {"allowed": record["allowed"], "seconds": seconds, "off": record["off"]}
        )
    return rows


def markdown(rows: Sequence[dict[str, Any]], meta: dict[str, Any]) -> str:
    """The page."""
    lines = [
        "# Speed in vLLM",
        "",
        f"Made by `python -m bench.pipeline.bench_vllm`, do not edit. {rows[0]['dtype']}, {meta['device']}, "
        f"{meta['threads']} threads, torch {meta['versions']['torch']}; uniform ranks, random weights. Tokens a "
        f"second, and the ratio to the dense model in the same run. Prefill: prompts of {meta['prompt']} tokens, one "
        f"token back. Decode: {meta['answer']} tokens back. Allowed: the ratio of the parameters that a token "
        "passes through.",
        "",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        for load in LOADS:
            mine = [row for row in rows if row["model"] == model and row["load"] == load]
            counts = sorted({row["requests"] for row in mine})
            names = [f"{count} request{'s' * (count > 1)}" for count in counts]
            lines += [f"## {model}, {load}", "", f"| removed | form | {' | '.join(names)} | allowed |"]
            lines.append("|---" * (len(counts) + 3) + "|")
            for key in dict.fromkeys((row["remove"], row["form"]) for row in mine):
                group = {row["requests"]: row for row in mine if (row["remove"], row["form"]) == key}
                shown = [f"{group[n]['tokens_per_second']:,.0f} ({group[n]['ratio']:.2f}x)" for n in counts]
                lines.append(f"| {key[0]:.0%} | {key[1]} | {' | '.join(shown)} | {group[counts[0]]['allowed']:.2f}x |")
            lines.append("")
    return "\n".join(lines)


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """One engine, in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "record.json"
        program = [sys.executable, "-m", "bench.pipeline.bench_vllm", "--job", json.dumps(job), "--json", str(out)]
        subprocess.run(program, check=True)
        return json.loads(out.read_text())


def main(argv: Sequence[str] | None = None, measured: Callable[[dict[str, Any]], dict[str, Any]] = measure) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["wide", "smollm2-135m"])
    parser.add_argument("--remove", nargs="+", type=float, default=[0.2, 0.4, 0.6])
    parser.add_argument("--requests", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt, prefill")
    parser.add_argument("--answer", type=int, default=32, help="tokens of an answer, decode")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=AGREES, default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="what the installed vLLM is built for")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--json", type=Path, help="write rows and meta to this file; resumes from it")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.job is not None:
        with tempfile.TemporaryDirectory() as scratch:
            job, folder = arguments.job, Path(scratch)
            allowed = write_model(folder, job["model"], job["form"], job["remove"], job["dtype"])
            write_json(arguments.json, serve(job, folder) | {"allowed": allowed})
        return 0
    names = ("requests", "prompt", "answer", "repeats", "dtype", "eager")
    options = {name: getattr(arguments, name) for name in names}
    kept: Path | None = arguments.json
    rows: list[dict[str, Any]] = json.loads(kept.read_text())["rows"] if kept is not None and kept.is_file() else []
    for cell in cells(arguments):
        key = tuple(cell.values())
        if any((row["model"], row["form"], row["remove"]) == key for row in rows):
            continue
        dense = {
            f"{row['load']} {row['requests']}": row["seconds"]
            for row in rows
            if row["model"] == cell["model"] and row["form"] == "dense"
        }
        job = cell | options
        rows += rows_of(job, measured(job), dense)
        result = {"device": torch.device(arguments.device)} | options
        write_result(kept, rows, **result)
        for row in rows[-len(LOADS) * len(arguments.requests) :]:
            print({name: value for name, value in row.items() if name not in ("allowed", "off")}, flush=True)
    if arguments.markdown is not None:
        about = provenance(torch.device(arguments.device), command=sys.argv, **options)
        write_text(arguments.markdown, markdown(rows, about))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
