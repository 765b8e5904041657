"""Rank-preserving fine-tuning against its baseline: LoRA on the product, merge, truncate again.

    python -m bench.pipeline.bench_finetune --json finetune.json --markdown docs/finetuning-results.md

SmolLM2-135M, compressed by `whiten` and UniRank's ranks; each pipeline then trains on the same windows of WikiText-2's
validation text, for the same steps, with the same seed and as many trainable parameters. Perplexity on the first
windows of its test text, and on Python's documentation, so that forgetting shows. Rows that are in the JSON file
already are not run again, so an interrupted benchmark resumes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import set_seed

import unirank
from bench.support.record import write_result
from unirank.disk.files import write_text
from unirank.display import display
from unirank.finetuning.adapters import adapted, attach, merge, set_state, train_only
from unirank.finetuning.loop import run
from unirank.finetuning.settings import Schedule
from unirank.finetuning.tuning import loop_of, split_windows
from unirank.models.embedded import NAME
from unirank.models.low_rank import LowRankLinear, make_low_rank
from unirank.progress import OnProgress
from unirank.text.training_windows import pack, read_corpus
from unirank.text.windows import BUILTIN_HELD_OUT
from unirank.types import DENSE

DEFAULT_DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "wikitext2"
# pipeline, schedule, share of distillation; the comparison first, so that an interrupted benchmark has it
VARIANTS: tuple[tuple[str, Schedule, float], ...] = (
    ("rank-preserving", "joint", 0.0),
    ("retruncate", "joint", 0.0),
    ("rank-preserving", "left-then-right", 0.0),
    ("rank-preserving", "joint", 0.5),
)


@dataclasses.dataclass(frozen=True)
class Job:
    """One training run and what it stands on."""

    fresh: Callable[[], unirank.CompressedModel]  # the compressed model, as it was
    settings: unirank.Finetune
    data: str
    work: Path
    score: Callable[[Any, Any], dict[str, float]]  # perplexity of a model by text
    progress: OnProgress


def rank_preserving(job: Job) -> dict[str, Any]:
    """Our pipeline; `unmerged` is the perplexity with the adapters beside the factors."""
    tuned = unirank.finetune(job.fresh(), job.data, job.settings, work=job.work, progress=job.progress)
    training = dict(tuned.training or {})
    beside = job.fresh()
    peft = attach(beside.model, adapted(beside.model), rank=job.settings.rank, alpha=2 * job.settings.rank)
    set_state(peft, load_file(sorted(job.work.glob("*/adapters.safetensors"))[-1]))
    return {
        "after": job.score(tuned.model, tuned.tokenizer),
        "unmerged": job.score(peft, tuned.tokenizer),
        "trainable": training["trainable"],
        "merge_difference": training["merge_difference"],
        "used": tuned.plan.used,
    }


def retruncate(job: Job) -> dict[str, Any]:
    """The baseline. The truncation is the one that serves it better: whitened by the calibration, not a plain SVD."""
    compressed = job.fresh()
    model, settings = compressed.model, job.settings
    low_rank = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    ranks = {}
    for name, module in low_rank.items():
        product = torch.nn.Linear(module.in_features, module.out_features, bias=module.left.bias is not None)
        product.weight.data = module.dense_weight().detach()
        if module.left.bias is not None:
            product.bias.data = module.left.bias.detach()
        model.set_submodule(name, product)
        # As many parameters as adapters of rank r on both factors have: r (M + N + 2 R).
        sizes = module.in_features + module.out_features
        ranks[name] = max(1, round(settings.rank * (sizes + 2 * module.rank) / sizes))
    corpus = read_corpus(job.data, compressed.tokenizer)
    windows = split_windows(pack(corpus, compressed.tokenizer, model, window=settings.window), settings, corpus)
    set_seed(settings.seed)
    peft = attach(model, ranks, rank=settings.rank, alpha=2 * settings.rank, ranks=ranks)
    trainable = train_only(peft, ranks)
    loop = loop_of(settings, settings.steps, model.device)
    run(peft, *windows, job.work, loop, teacher=None, stage="fine-tune the product", progress=job.progress)
    merged = merge(peft)
    unmerged = job.score(merged, compressed.tokenizer)  # before the second truncation
    results = {}
    for scheme in ("svd", "whiten"):
        results[scheme] = job.score(_truncated(merged, compressed, scheme, job), compressed.tokenizer)
    best = min(results, key=lambda scheme: sum(results[scheme].values()))
    return {
        "after": results[best],
        "truncation": best,
        "unmerged": unmerged,
        "trainable": trainable,
        "used": compressed.plan.used,
    } | {f"after_{scheme}": values for scheme, values in results.items()}


def _truncated(merged: Any, compressed: unirank.CompressedModel, scheme: str, job: Job) -> Any:
    """A copy of the dense `merged` cut to the plan's ranks again, by an analysis of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        merged.config.__dict__.pop("quantization_config", None)
        merged.save_pretrained(scratch)
        compressed.tokenizer.save_pretrained(scratch)
        loaded = unirank.load(scratch, dtype="float32", device=str(merged.device))
        calibration = unirank.Calibration(
            text=job.data, windows=64, window=512, seed=job.settings.seed, clip=0, shrink=0
        )
        store = unirank.analyze(loaded, Path(scratch) / "store", scheme=scheme, calibration=calibration)
        for spec in loaded.linears:
            rank = compressed.plan.ranks[spec.name]
            if rank != DENSE:
                left, right = store.factors(spec, int(rank))
                low = make_low_rank(loaded.model, spec.name, int(rank))
                low.left.weight.data, low.right.weight.data = left, right
        return loaded.model


def benchmark(arguments: argparse.Namespace, console: Console, progress: OnProgress) -> list[dict[str, Any]]:
    """All rows, one a text; the JSON file is written after every run."""
    data, out = str(arguments.data / "wiki.valid.txt"), arguments.json
    texts = {"wiki.test.raw": str(arguments.data / "wiki.test.raw"), BUILTIN_HELD_OUT: BUILTIN_HELD_OUT}
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"] if out.is_file() else []
    done = {(row["pipeline"], row["schedule"], row["distill"], row["remove"]) for row in rows}

    def score(model: Any, tokenizer: Any) -> dict[str, float]:
        return {
            name: unirank.evaluate(model, tokenizer, text=text, limit=arguments.limit).perplexity
            for name, text in texts.items()
        }

    calibration = unirank.Calibration(text=data, windows=64, window=512, seed=0, clip=0, shrink=0)
    store = unirank.analyze(unirank.load(NAME, dtype="float32"), arguments.work / "store", calibration=calibration)
    for remove in arguments.remove:

        def fresh(remove: float = remove) -> unirank.CompressedModel:
            loaded = unirank.load(NAME, dtype="float32")
            return unirank.apply(loaded, store, unirank.plan(store, remove))

        before: dict[str, float] = {}
        for pipeline, schedule, distill in VARIANTS:
            if (pipeline, schedule, distill, remove) in done:
                continue
            if not before:
                start = fresh()
                before = score(start.model, start.tokenizer)
            settings = unirank.Finetune(
                steps=arguments.steps,
                schedule=schedule,
                distill=distill,
                precision=arguments.precision,
                evaluate_every=max(1, arguments.steps // 4),
            )
            work = arguments.work / f"{pipeline}-{schedule}-{distill:g}-{remove:g}"
            job = Job(fresh, settings, data, work, score, progress)
            started = time.perf_counter()
            result = (rank_preserving if pipeline == "rank-preserving" else retruncate)(job)
            seconds = time.perf_counter() - started
            after, unmerged = result.pop("after"), result.pop("unmerged")
            schemes = {key: result.pop(key) for key in list(result) if key.startswith("after_")}
            for text in texts:
                figures = {"perplexity_before": before[text], "perplexity_unmerged": unmerged[text]}
                figures |= {"perplexity_after": after[text], "text": text, "seconds": seconds}
                figures |= {f"perplexity_{key}": values[text] for key, values in schemes.items()}
                row = {"model": NAME, "pipeline": pipeline, "schedule": schedule, "distill": distill, "remove": remove}
                rows.append(row | figures | result)
            changed = ", ".join(f"{text} {before[text]:.2f} to {after[text]:.2f}" for text in texts)
            console.print(f"{pipeline}, {schedule}, distill {distill:g}, {remove:.0%} removed: {changed}")
            write_result(
                out,
                rows,
                seed=0,
                steps=arguments.steps,
                precision=arguments.precision,
                evaluation_windows=arguments.limit,
            )
    return rows


def markdown(rows: Sequence[dict[str, Any]], meta: dict[str, Any]) -> str:
    """One table a removed fraction and text."""
    lines = [
        "# Fine-tuning results",
        "",
        f"Made by `python -m bench.pipeline.bench_finetune`, do not edit. {NAME}, compressed by `whiten` and UniRank's "
        f"ranks; {meta['steps']} steps of 4 windows of 512 tokens of WikiText-2's validation text, arithmetic in "
        f"{meta['precision']}; perplexity on the first {meta['evaluation_windows']} windows of 1024 tokens. "
        "Unmerged: with the adapters beside the factors or, for the baseline, merged into the product and not yet "
        "truncated again.",
    ]
    for remove in sorted({row["remove"] for row in rows}):
        for text in dict.fromkeys(row["text"] for row in rows):
            lines += ["", f"## {remove:.0%} removed, {text}", ""]
            columns = ["pipeline", "schedule", "distill", "before", "unmerged", "after", "after / before"]
            columns += ["trainable", "seconds"]
            lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
            for row in rows:
                if (row["remove"], row["text"]) == (remove, text):
                    before, after = row["perplexity_before"], row["perplexity_after"]
                    name = row["pipeline"] + (f" ({row['truncation']})" if "truncation" in row else "")
                    cells = [name, row["schedule"], f"{row['distill']:g}", f"{before:.2f}"]
                    cells += [f"{row['perplexity_unmerged']:.2f}", f"{after:.2f}", f"{after / before:.0%}"]
                    cells += [f"{row['trainable']:,}", f"{row['seconds']:.0f}"]
                    lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--remove", nargs="+", type=float, default=[0.4, 0.2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--limit", type=int, default=8, help="evaluation windows a text")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="of the training")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder with wiki.valid.txt and wiki.test.raw")
    parser.add_argument("--work", type=Path, help="keep analysis and training checkpoints here; resumes")
    parser.add_argument("--json", type=Path, help="write rows and meta to this file")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
    with (
        tempfile.TemporaryDirectory() as scratch,
        display(None if console.is_terminal else False, console=console) as progress,
    ):
        arguments.work = arguments.work or Path(scratch) / "work"
        arguments.json = arguments.json or Path(scratch) / "finetune.json"
        rows = benchmark(arguments, console, progress)
        text = markdown(rows, json.loads(arguments.json.read_text())["meta"])
    if arguments.markdown is not None:
        write_text(arguments.markdown, text)
    console.print(text, markup=False)


if __name__ == "__main__":
    main()
