"""The whole job in one call."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unirank.analysis.calibration import GRADIENT_WINDOWS, Calibration
from unirank.analysis.fill_store import analyze
from unirank.analysis.scheme import scheme as scheme_of
from unirank.analysis.store import MANIFEST, AnalysisStore, open_store
from unirank.compression.checkpoint import CompressedModel
from unirank.compression.refine import Refine
from unirank.compression.refine import refine as run_refine
from unirank.compression.truncation import truncate
from unirank.errors import InputError
from unirank.models.loading import describe, load
from unirank.planning.measuring import make_workbench
from unirank.planning.ranks import check_request
from unirank.planning.ranks import plan as make_plan
from unirank.planning.score import ScoreSettings
from unirank.progress import OnProgress, silent
from unirank.rank_plan import RankPlan
from unirank.recipes import Preset
from unirank.recipes import preset as preset_of
from unirank.types import LoadedModel


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
    refine: Refine | None = None,
    preset: str | None = None,
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
        scheme: a name from `unirank.schemes()`.
        allocator: a name from `unirank.allocators()`.
        settings: see `unirank.plan`, as for the next three.
        min_rank: the least rank.
        multiple_of: what ranks are multiples of.
        options: of the allocator.
        refine: a second pass over the calibration tokens (see `unirank.Refine`); None takes the factors as they are.
        preset: a name from `unirank.presets()`, in the place of `scheme`, `allocator`, `settings`, `options`, `refine`.
        calibration: which tokens calibrate; None takes a finished `store` as it is, else 64 windows of 512 tokens of
            Python's documentation.
        store: where to keep the analysis (resumed when interrupted, reused for other ratios); None keeps none.
        dtype: of a path or name that is loaded, see `unirank.load`.
        device: where it is loaded to.

    Raises InputError, StoreError, NonFiniteError or WriteError as the stages do.
    """
    # A wrong value or name is cheap to find now and dear to find after loading or after the analysis.
    if preset is None:
        recipe = Preset(scheme, allocator, settings, options or {}, refine)
    elif (scheme, allocator, settings, options, refine) != ("whiten", "unirank", None, None, None):
        raise InputError(f"preset = {preset!r} sets scheme, allocator, settings, options and refine; give only one.")
    else:
        recipe = preset_of(preset)
    scheme, allocator, settings, options = recipe.scheme, recipe.allocator, recipe.settings, recipe.options
    scheme_of(scheme)
    check_request((), remove, allocator=allocator, min_rank=min_rank, multiple_of=multiple_of, options=options)
    loaded = _loaded(model, tokenizer, dtype, device)
    check_request(
        loaded.linears, remove, allocator=allocator, min_rank=min_rank, multiple_of=multiple_of, options=options
    )
    with tempfile.TemporaryDirectory(prefix="unirank-") as scratch:
        where = Path(store) if store is not None else Path(scratch) / "store"
        analysis = analysis_for(loaded, where, recipe=recipe, calibration=calibration, progress=progress)
        workbench = None
        if recipe.needs_tokens:
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
        windows = workbench.windows if workbench is not None else None
        return apply(loaded, analysis, plan, refine=recipe.refine, windows=windows, progress=progress)


def analysis_for(
    loaded: LoadedModel,
    path: Path,
    *,
    recipe: Preset,
    calibration: Calibration | None,
    overwrite: bool = False,
    progress: OnProgress = silent,
) -> AnalysisStore:
    """The store at `path`: as it is when finished, fit for `recipe`, and no calibration is asked for; else analyzed.

    Gradients are made where the recipe needs them and nothing is said about them (**choice**: 32 windows). `truncate`
    refuses a store of another model in either case. Raises like `analyze`, and InputError where the recipe needs
    gradients and none are wanted.
    """
    scheme = recipe.scheme
    if calibration is None and not overwrite and (path / MANIFEST).is_file():
        store = open_store(path)
        if (
            store.complete
            and store.identity["scheme"] == scheme
            and (store.has_gradients or not recipe.needs_gradients)
        ):
            return store
    calibration = calibration or Calibration()
    if recipe.needs_gradients:
        if calibration.gradient_windows == 0:
            raise InputError(
                f"The scheme {scheme} with the allocator {recipe.allocator} needs gradients; "
                "gradient_windows (--gradients) must be at least 1."
            )
        if calibration.gradient_windows is None:
            count = min(GRADIENT_WINDOWS, calibration.windows)
            calibration = dataclasses.replace(calibration, gradient_windows=count)
    return analyze(loaded, path, scheme=scheme, calibration=calibration, overwrite=overwrite, progress=progress)


def apply(
    loaded: LoadedModel,
    store: AnalysisStore,
    plan: RankPlan,
    *,
    refine: Refine | None = None,
    windows: torch.Tensor | None = None,
    progress: OnProgress = silent,
) -> CompressedModel:
    """Compress `loaded` in place by `plan`: from the factors of `store`, or with `refine` by a second pass.

    Args:
        windows: calibration tokens of the second pass, int64 `[W, T]`, as `make_workbench(...).windows` gives them.

    Raises like `truncate` and `unirank.refine.refine`.
    """
    if refine is not None:
        loaded.require_whole("The second pass")
    if refine is None:
        report = truncate(loaded, store, plan, progress=progress)
    else:
        if windows is None:
            raise InputError("The second pass needs calibration tokens: apply(..., refine=..., windows=...).")
        report = run_refine(loaded, store, plan, windows, refine, progress=progress)
        plan = dataclasses.replace(plan, settings={**plan.settings, "refine": asdict(refine)})
    return CompressedModel(
        loaded.model, loaded.tokenizer, plan, report, store.identity, loaded.source, pages=loaded.pages
    )


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
