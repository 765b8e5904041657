"""The compressed model as a Hugging Face directory: safetensors, config, rank plan, provenance, model card."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unirank.errors import InputError
from unirank.files import check_output, staged_directory, write_json, write_text
from unirank.models import load_pretrained
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
    training: Mapping[str, Any] | None = None  # of `unirank.finetune`

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
            write_json(folder / PROVENANCE_FILE, self.provenance())
            write_text(folder / "README.md", self._card())
        return out

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Save to a temporary directory and upload all of it, plan, provenance and card included; returns the address.

        `model.push_to_hub` of transformers uploads weights and config alone, with a card of its own.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory(prefix="unirank-") as scratch:
            folder = self.save(Path(scratch) / "checkpoint")
            return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message="Compressed by unirank"))

    def provenance(self) -> dict[str, Any]:
        """Where the model comes from, for JSON."""
        record = {"analysis": self.identity, "report": self.report.as_dict(), "source": self.source}
        return record if self.training is None else record | {"training": self.training}

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
        if self.training is not None:
            rows["fine-tuned"] = _training_line(self.training)
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


def _training_line(training: Mapping[str, Any]) -> str:
    settings, data = training["settings"], training["data"]
    return (
        f"{settings['steps']} steps of {settings['batch']} x {settings['window']} tokens of `{data['text']}`, LoRA of "
        f"rank {settings['rank']} on the factors, {settings['schedule']}, distill = {settings['distill']}, "
        f"seed {settings['seed']}"
    )


@dataclass(frozen=True)
class Record:
    """What a checkpoint says of itself, without its weights. Fields as in `CompressedModel`."""

    plan: RankPlan
    report: TruncateReport
    identity: Mapping[str, Any]
    source: str
    training: Mapping[str, Any] | None


def read_record(path: Path) -> Record:
    """Read the plan and the provenance beside the weights. Raises InputError when `path` is no such checkpoint."""
    if not path.is_dir():
        raise InputError(f"The compressed checkpoint {path} does not exist; make one with: unirank compress.")
    if not (path / PLAN_FILE).is_file():
        raise InputError(
            f"{path} is not a compressed checkpoint: it has no {PLAN_FILE}; make one with: unirank compress."
        )
    plan = RankPlan.from_json((path / PLAN_FILE).read_text(encoding="utf-8"))
    try:
        record = json.loads((path / PROVENANCE_FILE).read_text(encoding="utf-8"))
        report = TruncateReport.from_dict(record["report"])
        return Record(plan, report, record["analysis"], str(record["source"]), record.get("training"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path / PROVENANCE_FILE} is missing or damaged: {error}.") from error


def open_compressed(path: str | Path, *, dtype: str = "auto", device: str | None = None) -> CompressedModel:
    """Read what `CompressedModel.save` wrote, to go on working with it. `dtype` and `device` as in `unirank.load`.

    Raises InputError when `path` is no such checkpoint or is damaged.
    """
    record = read_record(Path(path))
    model, tokenizer = load_pretrained(str(path), dtype=dtype, device=device)
    return CompressedModel(
        model, tokenizer, record.plan, record.report, record.identity, record.source, record.training
    )
