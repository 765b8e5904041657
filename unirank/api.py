"""The whole job in one call, and its stages for those who want them one by one; `job` wires them together."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unirank.analysis.calibration import Calibration, calibration_of
from unirank.analysis.store import AnalysisStore, open_store
from unirank.demands import needs_of, require
from unirank.display import shows_progress, told
from unirank.errors import InputError
from unirank.inputs import loaded_from, ranks_text
from unirank.job import Job, analyze_for, workbench_for
from unirank.planning.imported_ranks import import_plan
from unirank.planning.ranks import check_request, fitting_multiple, plan_ranks
from unirank.progress import Progress, silent
from unirank.rank_plan import RankPlan
from unirank.recipes import recipe
from unirank.stages import announce_analysis, announce_planning
from unirank.types import Form, LoadedModel, Rank

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from unirank.analysis.needs import Needs
    from unirank.compression.checkpoint import CompressedModel
    from unirank.compression.refine import Refine
    from unirank.finetuning.settings import Heal
    from unirank.planning.allocator.base import Workbench
    from unirank.planning.score import ScoreSettings
    from unirank.tradeoff.target import Target


@shows_progress
def compress(
    model: str | Path | PreTrainedModel | LoadedModel,
    remove: float | None = None,
    *,
    ranks: RankPlan | Mapping[str, Rank] | str | Path | None = None,
    target: Target | None = None,
    preset: str | None = None,
    scheme: str | None = None,
    allocator: str | None = None,
    settings: ScoreSettings | None = None,
    options: Mapping[str, float] | None = None,
    refine: Refine | None = None,
    heal: Heal | None = None,
    min_rank: int = 1,
    multiple_of: int | None = None,
    form: Form | None = None,
    calibration: Calibration | str | Path | None = None,
    store: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    stream: bool = False,
    copy: bool = False,
    progress: Progress = None,
) -> CompressedModel:
    """Compress a causal language model by low-rank decomposition, at an exact parameter budget.

    Args:
        model: a path or hub name; or a model in memory, which is changed in place unless `copy` is set.
        remove: the fraction of the decoder linears' weight parameters to remove, in [0, 1).
        ranks: instead of `remove`: a plan, a JSON file of one, or names and ranks (see `unirank.import_plan`).
        target: instead of `remove`: what the result must reach, see `unirank.Target`. A perplexity that was measured on
            the way is in the result's `evaluations`.
        preset: a name from `unirank.presets()`, instead of the next six.
        scheme: a name from `unirank.schemes()`; None is that of a finished `store`, else "whiten".
        allocator: a name from `unirank.allocators()`; None is "unirank".
        settings: of allocators that score components; None is UniRank.
        options: of the allocator.
        refine: a second pass over the calibration tokens (see `unirank.Refine`); None takes the factors as they are.
        heal: refine the result by gradient on the calibration text (see `unirank.heal`); None does not. The dense model
            is needed for it, so a model in memory stays as it is.
        min_rank: the least rank.
        multiple_of: what ranks are multiples of (dense matrices aside). None is the preset's: 1 for "unirank" and
            without a preset, 16 for the others; halved until every matrix at that rank takes at most a quarter of the
            budget (method 4.3).
        form: how low-rank matrices are stored, and so what a rank costs: "factors", two of them in `R (M + N)`
            parameters, or "pivoted", the same map in `R (M + N - R)`. None is the preset's, or that of a plan in
            `ranks`, else "factors".
        calibration: which tokens calibrate, or the path or name of a text alone. A finished `store` is taken as it is
            where this is None, or the text that the store was calibrated on. Default: 64 windows of 512 tokens of
            Python's documentation.
        store: where to keep the analysis (resumed when interrupted, reused for other ratios); None keeps none.
        tokenizer: needed when `model` is a `PreTrainedModel`.
        copy: compress a copy of a model in memory, which then stays dense.
        progress: a function `(stage, done, total)` that is told; None draws stages and the time left in terminals and
            notebooks, True also writes lines to stderr elsewhere, False does nothing.

    `dtype`, `device`, `revision`, `trust_remote_code` and `stream` are for a path or name: see `unirank.load`.

    Raises InputError, StoreError, NonFiniteError or WriteError as the stages do.
    """
    from unirank.tradeoff.choosing import TargetChooser

    chooser = None if target is None else TargetChooser(target)
    job = Job(
        remove=remove,
        ranks=ranks,
        recipe=recipe(
            preset, scheme=scheme, allocator=allocator, settings=settings, options=options, refine=refine, heal=heal
        ),
        min_rank=min_rank,
        multiple_of=multiple_of,
        calibration=calibration,
        scheme_is_free=preset is None and scheme is None,
        form=form,
        choose=chooser,
        progress=told(progress),
    )
    compressed = job.run(
        model,
        None if store is None else Path(store),
        tokenizer=tokenizer,
        copy=copy,
        stream=stream,
        dtype=dtype,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    assert compressed is not None  # only `first_alone` gives none
    return compressed if chooser is None or chooser.reached is None else chooser.reached.told(compressed)


@shows_progress
def analyze(
    model: str | Path | PreTrainedModel | LoadedModel,
    store: str | Path,
    *,
    preset: str | None = None,
    scheme: str | None = None,
    calibration: Calibration | str | Path | None = None,
    gradients_from: str | Path | None = None,
    hidden_limit: int | None = None,
    keep_hidden: bool | None = None,
    overwrite: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    stream: bool = False,
    progress: Progress = None,
) -> AnalysisStore:
    """Calibrate and decompose every layer of `model` into the directory `store`; what is there is resumed.

    Args:
        model: a path or hub name; or a model in memory, which is not changed.
        preset: the analysis that this preset needs, instead of `scheme`.
        scheme: a name from `unirank.schemes()`; None is "whiten".
        calibration: which tokens calibrate, or the path or name of a text.
        gradients_from: a store of the same model and calibration, with gradients: they are taken from there, so that
            several schemes share one backward pass. They are the same bytes as a pass of its own would give.
        hidden_limit: hidden states of more bytes than these go into mapped files of the store's directory while it
            runs; None is a quarter of the memory that is free, and beside a GPU first the host's memory up to a quarter
            of it. It changes no byte of the store.
        keep_hidden: what enters the next layer is written into the store's directory too, so that a run that was killed
            goes on from there; without it the layers that are done run again, which takes a part of the time that they
            took and gives the same bytes. None is True on a CPU and False on a GPU.
        overwrite: replace a store of something else.

    What loads the model, `tokenizer` and `progress` are as in `compress`.

    Raises:
        InputError: unknown scheme, unusable text, an output directory that is not a store.
        StoreError: the store, or that of the gradients, belongs to other inputs; says what differs.
        NonFiniteError: names the layer or linear.
        WriteError: the disk refused; finished layers stay and the next run resumes.
    """
    chosen = recipe(preset, scheme=scheme)
    asked = calibration_of(calibration)
    report, shares = told(progress), gradients_from is not None
    announce_analysis(report, None, chosen, asked, gradients_are_given=shares)
    loaded = loaded_from(
        model,
        tokenizer,
        dtype=dtype,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        stream=stream,
        progress=report,
    )
    announce_analysis(report, loaded, chosen, asked, gradients_are_given=shares)
    return analyze_for(
        loaded,
        Path(store),
        chosen,
        asked,
        gradients_from=gradients_from,
        hidden_limit=hidden_limit,
        keep_hidden=keep_hidden,
        overwrite=overwrite,
        progress=report,
    )


@shows_progress
def dry_run(
    model: str | Path | LoadedModel,
    place: str | Path,
    *,
    preset: str | None = None,
    scheme: str | None = None,
    calibration: Calibration | str | Path | None = None,
    remove: float | None = None,
    keep_hidden: bool | None = None,
    dtype: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    stream: bool = False,
    progress: Progress = None,
) -> Needs:
    """What an analysis, and with `remove` a compression, will need: memory, disk and time. Works on one layer.

    Args:
        model: a path or hub name; or a model that `load(stream=True)` gave. One layer of it is read.
        place: where the store will be; the nearest directory that exists is written to, and left as it was.
        remove: where a checkpoint will be written, the fraction removed; the time is then that of the whole preset.
        stream: whether the run will stream.

    `preset`, `scheme`, `calibration`, `keep_hidden` and what loads the model are as in `analyze`.

    Raises InputError, NonFiniteError and WriteError like `analyze`.
    """
    chosen = recipe(preset, scheme=scheme)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code, "stream": True}
    loaded = loaded_from(model, None, dtype=dtype, device=device, **options)
    tell, more = told(progress), {"stream": stream, "keep_hidden": keep_hidden}
    if remove is None:
        return needs_of(loaded, Path(place), chosen, calibration, remove=None, progress=tell, **more)
    job = Job(
        remove=remove, ranks=None, recipe=chosen, min_rank=1, multiple_of=None, calibration=calibration, progress=tell
    )
    return job.needs(loaded, Path(place), **more)


@shows_progress
def plan(
    store: AnalysisStore | str | Path,
    remove: float | None = None,
    *,
    ranks: RankPlan | Mapping[str, Rank] | str | Path | None = None,
    preset: str | None = None,
    allocator: str | None = None,
    settings: ScoreSettings | None = None,
    options: Mapping[str, float] | None = None,
    min_rank: int = 1,
    multiple_of: int | None = None,
    form: Form | None = None,
    workbench: Workbench | None = None,
    against: str | Path | LoadedModel | None = None,
    calibration: str | Path | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = None,
) -> RankPlan:
    """Ranks for every target of `store`, at most `floor((1 - remove) Σ M N)` parameters in total.

    Args:
        store: a finished analysis, or its directory.
        remove: the fraction of the targets' weight parameters to remove, in [0, 1).
        ranks: instead of `remove` and all that shapes a plan: ranks from elsewhere (see `unirank.import_plan`).
        preset: the allocator and its settings of this preset; its second pass is `compress`'s.
        allocator: see `unirank.allocators()`; None is "unirank".
        settings: score settings of the allocators that rank components; None is UniRank.
        options: the allocator's own options by name.
        min_rank: least rank of a matrix.
        multiple_of: as in `compress`.
        form: as in `compress`.
        workbench: the dense model and calibration windows, for allocators that measure (`swift`, `lems`, `ara`); see
            `unirank.make_workbench`. The model is left as it was found.
        against: instead of `workbench`, the dense model that the store was made from; other allocators do not load it.
        calibration: with `against`, the calibration text of the store, where it was a file.
        device: where `against` is loaded.
        trust_remote_code: run modelling code that `against` brings.

    Raises:
        InputError: an argument is not legal, or `min_rank` makes `remove` unreachable.
        StoreError: the store is unfinished, damaged, lacks what the preset needs, or is too old for the form.
    """
    analysis = store if isinstance(store, AnalysisStore) else open_store(store)
    chosen = recipe(preset, allocator=allocator, settings=settings, options=options, form=form)
    if (remove is None) == (ranks is None):
        got = "neither" if remove is None else "both"
        raise InputError(f"Exactly one of remove= and ranks= is needed; {got} was given.")
    if ranks is not None:
        return import_plan(analysis, ranks_text(ranks), form=form)
    assert remove is not None
    if preset is not None:
        require(analysis, chosen)
    if multiple_of is None:
        multiple_of = fitting_multiple(
            analysis.linears, remove, chosen.multiple_of, min_rank=min_rank, form=chosen.form
        )
    request: dict[str, Any] = {"allocator": chosen.allocator, "min_rank": min_rank, "multiple_of": multiple_of}
    request |= {"options": chosen.options, "form": chosen.form}
    check_request(analysis.linears, remove, **request)
    if workbench is None and against is not None and chosen.measures:
        analysis.require_complete()
        dtype = analysis.identity.model.dtype
        report = told(progress)
        announce_planning(report, None, chosen, analysis)
        more: dict[str, Any] = {"trust_remote_code": trust_remote_code, "progress": report}
        loaded = loaded_from(against, None, dtype=dtype, device=device, **more)
        text = None if calibration is None else os.fspath(calibration)
        workbench = workbench_for(loaded, analysis, text, report)
    if workbench is not None and workbench.progress is silent:
        workbench = dataclasses.replace(workbench, progress=told(progress))
    if workbench is not None and chosen.measures:
        announce_planning(workbench.progress, workbench.loaded, chosen, analysis)
    return plan_ranks(analysis, remove, settings=chosen.settings, workbench=workbench, **request)
