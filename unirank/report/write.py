"""The page about a checkpoint, gathered, drawn and written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from unirank.analysis.store import AnalysisStore
from unirank.disk.files import write_text
from unirank.errors import InputError
from unirank.evaluation.perplexity import generate
from unirank.models.loading import load_pretrained
from unirank.report.gather import ReportData, gather
from unirank.report.page import page

PROMPTS = ("The capital of France is", "Water boils when", "def fibonacci(n):")


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


def check_page(out: Path, *, overwrite: bool = False) -> None:
    """Raise InputError where the page `out` is there already and is not to be replaced."""
    if out.exists() and not overwrite:
        raise InputError(f"The page {out} exists already; pass overwrite=True to replace it.")


def write_report(
    checkpoint: str | Path,
    out: str | Path,
    *,
    store: AnalysisStore | None = None,
    grid: str | Path | None = None,
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
        against: the dense model; adds continuations of `prompts` side by side.
        trust_remote_code: run modelling code that the two models bring.
        overwrite: replace a page that is there.

    Raises InputError when one of them is not what it should be, WriteError when the disk refuses.
    """
    check_page(Path(out), overwrite=overwrite)
    checkpoint = Path(checkpoint)
    place = Path(grid) if grid is not None else None
    data = gather(checkpoint, store, place, trust_remote_code=trust_remote_code)
    if against is not None:
        found = samples(checkpoint, against, prompts=prompts, device=device, trust_remote_code=trust_remote_code)
        data = gather(checkpoint, store, place, found, trust_remote_code=trust_remote_code)
    write_text(Path(out), page(data))
    return data
