"""The compressed model as a Hugging Face directory: safetensors, config, rank plan, provenance, model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unirank.files import check_output, staged_directory, write_json, write_text
from unirank.truncate import TruncateReport
from unirank.types import RankPlan

PLAN_FILE = "rank_plan.json"
PROVENANCE_FILE = "provenance.json"


@dataclass(frozen=True)
class CompressedModel:
    """A compressed model in memory, with how it came about."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    plan: RankPlan
    report: TruncateReport
    identity: Mapping[str, Any]  # of the analysis
    source: str

    def save(self, out: str | Path, *, overwrite: bool = False) -> Path:
        """Write the checkpoint; `AutoModelForCausalLM.from_pretrained(out)` reads it after `import unirank`.

        Raises:
            InputError: `out` exists and is not a unirank checkpoint, or is one and `overwrite` is off.
            WriteError: the disk refused; nothing is left behind and an old checkpoint stays as it was.
        """
        out = Path(out)
        check_output(out, marker=PLAN_FILE, overwrite=overwrite)
        with staged_directory(out) as folder:
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            write_text(folder / PLAN_FILE, self.plan.to_json())
            provenance = {"analysis": self.identity, "report": self.report.as_dict(), "source": self.source}
            write_json(folder / PROVENANCE_FILE, provenance)
            write_text(folder / "README.md", self._card())
        return out

    def _card(self) -> str:
        plan, report = self.plan, self.report
        model, calibration = self.identity["model"], self.identity["calibration"]
        version = self.identity["versions"]["unirank"]
        rows = {
            "base model": f"`{self.source}` ({model['class']}, weights sha256 `{model['weights_sha256'][:16]}`)",
            "removed of the targets (decoder linears)": f"{report.removed_of_targets:.2%} "
            f"({report.targets_before:,} to {report.targets_after:,}; budget {plan.budget:,})",
            "removed of the whole model": f"{report.removed_of_model:.2%} "
            f"({report.model_before:,} to {report.model_after:,})",
            "scheme, allocator": f"`{plan.scheme}`, `{plan.allocator}`",
            "settings": ", ".join(f"{key} = {value}" for key, value in sorted(plan.settings.items())),
            "calibration": f"{calibration['windows']} windows of {calibration['window']} tokens of "
            f"`{calibration['text']}`, seed {calibration['seed']}",
        }
        table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
        return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [unirank, low-rank, compressed]
---

# {Path(self.source).name or self.source}, {plan.remove:.0%} of the decoder's weights removed

Compressed by unirank {version} ([the method](https://arxiv.org/abs/2606.21847)): low-rank factors in the place of
{report.low_rank} of {report.low_rank + report.dense} linear maps; the others stayed dense.

```python
import unirank  # teaches transformers the low-rank layers; without it, loading stops with a shape mismatch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

| | |
|---|---|
{table}

`{PLAN_FILE}` holds the rank of every linear, `{PROVENANCE_FILE}` hashes and versions.
"""
