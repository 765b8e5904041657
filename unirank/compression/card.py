"""The model card: the README.md of a compressed checkpoint, with metadata that the hub reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unirank.analysis.identity import TREE, Identity
from unirank.compression.quantize_report import QuantizeReport
from unirank.compression.trainings import training_rows
from unirank.compression.truncation import TruncateReport
from unirank.models.configurations import auto_name
from unirank.rank_plan import RankPlan

# What lies beside the weights.
PLAN_FILE = "rank_plan.json"
PROVENANCE_FILE = "provenance.json"
EVALUATIONS_FILE = "evaluations.json"
_TAGS = "tags: [unirank, low-rank, compressed]"
# What is said of a checkpoint that another tool saved again.
UNKNOWN = "unknown"
GONE = "another tool saved this checkpoint again, without provenance.json; ranks and sizes are those of its weights"


def render_card(
    source: str,
    plan: RankPlan,
    report: TruncateReport,
    identity: Identity | None,
    training: Mapping[str, Any] | None,
    evaluations: Sequence[Mapping[str, Any]],
    quantized: QuantizeReport | None,
) -> str:
    """Markdown behind YAML metadata. Arguments as in `CompressedModel`."""
    title = f"{Path(source).name or source or 'A model'}, {plan.remove:.0%} of the decoder's weights removed"
    rows = {
        "base model": _base_model(source, identity),
        "removed of the targets (decoder linears)": f"{report.removed_of_targets:.2%} "
        f"({report.targets_before:,} to {report.targets_after:,}; budget {plan.budget:,})",
        "removed of the whole model": f"{report.removed_of_model:.2%} "
        f"({report.model_before:,} to {report.model_after:,})",
        "scheme, allocator": f"`{plan.scheme}`, `{plan.allocator}`",
        "low-rank form": plan.described_form,
        "settings": plan.described_settings(),
        "calibration": calibration_line(identity),
        "evaluation": _evaluation_line(identity, evaluations),
    }
    if identity is None:
        rows["records"] = GONE
    version = "" if identity is None else " " + identity.versions["unirank"]
    rows |= training_rows(training)
    if quantized is not None:
        rows["quantised"] = quantized.described()
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    auto = "AutoModelForCausalLM" if identity is None else auto_name(identity.model.class_name)
    pipeline, reads = "text-generation", "tokenizer"
    if auto != "AutoModelForCausalLM":  # with towers, which stay as they are
        reads = "processor"
        pipeline = "image-text-to-text" if auto == "AutoModelForImageTextToText" else "any-to-any"
    return f"""---
library_name: transformers
pipeline_tag: {pipeline}
{_TAGS}
{_metadata(title, evaluations)}---

# {title}

Compressed by unirank{version} ([the method](https://arxiv.org/abs/2606.21847)): low-rank
factors instead of {report.low_rank} of {report.low_rank + report.dense} linear maps; the others stayed dense.

```python
import unirank  # teaches transformers the low-rank layers; without it, loading stops with a shape mismatch
from transformers import {auto}, Auto{reads.capitalize()}

model = {auto}.from_pretrained("PATH")
{reads} = Auto{reads.capitalize()}.from_pretrained("PATH")
```

| | |
|---|---|
{table}
{_perplexities(evaluations)}
`{PLAN_FILE}` holds the rank of every linear, `{PROVENANCE_FILE}` hashes and versions.
"""


def is_card(text: str) -> bool:
    """Whether a model card is one of ours."""
    return _TAGS in text.split("\n---", 1)[0]


def calibration_line(identity: Identity | None, *, mark: str = "`") -> str:
    """The calibration in words; `mark` stands around the text's name."""
    if identity is None:
        return UNKNOWN
    used = identity.calibration
    clip = f", tokens clipped at {used.clip:g} medians" if used.clip else ""
    clip += f", covariances shrunk by {used.shrink:g}" if used.shrink else ""
    return f"{used.windows} windows of {used.window} tokens of {mark}{used.text}{mark}, seed {used.seed}{clip}"


def _evaluation_line(identity: Identity | None, evaluations: Sequence[Mapping[str, Any]]) -> str:
    """The texts of the evaluations, and which of them calibrated too: whether two are of one domain cannot be known."""
    if not evaluations:
        return "none here; what it costs on your text is not known"
    used = None if identity is None else identity.calibration
    seen = set() if used is None else {used.text_sha256, *(text.sha256 for text in used.texts or ())}
    names = dict.fromkeys(
        f"`{one['report']['text']}`{', which calibrated too' if one['report']['text_sha256'] in seen else ''}"
        for one in evaluations
    )
    return f"on {'; on '.join(names)}; what it costs on text of another kind is not known"


def _base_model(source: str, identity: Identity | None) -> str:
    if identity is None:
        return f"`{source}`" if source else UNKNOWN
    model = identity.model
    weights = model.weights_sha256.removeprefix(TREE)
    return f"`{source}` ({model.class_name}, weights sha256 `{weights[:16]}`)"


def _perplexities(evaluations: Sequence[Mapping[str, Any]]) -> str:
    if not evaluations:
        return ""
    lines = ["", "| perplexity on | windows | dense | this model |", "|---|---|---|---|"]
    for one in evaluations:
        report, dense = one["report"], one["dense"]
        windows = f"{report['windows']} of {report['window']} tokens{', each behind a BOS' if report['bos'] else ''}"
        beside = "not measured" if dense is None else f"{dense:.2f}"
        lines.append(f"| `{report['text']}` | {windows}, {report['dtype']} | {beside} | {report['perplexity']:.2f} |")
    return "\n".join(lines) + "\n"


def _metadata(title: str, evaluations: Sequence[Mapping[str, Any]]) -> str:
    """The hub's `model-index`, without which it shows no results. JSON is YAML."""
    if not evaluations:
        return ""
    results = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": one["report"]["text"], "type": "text"},
            "metrics": [{"type": "perplexity", "value": round(one["report"]["perplexity"], 4)}],
        }
        for one in evaluations
    ]
    return f"model-index: {json.dumps([{'name': title, 'results': results}])}\n"
