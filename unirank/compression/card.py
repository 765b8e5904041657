"""The model card: the README.md of a compressed checkpoint, with metadata that the hub reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unirank.analysis.identity import TREE, Identity
from unirank.compression.trainings import training_rows
from unirank.compression.truncation import TruncateReport
from unirank.rank_plan import RankPlan

# What lies beside the weights.
PLAN_FILE = "rank_plan.json"
PROVENANCE_FILE = "provenance.json"
EVALUATIONS_FILE = "evaluations.json"


def render_card(
    source: str,
    plan: RankPlan,
    report: TruncateReport,
    identity: Identity,
    training: Mapping[str, Any] | None,
    evaluations: Sequence[Mapping[str, Any]],
) -> str:
    """Markdown behind YAML metadata. Arguments as in `CompressedModel`."""
    model, calibration = identity.model, identity.calibration
    weights = model.weights_sha256.removeprefix(TREE)
    title = f"{Path(source).name or source}, {plan.remove:.0%} of the decoder's weights removed"
    rows = {
        "base model": f"`{source}` ({model.class_name}, weights sha256 `{weights[:16]}`)",
        "removed of the targets (decoder linears)": f"{report.removed_of_targets:.2%} "
        f"({report.targets_before:,} to {report.targets_after:,}; budget {plan.budget:,})",
        "removed of the whole model": f"{report.removed_of_model:.2%} "
        f"({report.model_before:,} to {report.model_after:,})",
        "scheme, allocator": f"`{plan.scheme}`, `{plan.allocator}`",
        "low-rank form": plan.described_form,
        "settings": plan.described_settings(),
        "calibration": f"{calibration.windows} windows of {calibration.window} tokens of "
        f"`{calibration.text}`, seed {calibration.seed}"
        + (f", tokens clipped at {calibration.clip:g} medians" if calibration.clip else ""),
    }
    rows |= training_rows(training)
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [unirank, low-rank, compressed]
{_metadata(title, evaluations)}---

# {title}

Compressed by unirank {identity.versions["unirank"]} ([the method](https://arxiv.org/abs/2606.21847)): low-rank
factors instead of {report.low_rank} of {report.low_rank + report.dense} linear maps; the others stayed dense.

```python
import unirank  # teaches transformers the low-rank layers; without it, loading stops with a shape mismatch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

| | |
|---|---|
{table}
{_perplexities(evaluations)}
`{PLAN_FILE}` holds the rank of every linear, `{PROVENANCE_FILE}` hashes and versions.
"""


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
