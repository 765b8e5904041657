"""The whole job in one call, and its stages: the only place where they are put together.

The command line, the demo and the benches call what stands here.
"""

from __future__ import annotations

import copy as copying
import dataclasses
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unirank.analysis.calibration import GRADIENT_WINDOWS, Calibration, calibration_of
from unirank.analysis.store import MANIFEST, AnalysisStore, open_store
from unirank.distributed import rank
from unirank.errors import InputError, StoreError
from unirank.planning.imported_ranks import import_plan, read_rank_file, read_ranks
from unirank.planning.ranks import check_request, plan_ranks
from unirank.progress import OnProgress, silent
from unirank.rank_plan import RankPlan
from unirank.recipes import Preset, recipe
from unirank.types import LoadedModel, Rank

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from unirank.analysis.needs import Needs
    from unirank.compression.checkpoint import CompressedModel
    from unirank.compression.refine import Refine
    from unirank.planning.allocator.base import Workbench
    from unirank.planning.score import ScoreSettings


def compress(
    model: str | Path | PreTrainedModel | LoadedModel,
    remove: float | None = None,
    *,
    ranks: RankPlan | Mapping[str, Rank] | str | Path | None = None,
    preset: str | None = None,
    scheme: str | None = None,
    allocator: str | None = None,
    settings: ScoreSettings | None = None,
    options: Mapping[str, float] | None = None,
    refine: Refine | None = None,
    min_rank: int = 1,
    multiple_of: int = 1,
    calibration: Calibration | str | Path | None = None,
    store: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    stream: bool = False,
    copy: bool = False,
    progress: OnProgress = silent,
) -> CompressedModel:
    """Compress a causal language model by low-rank decomposition, at an exact parameter budget.

    Args:
        model: a path or hub name; or a model in memory, which is changed in place unless `copy` is set.
        remove: the fraction of the decoder linears' weight parameters to remove, in [0, 1).
        ranks: instead of `remove`: a plan, a JSON file of one, or names and ranks (see `unirank.import_plan`).
        preset: a name from `unirank.presets()`, instead of the next five.
        scheme: a name from `unirank.schemes()`; None is "whiten".
        allocator: a name from `unirank.allocators()`; None is "unirank".
        settings: of allocators that score components; None is UniRank.
        options: of the allocator.
        refine: a second pass over the calibration tokens (see `unirank.Refine`); None takes the factors as they are.
        min_rank: the least rank.
        multiple_of: what ranks are multiples of.
        calibration: which tokens calibrate, or the path or name of a text; None takes a finished `store` as it is,
            else 64 windows of 512 tokens of Python's documentation.
        store: where to keep the analysis (resumed when interrupted, reused for other ratios); None keeps none.
        tokenizer: needed when `model` is a `PreTrainedModel`.
        copy: compress a copy of a model in memory, which then stays dense.

    `dtype`, `device`, `revision`, `trust_remote_code` and `stream` are for a path or name: see `unirank.load`.

    Raises InputError, StoreError, NonFiniteError or WriteError as the stages do.
    """
    job = Job(
        remove=remove,
        ranks=ranks,
        recipe=recipe(preset, scheme=scheme, allocator=allocator, settings=settings, options=options, refine=refine),
        min_rank=min_rank,
        multiple_of=multiple_of,
        calibration=None if calibration is None else calibration_of(calibration),
        progress=progress,
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
    return compressed


class _Scratch:
    """A temporary directory that is gone when this object is, or the process."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="unirank-"))
        self.remove = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What `compress` was asked; `run` is the wiring of its stages. Fields are arguments of `compress`."""

    remove: float | None
    ranks: RankPlan | Mapping[str, Rank] | str | Path | None
    recipe: Preset
    min_rank: int
    multiple_of: int
    calibration: Calibration | None
    progress: OnProgress = silent

    def run(
        self,
        model: str | Path | PreTrainedModel | LoadedModel,
        place: Path | None,
        *,
        overwrite: bool = False,
        copy: bool = False,
        first_alone: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
        stream: bool = False,
        **loading: Any,
    ) -> CompressedModel | None:
        """Check, load, analyze, plan and apply.

        Args:
            place: of the store; None is a temporary one.
            overwrite: replace a store of something else there.
            first_alone: of several processes under torchrun only the first goes on behind the analysis, the others get
                None.
            loading: of `unirank.load`.
        """
        self.check(stream=stream)
        loaded = _loaded(model, tokenizer, stream=stream, **loading)
        self.check_model(loaded)
        scratch = None
        if place is None:
            scratch = _Scratch()
            place = scratch.path / "store"
        try:
            store = self.analyze(loaded, place, overwrite=overwrite)
            compressed = None if first_alone and rank() > 0 else self.finish(loaded, store, copy=copy)
        except BaseException:
            if scratch is not None:
                scratch.remove()
            raise
        if scratch is None or compressed is None:
            return compressed
        if compressed.pages is not None:  # a streamed model reads its factors when it is saved
            return dataclasses.replace(compressed, scratch=scratch)
        scratch.remove()
        return compressed

    def check(self, *, stream: bool = False, dry_run: bool = False) -> None:
        """Raise InputError for what can be known to be wrong before a model is loaded."""
        if (self.remove is None) == (self.ranks is None):
            got = "neither" if self.remove is None else "both"
            raise InputError(f"Exactly one of remove= and ranks= is needed; {got} was given.")
        if self.remove is not None:
            self._check_budget(())
        elif isinstance(self.ranks, str | os.PathLike):
            read_rank_file(Path(self.ranks))
        if self.recipe.needs_tokens:
            for name, given in (("stream", stream), ("dry_run", dry_run)):
                if given:
                    raise InputError(
                        f"{name}=True covers analysis and truncation; {self.recipe.needs_tokens_for} would run the "
                        "whole model."
                    )

    def check_model(self, loaded: LoadedModel) -> None:
        """Raise InputError where this model cannot be compressed as asked; before any expensive work."""
        loaded.require_dense()
        if self.recipe.needs_tokens:
            loaded.require_whole(self.recipe.needs_tokens_for.capitalize())
        if self.remove is not None:
            self._check_budget(loaded.linears)
        if self.ranks is not None:
            read_ranks(loaded.linears, _ranks_text(self.ranks))

    def _check_budget(self, linears: Any) -> None:
        assert self.remove is not None
        check_request(
            linears,
            self.remove,
            allocator=self.recipe.allocator,
            min_rank=self.min_rank,
            multiple_of=self.multiple_of,
            options=self.recipe.options,
        )

    def analyze(self, loaded: LoadedModel, place: Path, *, overwrite: bool = False) -> AnalysisStore:
        """The store at `place`: as it is when finished and no calibration is asked for; else analyzed, or resumed.

        Raises StoreError where a finished store lacks what the recipe needs, with the command that makes one; and like
        `unirank.analyze`.
        """
        if self.calibration is None and not overwrite and (place / MANIFEST).is_file():
            store = open_store(place)
            if store.complete:
                require(store, self.recipe)
                return store
        return _analyze(loaded, place, self.recipe, self.calibration, overwrite=overwrite, progress=self.progress)

    def finish(self, loaded: LoadedModel, store: AnalysisStore, *, copy: bool = False) -> CompressedModel:
        """Plan and apply. The model is changed in place unless `copy` is set."""
        workbench = None
        if self.recipe.needs_tokens:
            text = None if self.calibration is None else self.calibration.text
            workbench = _workbench(loaded, store, text, self.progress)
        if self.ranks is not None:
            ranks = import_plan(store, _ranks_text(self.ranks))
        else:
            assert self.remove is not None
            ranks = plan_ranks(
                store,
                self.remove,
                allocator=self.recipe.allocator,
                settings=self.recipe.settings,
                min_rank=self.min_rank,
                multiple_of=self.multiple_of,
                options=self.recipe.options,
                workbench=workbench,
            )
        windows = None if workbench is None else workbench.windows
        return apply(
            loaded, store, ranks, refine=self.recipe.refine, windows=windows, copy=copy, progress=self.progress
        )


def analyze(
    model: str | Path | PreTrainedModel | LoadedModel,
    store: str | Path,
    *,
    preset: str | None = None,
    scheme: str | None = None,
    calibration: Calibration | str | Path | None = None,
    gradients_from: str | Path | None = None,
    hidden_limit: int | None = None,
    overwrite: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    stream: bool = False,
    progress: OnProgress = silent,
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
            runs; None is a quarter of the memory that is free. It changes no byte of the store.
        overwrite: replace a store of something else.

    What loads the model, and `tokenizer`, are as in `compress`.

    Raises:
        InputError: unknown scheme, unusable text, an output directory that is not a store.
        StoreError: the store, or that of the gradients, belongs to other inputs; says what differs.
        NonFiniteError: names the layer or linear.
        WriteError: the disk refused; finished layers stay and the next run resumes.
    """
    chosen = recipe(preset, scheme=scheme)
    asked = calibration_of(calibration)
    loaded = _loaded(
        model,
        tokenizer,
        dtype=dtype,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        stream=stream,
    )
    return _analyze(
        loaded,
        Path(store),
        chosen,
        asked,
        gradients_from=gradients_from,
        hidden_limit=hidden_limit,
        overwrite=overwrite,
        progress=progress,
    )


def dry_run(
    model: str | Path | LoadedModel,
    place: str | Path,
    *,
    preset: str | None = None,
    scheme: str | None = None,
    calibration: Calibration | str | Path | None = None,
    remove: float | None = None,
    dtype: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    stream: bool = False,
    progress: OnProgress = silent,
) -> Needs:
    """What an analysis, and with `remove` a compression, will need: memory, disk and time. Works on one layer.

    Args:
        model: a path or hub name; or a model that `load(stream=True)` gave. One layer of it is read.
        place: where the store will be; the nearest directory that exists is written to, and left as it was.
        remove: where a checkpoint will be written, the fraction removed.
        stream: whether the run will stream.

    `preset`, `scheme`, `calibration` and what loads the model are as in `analyze`.

    Raises InputError, NonFiniteError and WriteError like `analyze`.
    """
    from unirank.analysis import needs

    chosen = recipe(preset, scheme=scheme)
    asked = _with_gradients(calibration_of(calibration), chosen)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code, "stream": True}
    loaded = _loaded(model, None, dtype=dtype, device=device, **options)
    return needs.dry_run(
        loaded, Path(place), scheme=chosen.scheme, calibration=asked, stream=stream, remove=remove, progress=progress
    )


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
    multiple_of: int = 1,
    workbench: Workbench | None = None,
    against: str | Path | LoadedModel | None = None,
    calibration: str | Path | None = None,
    device: str | None = None,
    progress: OnProgress = silent,
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
        multiple_of: ranks are multiples of this (dense matrices aside).
        workbench: the dense model and calibration windows, for allocators that measure (`swift`, `lems`, `ara`); see
            `unirank.make_workbench`. The model is left as it was found.
        against: instead of `workbench`, the dense model that the store was made from; other allocators do not load it.
        calibration: with `against`, the calibration text of the store, where it was a file.
        device: where `against` is loaded.

    Raises:
        InputError: an argument is not legal, or `min_rank` makes `remove` unreachable.
        StoreError: the store is unfinished, damaged, or lacks what the preset needs.
    """
    analysis = store if isinstance(store, AnalysisStore) else open_store(store)
    chosen = recipe(preset, allocator=allocator, settings=settings, options=options)
    if (remove is None) == (ranks is None):
        got = "neither" if remove is None else "both"
        raise InputError(f"Exactly one of remove= and ranks= is needed; {got} was given.")
    if ranks is not None:
        return import_plan(analysis, _ranks_text(ranks))
    assert remove is not None
    if preset is not None:
        require(analysis, chosen)
    request: dict[str, Any] = {"allocator": chosen.allocator, "min_rank": min_rank, "multiple_of": multiple_of}
    request["options"] = chosen.options
    check_request(analysis.linears, remove, **request)
    if workbench is None and against is not None and chosen.measures:
        analysis.require_complete()
        loaded = _loaded(against, None, dtype=analysis.identity.model.dtype, device=device)
        text = None if calibration is None else os.fspath(calibration)
        workbench = _workbench(loaded, analysis, text, progress)
    return plan_ranks(analysis, remove, settings=chosen.settings, workbench=workbench, **request)


def apply(
    loaded: LoadedModel,
    store: AnalysisStore,
    plan: RankPlan,
    *,
    refine: Refine | None = None,
    windows: torch.Tensor | None = None,
    copy: bool = False,
    progress: OnProgress = silent,
) -> CompressedModel:
    """Compress `loaded` in place by `plan`: from the factors of `store`, or with `refine` by a second pass.

    Args:
        windows: calibration tokens of the second pass, int64 `[W, T]`, as `make_workbench(...).windows` gives them.
        copy: compress a copy, so that `loaded` stays dense; a model that is streamed cannot be copied.

    Raises like `truncate` and `unirank.compression.refine.refine`.
    """
    from unirank.compression.checkpoint import CompressedModel
    from unirank.compression.refine import refine as run_refine
    from unirank.compression.truncation import truncate

    loaded.require_dense()
    if refine is not None:
        loaded.require_whole("The second pass")
        if windows is None:
            raise InputError("The second pass needs calibration tokens: apply(..., refine=..., windows=...).")
    if copy:
        loaded.require_whole("A copy")
        loaded = dataclasses.replace(loaded, model=copying.deepcopy(loaded.model))
    if refine is None:
        report = truncate(loaded, store, plan, progress=progress)
    else:
        assert windows is not None
        report = run_refine(loaded, store, plan, windows, refine, progress=progress)
        plan = dataclasses.replace(plan, settings={**plan.settings, "refine": asdict(refine)})
    return CompressedModel(
        loaded.model, loaded.tokenizer, plan, report, store.identity, loaded.source, pages=loaded.pages
    )


def require(store: AnalysisStore, chosen: Preset) -> None:
    """Raise StoreError where a finished store lacks what a recipe needs: says what, and which command makes it."""
    scheme = store.identity.scheme
    command = f"unirank analyze MODEL -o NEW-STORE --scheme {chosen.scheme}"
    if chosen.needs_gradients:
        command += f" --gradients-from {store.path}" if store.has_gradients else " --gradients 32"
    if scheme != chosen.scheme:
        raise StoreError(
            f"The store {store.path} has the scheme {scheme}, and {chosen.scheme} is needed; make one with: {command}."
        )
    if chosen.needs_gradients and not store.has_gradients:
        raise StoreError(
            f"The store {store.path} has no gradients, and {chosen.needs_gradients_for} needs them; make one with: "
            f"{command}."
        )


def _analyze(
    loaded: LoadedModel,
    place: Path,
    chosen: Preset,
    calibration: Calibration | None,
    *,
    gradients_from: str | Path | None = None,
    hidden_limit: int | None = None,
    overwrite: bool = False,
    progress: OnProgress = silent,
) -> AnalysisStore:
    from unirank.analysis.fill_store import fill_store

    asked = calibration or Calibration()
    if gradients_from is None:
        asked = _with_gradients(asked, chosen)
    return fill_store(
        loaded,
        place,
        scheme=chosen.scheme,
        calibration=asked,
        gradients_from=gradients_from,
        hidden_limit=hidden_limit,
        overwrite=overwrite,
        progress=progress,
    )


def _with_gradients(calibration: Calibration, chosen: Preset) -> Calibration:
    """Gradients are made where the recipe needs them and nothing is said about them (**choice**: 32 windows)."""
    if not chosen.needs_gradients or calibration.gradient_windows is not None:
        if chosen.needs_gradients and calibration.gradient_windows == 0:
            raise InputError(
                f"{chosen.needs_gradients_for.capitalize()} needs gradients; Calibration.gradient_windows must be at "
                "least 1."
            )
        return calibration
    return dataclasses.replace(calibration, gradient_windows=min(GRADIENT_WINDOWS, calibration.windows))


def _workbench(loaded: LoadedModel, store: AnalysisStore, text: str | None, progress: OnProgress) -> Workbench:
    from unirank.planning.measuring import make_workbench

    return make_workbench(loaded, store, text=text, progress=progress)


def _ranks_text(ranks: RankPlan | Mapping[str, Rank] | str | Path) -> str:
    """Ranks as JSON text, as `import_plan` reads it."""
    if isinstance(ranks, RankPlan):
        return ranks.to_json()
    if isinstance(ranks, Mapping):
        return json.dumps({"ranks": dict(ranks)})
    return read_rank_file(Path(ranks))


def _loaded(
    model: str | Path | PreTrainedModel | LoadedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    dtype: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    stream: bool = False,
) -> LoadedModel:
    if isinstance(model, LoadedModel):
        return model
    from unirank.models.loading import describe, load

    if isinstance(model, str | Path):
        return load(
            str(model),
            dtype=dtype,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            stream=stream,
        )
    if tokenizer is None:
        raise InputError("A model in memory needs its tokenizer=: unirank.compress(model, remove, tokenizer=...).")
    return describe(model, tokenizer)
