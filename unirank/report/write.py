"""The page about a checkpoint, gathered, drawn and written."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from unirank.analysis.store import MANIFEST, AnalysisStore
from unirank.disk.files import beside, write_text
from unirank.errors import InputError
from unirank.evaluation.perplexity import generate
from unirank.models.loading import load_pretrained
from unirank.report.gather import ReportData, gather
from unirank.report.page import page, page_inputs

PROMPTS = ("The capital of France is", "Water boils when", "def fibonacci(n):")
CURVE = "curve.json"  # in OUT-curve


def usual_page(checkpoint: Path) -> Path:
    """Where the page about a checkpoint is written when nobody says where."""
    return beside(checkpoint, ".html")


def usual_store(checkpoint: Path) -> Path | None:
    """The analysis store beside a checkpoint, OUT-analysis, where it is."""
    found = beside(checkpoint, "-analysis")
    return found if (found / MANIFEST).is_file() else None


def usual_curve(checkpoint: Path) -> Path | None:
    """The curve beside a checkpoint, OUT-curve/curve.json, where it is."""
    found = beside(checkpoint, "-curve") / CURVE
    return found if found.is_file() else None


def samples(
    checkpoint: Path,
    against: str,
    *,
    prompts: Sequence[str] = PROMPTS,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[tuple[str, str, str], ...]:
    """Greedy continuations of `prompts` by the dense and the compressed model. Raises like `unirank.load`."""
    texts = []
    for name in (against, str(checkpoint)):
        model, tokenizer = load_pretrained(name, device=device, trust_remote_code=trust_remote_code)
        texts.append([generate(model, tokenizer, prompt) for prompt in prompts])
    return tuple(zip(prompts, *texts, strict=True))


def check_page(out: Path, *, overwrite: bool = False, ours: bool = False) -> None:
    """Raise InputError where the page `out` is there already and is not to be replaced.

    With `ours`, a page that unirank wrote may be: it holds nothing that is not elsewhere.
    """
    if out.exists() and not overwrite and not (ours and out.is_file() and page_inputs(out) is not None):
        raise InputError(f"The page {out} exists already; pass overwrite=True to replace it.")


def write_report(
    checkpoint: str | Path,
    out: str | Path,
    *,
    store: AnalysisStore | None = None,
    grid: str | Path | None = None,
    curve: str | Path | None = None,
    against: str | None = None,
    prompts: Sequence[str] = PROMPTS,
    device: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> ReportData:
    """Write the page `out` about a compressed checkpoint.

    Args:
        store: the analysis it was made from; adds cosines, spectra and effective ranks.
        grid: a JSON result of `bench_quality.py`, or `demo.json`; adds perplexities.
        curve: a `curve.json` of the same model; adds its chart, with this checkpoint on it.
        against: the dense model; adds continuations of `prompts` side by side.
        trust_remote_code: run modelling code that the two models bring.
        overwrite: replace a page that is there.

    Raises InputError when one of them is not what it should be, WriteError when the disk refuses.
    """
    out, checkpoint = Path(out), Path(checkpoint)
    check_page(out, overwrite=overwrite)
    place, line = (None if file is None else Path(file) for file in (grid, curve))
    data = gather(checkpoint, store, place, curve=line, trust_remote_code=trust_remote_code)
    if against is not None:
        found = samples(checkpoint, against, prompts=prompts, device=device, trust_remote_code=trust_remote_code)
        data = dataclasses.replace(data, samples=found)
    inputs = {"store": None if store is None else store.path, "grid": place, "curve": line}
    made_with = {key: None if file is None else os.path.relpath(file, out.parent) for key, file in inputs.items()}
    write_text(out, page(data, made_with | {"side_by_side": against is not None}))
    return data
