"""How results look in a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from unirank.analysis.shown import cosine_rows
from unirank.cli.terminal import in_flags
from unirank.progress import gib
from unirank.rank_plan import described_ranks
from unirank.types import DENSE, Rank, stack_of

if TYPE_CHECKING:
    from unirank.analysis.needs import Needs
    from unirank.analysis.store import AnalysisStore
    from unirank.compression.checkpoint import CompressedModel
    from unirank.diagnosis.claim import Diagnosis
    from unirank.rank_plan import RankPlan
    from unirank.recipes import Preset


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def cosine_table(store: AnalysisStore) -> Table:
    """Mean token cosine of every sublayer and block."""
    columns, rows = cosine_rows(store, store.cosines())
    table = _table("cosine between input and output", "layer", *columns)
    for row in rows:
        table.add_row(*row)
    return table


def damping_record(store: AnalysisStore) -> dict[str, float]:
    """How many matrices of the analysis were damped, and the largest value (see `Factors.damping`)."""
    values = [value for value in store.damping().values() if value]
    return {"matrices": len(values), "largest": max(values, default=0.0)}


def damping_summary(store: AnalysisStore) -> list[str]:
    """One line where anything was damped, none otherwise."""
    record = damping_record(store)
    if not record["matrices"]:
        return []
    return [
        f"Damped: {record['matrices']} of {len(store.linears)} matrices, at most {record['largest']:g} of the mean."
    ]


def plan_table(plan: RankPlan) -> Table:
    """Rank of every linear, one row a layer; the kinds of projection are the columns, a stack of experts is one."""
    rows: dict[str, dict[str, list[Rank]]] = {}
    for name, rank in plan.ranks.items():
        layer, kind = _split(stack_of(name) or name)
        rows.setdefault(layer, {}).setdefault(kind, []).append(rank)
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row))
    table = _table("rank of every linear", "layer", *(kind.rpartition(".")[2] for kind in kinds))
    for layer, row in rows.items():
        shown = (described_ranks(row[kind]) if kind in row else "" for kind in kinds)
        table.add_row(layer.rpartition(".")[2], *shown)
    return table


def _split(name: str) -> tuple[str, str]:
    """ "model.layers.3.mlp.up_proj" -> ("model.layers.3", "mlp.up_proj")."""
    parts = name.split(".")
    index = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: index + 1]), ".".join(parts[index + 1 :])


def plan_summary(plan: RankPlan) -> str:
    dense = sum(rank == DENSE for rank in plan.ranks.values())
    return (
        f"{plan.allocator}, scheme {plan.scheme}, form {plan.form}: remove = {plan.remove:g}, "
        f"budget {plan.budget:,} of {plan.total:,} parameters, used {plan.used:,} ({plan.budget - plan.used:,} left); "
        f"{dense} of {len(plan.ranks)} linears stay dense."
    )


def afterwards_hint(recipe: Preset) -> list[str]:
    """How to get what a preset does behind the ranks, which are not all of it; nothing where they are."""
    second, lines = recipe.refine, []
    if second is not None:
        flags = [f"--refine {second.mix:g}"]
        flags += [f"--refine-{name}" for name in ("metric", "centred", "dense") if getattr(second, name)]
        more = " ".join(flags)
        lines.append(f"The preset's second pass is not in the ranks: with --ranks, give compress {more} too.")
    if recipe.heal is not None:
        steps = f" --distill-steps {recipe.heal.distill_steps}" if recipe.heal.distill_steps else ""
        lines.append(f"Nor is its healing: run unirank heal COMPRESSED -o OUT{steps} behind it.")
    return lines


def compress_view(compressed: CompressedModel, out: Path, store: Path) -> list[Any]:
    """What was removed, and how to load the result."""
    report = compressed.report
    table = _table("compressed", "", "before", "after", "removed")
    for label, before, after, removed in (
        ("decoder linears", report.targets_before, report.targets_after, report.removed_of_targets),
        ("whole model", report.model_before, report.model_after, report.removed_of_model),
    ):
        table.add_row(label, f"{before:,}", f"{after:,}", f"{removed:.2%}")
    kept = f"The analysis stays in {store} for other ratios (--store {store}); delete it when you need no more."
    return [table, plan_summary(compressed.plan), kept, *load_hint([out])]


def finetune_view(tuned: CompressedModel, out: Path) -> list[Any]:
    """Held-out perplexity before and after, and how to load the result."""
    training = tuned.training or {}
    data, settings = training["data"], training["settings"]
    title = f"held-out part of {data['text']}: {data['held_out_windows']} windows of {settings['window']} tokens"
    table = _table(title, "", "perplexity")
    for label in ("before", "after"):
        table.add_row(label, f"{math.exp(training[f'held_out_{label}']):.2f}")
    lines = [
        f"{training['trainable']:,} parameters were trained; merging changed no logit by more than "
        f"{training['merge_difference']:.1e} of the largest.",
        f"Ranks and size are what they were: {tuned.report.targets_after:,} parameters in the decoder's linears.",
    ]
    return [table, *lines, *load_hint([out])]


def heal_view(healed: CompressedModel, out: Path, seconds: float) -> list[Any]:
    """Error of the layers before and after, and how to load the result."""
    training = healed.training or {}
    data, layers = training["data"], training["layers"]
    title = f"squared relative error of a layer on {data['held_out_windows']} held-out windows of {data['text']}"
    if data["second"] is not None:
        title += f" and as many of {data['second']['text']}"
    table = _table(title, "layer", "before", "after", "passes", "best pass")
    for index, layer in enumerate(layers):
        errors = [f"{layer[key]:.5f}" for key in ("before", "after")]
        table.add_row(str(index), *errors, str(layer["passes"]), str(layer["best"]))
    better = sum(layer["best"] > 0 for layer in layers)
    told = f"{better} of {len(layers)} layers got better, in {seconds:,.0f} s; the others are as they were."
    lines = [
        told if layers else f"The layers were not trained one by one; {seconds:,.0f} s.",
        *_distilled(training),
        f"Ranks and size are what they were: {healed.report.targets_after:,} parameters in the decoder's linears.",
    ]
    return [*([table] if layers else []), *lines, *load_hint([out])]


def _distilled(training: Mapping[str, Any]) -> list[str]:
    distilled = training["distilled"]
    if distilled is None:
        return []
    before, after = (distilled[f"held_out_{when}"] for when in ("before", "after"))
    said = "divergence from the dense model on held-out windows"
    return [f"Distillation of the whole model: {said} {before:.4f} nats a token before, {after:.4f} after."]


def load_hint(paths: Sequence[Path]) -> list[Any]:
    """The lines that load checkpoints of one class."""
    from unirank.models.configurations import opened_by

    auto = opened_by(paths[0])
    lines = ["", "Load it:", "  import unirank", f"  from transformers import {auto}"]
    lines += [f'  model = {auto}.from_pretrained("{path}")' for path in paths]
    return [Text("\n".join(lines))]


def eval_table(records: Sequence[dict[str, Any]]) -> Table:
    """One row a model; `ratio` is to the first one's perplexity, `mb` the size of the weights."""
    first = records[0]
    title = f"perplexity on {first['text']} (sha256 {first['text_sha256'][:12]}), windows of {first['window']} tokens"
    timed = ("tokens/s reading", "tokens/s writing") if "speed" in first else ()
    table = _table(title, "model", "perplexity", "ratio", "windows", "parameters", "MB", "dtype", *timed)
    for r in records:
        rates = (f"{r['speed'][phase]:,.1f}" for phase in ("prefill", "decode")) if timed else ()
        cells = [f"{r['perplexity']:.2f}", f"{r['ratio']:.3f}", str(r["windows"]), f"{r['parameters']:,}"]
        table.add_row(r["model"], *cells, f"{r['mb']:,.1f}", r["dtype"], *rates)
    return table


def task_table(records: Sequence[dict[str, Any]]) -> Table:
    """One row a task and metric; the models are columns."""
    first = records[0]
    some = "" if first["limit"] is None else f", only the first {first['limit']} documents of each"
    table = _table(f"tasks of lm-eval {first['lm_eval']}{some}", "task", "metric", "few-shot", "n")
    for record in records:
        table.add_column(f"{record['model']} ({record['dtype']})", justify="right")
    for rows in zip(*(record["results"] for record in records), strict=True):
        row = rows[0]
        metric = row["metric"] if row["filter"] == "none" else f"{row['metric']} ({row['filter']})"
        counts = ("" if row[key] is None else str(row[key]) for key in ("fewshot", "n"))
        values = (f"{r['value']:.4f}" + ("" if r["stderr"] is None else f" ± {r['stderr']:.4f}") for r in rows)
        table.add_row(row["task"], metric, *counts, *values)
    return table


def samples(records: Sequence[dict[str, Any]]) -> list[Text]:
    """How each model goes on, behind what it was given."""
    said = [r for r in records if "sample" in r]
    given = [Text(f"{said[0]['prompt']} ...")] if said and "prompt" in said[0] else []
    return [*given, *(Text(f"  {r['model']}: {r['sample']!r}") for r in said)]


def diagnosis_view(diagnosis: Diagnosis) -> list[Any]:
    """The readings and what each says, what could not be read, the spectra, the geometry, the damping."""
    from unirank.diagnosis.claim import GROUPS

    table = _table(
        "effective rank against the cosine between a sublayer's input and output",
        "effective rank of",
        "n",
        "rho",
        "p",
        "rho of sigma",
        "p of sigma",
        "the claim (high cosine, low rank)",
    )
    table.columns[-1].justify = "left"
    for group, title in GROUPS.items():
        if group == "scheme":
            title = f"{title} {diagnosis.about['scheme']}"
        for row, reading in enumerate(r for r in diagnosis.readings if r.group == group):
            if row == 0:
                table.add_section()
                table.add_row(Text(title, style="bold"))
            both = (reading.energy, reading.sigma)
            numbers = [text for c in both for text in (f"{c.rho:+.2f}", f"{c.p:.4f}")]
            table.add_row(f"  {reading.name}", str(len(reading.points)), *numbers, reading.energy.verdict)
    lines = Text(f"{diagnosis.summary()}\n")
    lines.append(
        "rho: Spearman's rank correlation with the cosine; p: two-sided, by permutation "
        f"({diagnosis.about['permutations']} orders, seed {diagnosis.about['seed']}).\n"
        "Effective rank exp(-sum p ln p), p = sigma^2 / sum sigma^2; 'of sigma': p = sigma / sum sigma. "
        "Verdicts are of the former.\n"
        "The test takes layers as exchangeable; neighbours are alike, so true p-values are larger."
    )
    tokens, width = diagnosis.about.get("tokens"), diagnosis.about.get("width")
    if tokens is not None and width is not None:
        lines.append(f"\n(c) and (d) are from {tokens:,} tokens of width {width:,}.")
        if tokens < 4 * width:
            lines.append(" That is few: their effective ranks are biased low; take more --windows.")
    for item in diagnosis.missing:
        lines.append(f"\nNot read, {GROUPS[item.group]}: {in_flags(item.reason)}.")
    return [table, lines, _spectra_table(diagnosis), *_geometry_table(diagnosis), _damping_line(diagnosis)]


def _spectra_table(diagnosis: Diagnosis) -> Table:
    table = _table(
        f"spectra of the scheme {diagnosis.about['scheme']}",
        "projection",
        "K",
        "effective rank: least",
        "median",
        "most",
        "first component",
        "rank of 99 %",
    )
    for row in diagnosis.spectra:
        ranks = (f"{value:.1f}" for value in (row.least, row.median, row.most))
        table.add_row(row.kind, str(row.k), *ranks, f"{row.first_share:.1%}", str(row.rank_99))
    return table


def _geometry_table(diagnosis: Diagnosis) -> list[Table]:
    if not diagnosis.geometry:
        return []
    sublayers = list(dict.fromkeys(row.sublayer for row in diagnosis.geometry))
    columns = [f"{sublayer} {what}" for sublayer in sublayers for what in ("cosine", "|f|/|x|", "|cos(x, f)|")]
    table = _table("why the cosine is what it is: size and direction of f(x)", "layer", *columns)
    layers: dict[int, dict[str, tuple[str, str, str]]] = {}
    for row in diagnosis.geometry:
        cells = (f"{row.cosine:.4f}", f"{row.size:.3g}", f"{row.parallel:.3f}")
        layers.setdefault(row.layer, {})[row.sublayer] = cells
    for layer, found in layers.items():
        table.add_row(str(layer), *(cell for sublayer in sublayers for cell in found.get(sublayer, ("", "", ""))))
    return [table]


def _damping_line(diagnosis: Diagnosis) -> str:
    damping = diagnosis.damping
    if damping.largest_of is None:
        return f"Damping: none of {damping.matrices} matrices."
    return (
        f"Damping: {damping.damped} of {damping.matrices} matrices, "
        f"the largest {damping.largest:.1e} of the mean diagonal ({damping.largest_of})."
    )


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


def needs_view(found: Needs) -> tuple[Any, ...]:
    """What a run will need, beside what is there."""
    table = Table(box=None, show_header=False)
    parts = {"analysis": found.analysis_seconds, **found.behind} if found.behind else {}
    rows = {
        "time": _duration(found.seconds),
        **{f"  {name}": _duration(seconds) for name, seconds in parts.items()},
        "memory": f"{gib(found.memory)} of {gib(found.available_memory)} ({found.device})",
        "memory whole / streamed": f"{gib(found.whole_memory)}, {gib(found.stream_memory)}",
        "disk": f"{gib(found.disk)} of {gib(found.available_disk)}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    told = "Memory and disk are the analysis's. The time of what follows it is from a table of costs, made on a CPU."
    return (f"Estimate from one of {found.layers} layers:", table, *([told] if parts else []))


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
