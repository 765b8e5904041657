"""How results look in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from unirank.checkpoint import CompressedModel
from unirank.demo import PROMPT, DemoResult
from unirank.store import AnalysisStore
from unirank.types import DENSE, SUBLAYERS, RankPlan


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def cosine_table(store: AnalysisStore) -> Table:
    """Mean token cosine of every sublayer and block."""
    table = _table("cosine between input and output", "layer", *SUBLAYERS, "block")
    for layer, stats in enumerate(store.cosines()):
        table.add_row(str(layer), *(f"{stats[key].mean:.4f}" for key in (*SUBLAYERS, "block")))
    return table


def plan_table(plan: RankPlan) -> Table:
    """Rank of every linear, one row a layer; the kinds of projection are the columns."""
    rows: dict[str, dict[str, str]] = {}
    for name, rank in plan.ranks.items():
        layer, kind = _split(name)
        rows.setdefault(layer, {})[kind] = str(rank)
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row))
    table = _table("rank of every linear", "layer", *(kind.rpartition(".")[2] for kind in kinds))
    for layer, row in rows.items():
        table.add_row(layer.rpartition(".")[2], *(row.get(kind, "") for kind in kinds))
    return table


def _split(name: str) -> tuple[str, str]:
    """ "model.layers.3.mlp.up_proj" -> ("model.layers.3", "mlp.up_proj")."""
    parts = name.split(".")
    index = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: index + 1]), ".".join(parts[index + 1 :])


def plan_summary(plan: RankPlan) -> str:
    dense = sum(rank == DENSE for rank in plan.ranks.values())
    return (
        f"{plan.allocator}, scheme {plan.scheme}: remove = {plan.remove:g}, budget {plan.budget:,} of {plan.total:,} "
        f"parameters, used {plan.used:,} ({plan.budget - plan.used:,} left); "
        f"{dense} of {len(plan.ranks)} linears stay dense."
    )


def compress_view(compressed: CompressedModel, out: Path, store: Path) -> list[Any]:
    """What was removed, and how to load the result."""
    report = compressed.report
    saved = (report.model_before - report.model_after) * compressed.model.dtype.itemsize
    table = _table("compressed", "", "before", "after", "removed")
    for label, before, after, removed in (
        ("decoder linears", report.targets_before, report.targets_after, report.removed_of_targets),
        ("whole model", report.model_before, report.model_after, report.removed_of_model),
    ):
        table.add_row(label, f"{before:,}", f"{after:,}", f"{removed:.2%}")
    kept = f"The analysis stays in {store} for other ratios (--store {store}); delete it when you need no more."
    return [table, f"{saved / 1e6:,.1f} MB saved on disk. {plan_summary(compressed.plan)}", kept, *load_hint([out])]


def load_hint(paths: Sequence[Path]) -> list[Any]:
    """The lines that load a checkpoint."""
    lines = ["", "Load it:", "  import unirank", "  from transformers import AutoModelForCausalLM"]
    lines += [f'  model = AutoModelForCausalLM.from_pretrained("{path}")' for path in paths]
    return [Text("\n".join(lines))]


def eval_table(records: Sequence[dict[str, Any]]) -> Table:
    first = records[0]
    title = f"perplexity on {first['text']} (sha256 {first['text_sha256'][:12]}), windows of {first['window']} tokens"
    table = _table(title, "model", "perplexity", "windows", "parameters", "dtype")
    for r in records:
        table.add_row(r["model"], f"{r['perplexity']:.2f}", str(r["windows"]), f"{r['parameters']:,}", r["dtype"])
    return table


def samples(records: Sequence[dict[str, Any]]) -> list[Text]:
    return [Text(f"{r['model']}: {r['sample']!r}") for r in records if "sample" in r]


def info_table(record: dict[str, Any]) -> Table:
    table = _table("unirank", "", "")
    table.show_header = False
    table.columns[1].justify = "left"
    for key, value in record.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {version}" for name, version in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value)) or None
        table.add_row(key.replace("_", " "), Text("none" if value is None else str(value)))
    return table


def demo_record(result: DemoResult) -> dict[str, Any]:
    return {"rows": [asdict(row) for row in result.rows], "seconds": result.seconds, "meta": result.meta}


def demo_view(result: DemoResult) -> list[Any]:
    """The table, one sample a row, seconds a stage, how to load."""
    first = result.rows[0]
    table = _table(
        f"{first.model}: perplexity on the held-out part of Python's documentation",
        "allocation",
        "removed of targets",
        "removed of model",
        "perplexity",
        "x dense",
        "parameters",
        "MB",
    )
    for row in result.rows:
        table.add_row(
            row.allocator,
            f"{1 - row.used / first.used:.2%}",
            f"{row.removed_of_model:.2%}",
            f"{row.perplexity:.2f}",
            f"{row.perplexity / first.perplexity:.2f}",
            f"{row.parameters:,}",
            f"{row.bytes / 1e6:.1f}",
        )
    said = Text(f"\n{PROMPT} ...\n")
    for row in result.rows:
        said.append(f"  {row.allocator} {row.remove:.0%}: ", style="bold")
        said.append(" ".join(row.sample.split()) + "\n")
    seconds = "  ".join(f"{stage} {value:.1f} s" for stage, value in result.seconds.items())
    return [table, said, Text(f"Seconds per stage, summed: {seconds}"), *load_hint(result.checkpoints)]
