"""The whole job in one call."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unirank.allocate import check_request
from unirank.allocate import plan as make_plan
from unirank.allocators import allocator as allocator_of
from unirank.analyze import Calibration, analyze, gradient_windows
from unirank.checkpoint import CompressedModel
from unirank.errors import InputError
from unirank.models import describe, load
from unirank.progress import OnProgress, silent
from unirank.schemes import scheme as scheme_of
from unirank.score import ScoreSettings
from unirank.store import MANIFEST, AnalysisStore, open_store
from unirank.truncate import truncate
from unirank.types import LoadedModel, RankPlan
from unirank.workbench import make_workbench


def compress(
    model: str | Path | PreTrainedModel | LoadedModel,
    remove: float,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    scheme: str = "whiten",
    allocator: str = "unirank",
    settings: ScoreSettings | None = None,
    min_rank: int = 1,
    multiple_of: int = 1,
    options: Mapping[str, float] | None = None,
    calibration: Calibration | None = None,
    store: str | Path | None = None,
    dtype: str = "auto",
    device: str | None = None,
    progress: OnProgress = silent,
) -> CompressedModel:
    """Compress a causal language model by low-rank decomposition, at an exact parameter budget.

    Args:
        model: a path or hub name; or a model in memory, which is changed in place.
        remove: the fraction of the decoder linears' weight parameters to remove, in [0, 1).
        tokenizer: needed when `model` is a `PreTrainedModel`.
        scheme, allocator: names from `unirank.schemes()` and `unirank.allocators()`.
        settings, min_rank, multiple_of, options: see `unirank.plan`.
        calibration: which tokens calibrate; None takes a finished `store` as it is, else 64 windows of 512 tokens of
            Python's documentation.
        store: where to keep the analysis (resumed when interrupted, reused for other ratios); None keeps none.
        dtype, device: how to load a path or name.

    Raises InputError, StoreError, NonFiniteError or WriteError as the stages do.
    """
    # A wrong value or name is cheap to find now and dear to find after loading or after the analysis.
    scheme_of(scheme)
    check_request((), remove, allocator=allocator, min_rank=min_rank, multiple_of=multiple_of, options=options)
    loaded = _loaded(model, tokenizer, dtype, device)
    check_request(loaded.linears, remove, allocator=allocator, min_rank=min_rank, multiple_of=multiple_of)
    with tempfile.TemporaryDirectory(prefix="unirank-") as scratch:
        where = Path(store) if store is not None else Path(scratch) / "store"
        analysis = analysis_for(
            loaded, where, scheme=scheme, allocator=allocator, calibration=calibration, progress=progress
        )
        workbench = None
        if allocator_of(allocator).measures:
            text = calibration.text if calibration is not None else None
            workbench = make_workbench(loaded, analysis, text=text, progress=progress)
        plan = make_plan(
            analysis,
            remove,
            allocator=allocator,
            settings=settings,
            min_rank=min_rank,
            multiple_of=multiple_of,
            options=options,
            workbench=workbench,
        )
        return apply(loaded, analysis, plan, progress=progress)


def analysis_for(
    loaded: LoadedModel,
    path: Path,
    *,
    scheme: str,
    allocator: str,
    calibration: Calibration | None,
    overwrite: bool = False,
    progress: OnProgress = silent,
) -> AnalysisStore:
    """The store at `path`: as it is when finished, of this scheme, and no calibration is asked for; else analyzed.

    `truncate` refuses a store of another model in either case. Raises like `analyze`, and InputError where `allocator`
    needs gradients and the analysis to make would have none.
    """
    if calibration is None and not overwrite and (path / MANIFEST).is_file():
        store = open_store(path)
        if store.complete and store.identity["scheme"] == scheme:
            return store
    if allocator_of(allocator).gradients and not gradient_windows(calibration or Calibration(), scheme_of(scheme)):
        raise InputError(
            f"The allocator {allocator} needs gradients; ask for some: gradient_windows (--gradients) at least 1."
        )
    return analyze(loaded, path, scheme=scheme, calibration=calibration, overwrite=overwrite, progress=progress)


def apply(
    loaded: LoadedModel, store: AnalysisStore, plan: RankPlan, *, progress: OnProgress = silent
) -> CompressedModel:
    """Truncate `loaded` in place by `plan` and the factors of `store`. Raises like `truncate`."""
    report = truncate(loaded, store, plan, progress=progress)
    return CompressedModel(loaded.model, loaded.tokenizer, plan, report, store.identity, loaded.source)


def _loaded(
    model: str | Path | PreTrainedModel | LoadedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: str,
    device: str | None,
) -> LoadedModel:
    if isinstance(model, LoadedModel):
        return model
    if isinstance(model, str | Path):
        return load(str(model), dtype=dtype, device=device)
    if tokenizer is None:
        raise InputError("A model in memory needs its tokenizer: unirank.compress(model, remove, tokenizer=tokenizer).")
    return describe(model, tokenizer)
