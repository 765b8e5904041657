"""The stages of a compression, wired together: what `unirank.compress` and the command line run."""

from __future__ import annotations

import copy as copying
import dataclasses
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from unirank.analysis.calibration import Calibration, calibration_of
from unirank.analysis.store import MANIFEST, AnalysisStore, open_store
from unirank.demands import needs_of, require, with_gradients
from unirank.display import shows_progress, told
from unirank.distributed import rank
from unirank.errors import InputError, capitalised
from unirank.inputs import loaded_from, ranks_text
from unirank.planning.imported_ranks import form_of, import_plan, read_rank_file, read_ranks
from unirank.planning.ranks import check_request, fitting_multiple, plan_ranks
from unirank.progress import OnProgress, Progress, Stage, silent
from unirank.rank_plan import RankPlan, check_form
from unirank.recipes import Preset
from unirank.stages import announce_job
from unirank.types import Form, LinearSpec, LoadedModel, Rank

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from unirank.analysis.needs import Needs
    from unirank.compression.checkpoint import CompressedModel
    from unirank.compression.refine import Refine
    from unirank.planning.allocator.base import Workbench


class _Scratch:
    """A temporary directory that is gone when this object is, or the process."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="unirank-"))
        self.remove = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


class Chooser(Protocol):
    """Finds how much to remove where the user said what must be reached instead (`unirank.tradeoff`)."""

    @property
    def whole_model_for(self) -> str:
        """What needs the whole model in memory, in words; empty where nothing does."""
        ...

    def check(self, job: Job, loaded: LoadedModel) -> None:
        """Raise InputError for what can be known to be wrong before the analysis."""

    def stages(self, job: Job, loaded: LoadedModel, windows: int, window: int) -> list[Stage]:
        """What finding it costs; `windows` of `window` tokens calibrate."""
        ...

    def __call__(self, job: Job, loaded: LoadedModel, store: AnalysisStore) -> float:
        """The fraction to remove; `loaded` is dense, and is dense again afterwards."""
        ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """What `compress` was asked; `run` is the wiring of its stages. Fields are arguments of `compress`, but for
    `choose`, which says what to remove once the store is there."""

    remove: float | None
    ranks: RankPlan | Mapping[str, Rank] | str | Path | None
    recipe: Preset
    min_rank: int
    multiple_of: int | None  # None is the recipe's, as far as the budget has room for it
    calibration: Calibration | str | Path | None
    scheme_is_free: bool = False  # nobody asked for a scheme: that of a finished store will do
    form: Form | None = None  # asked for; None is the recipe's, or that of a plan that is given
    choose: Chooser | None = None
    then: tuple[str, ...] = ()  # stages that the caller runs behind it, such as "save"
    progress: OnProgress = silent

    def run(
        self,
        model: str | Path | PreTrainedModel | LoadedModel,
        place: Path | None,
        *,
        overwrite: bool = False,
        copy: bool = False,
        first_alone: bool = False,
        work: Path | None = None,
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
            work: where healing keeps finished layers; None is a temporary directory.
            loading: of `unirank.load`.
        """
        self.check(stream=stream)
        self._announce(None)
        loaded = loaded_from(model, tokenizer, stream=stream, progress=self.progress, **loading)
        self.check_model(loaded)
        self._announce(loaded)
        scratch = _Scratch()
        try:
            store = self.analyze(loaded, place or scratch.path / "store", overwrite=overwrite)
            if first_alone and rank() > 0:
                scratch.remove()
                return None
            self._announce(loaded, store)
            compressed = self.settled(loaded, store).finish(
                loaded, store, copy=copy, work=work or scratch.path / "work"
            )
        except BaseException:
            scratch.remove()
            raise
        if compressed.pages is not None:  # a streamed model reads its factors when it is saved
            return dataclasses.replace(compressed, scratch=scratch)
        scratch.remove()
        return compressed

    def _announce(self, loaded: LoadedModel | None, store: AnalysisStore | None = None) -> None:
        """Tell who watches which stages come, as well as that is known by now."""
        asked = calibration_of(self.calibration) if store is None else store.identity.calibration
        search: list[Stage] = []
        if self.choose is not None and loaded is not None:
            search = self.choose.stages(self, loaded, asked.windows, asked.window)
        given = self.ranks is not None
        announce_job(self.progress, loaded, self.recipe, asked, ranks_are_given=given, search=search, then=self.then)

    @property
    def tokens_for(self) -> str:
        """What needs calibration tokens after the analysis, in words; where ranks are given, no allocator does."""
        return self.recipe.needs_tokens_for if self.ranks is None else " and ".join(self.recipe.afterwards)

    def settled(self, loaded: LoadedModel, store: AnalysisStore) -> Job:
        """The job with its `remove`: as it is, or chosen."""
        if self.choose is None:
            return self
        return dataclasses.replace(self, remove=self.choose(self, loaded, store), choose=None)

    def check(self, *, stream: bool = False, dry_run: bool = False) -> None:
        """Raise InputError for what can be known to be wrong before a model is loaded."""
        given = {"remove": self.remove, "ranks": self.ranks, "target": self.choose}
        named = [f"{name}=" for name, value in given.items() if value is not None]
        if len(named) != 1:
            got = " and ".join(named) if named else "none of them"
            raise InputError(f"Exactly one of remove=, ranks= and target= is needed; {got} was given.")
        if self.form is not None:
            check_form(self.form)
        if self.ranks is None:
            self._check_budget(())
        elif isinstance(self.ranks, str | os.PathLike):
            read_rank_file(Path(self.ranks))
        for name, asked in (("stream", stream), ("dry_run", dry_run)):
            if asked and self.choose is not None and self.choose.whole_model_for:
                raise InputError(
                    f"{name}=True covers analysis and truncation; {self.choose.whole_model_for} would run the whole "
                    f"model. Leave out {name}=True, or say what to remove with remove=."
                )
        if stream and self.tokens_for:
            raise InputError(
                f"stream=True covers analysis and truncation; {self.tokens_for} would run the whole model. "
                "Leave out stream=True, or take preset='unirank', which does neither."
            )

    def needs(self, loaded: LoadedModel, place: Path, *, stream: bool, **more: Any) -> Needs:
        """What `run` will need, from the work on one layer; raises what that would find wrong before the analysis.

        Args:
            loaded: streamed, whatever the run will do, which is `stream`.
            more: of `unirank.analysis.needs.dry_run`.
        """
        self.check(stream=stream, dry_run=True)
        self.check_model(loaded, dry_run=True)
        more |= {"remove": self.remove or 0.0, "ranks_are_given": self.ranks is not None, "progress": self.progress}
        return needs_of(loaded, place, self.recipe, self.calibration, stream=stream, **more)

    def check_model(self, loaded: LoadedModel, *, dry_run: bool = False) -> None:
        """Raise InputError where this model cannot be compressed as asked; before any expensive work.

        Args:
            dry_run: `loaded` is streamed, whatever the run will do, so it cannot be asked to write.
        """
        loaded.require_dense()
        if self.tokens_for and not dry_run:
            loaded.require_whole(capitalised(self.tokens_for))
        if self.recipe.afterwards:
            loaded.require_no_experts(capitalised(" and ".join(self.recipe.afterwards)))
        if self.recipe.heal is not None and self.recipe.heal.samples and not dry_run:
            from unirank.finetuning.sampling import check_can_sample

            check_can_sample(loaded.model, loaded.tokenizer)
        if self.choose is not None:
            if self.choose.whole_model_for:
                loaded.require_whole(capitalised(self.choose.whole_model_for))
            self.choose.check(self, loaded)
        if self.ranks is None:
            self._check_budget(loaded.linears)
        if self.ranks is not None:
            read_ranks(loaded.linears, ranks_text(self.ranks), form=self.form)

    def _check_budget(self, linears: Sequence[LinearSpec]) -> None:
        """Of what is still to be chosen, all but the fraction itself can be checked."""
        check_request(
            linears,
            self.remove or 0.0,
            allocator=self.recipe.allocator,
            min_rank=self.min_rank,
            multiple_of=self.multiple_for(linears),
            options=self.recipe.options,
            form=self.form or self.recipe.form,
        )

    def multiple_for(self, linears: Sequence[LinearSpec]) -> int:
        """What ranks will be multiples of."""
        if self.multiple_of is not None:
            return self.multiple_of
        form = self.form or self.recipe.form
        return fitting_multiple(linears, self.remove or 0.0, self.recipe.multiple_of, min_rank=self.min_rank, form=form)

    def analyze(self, loaded: LoadedModel, place: Path, *, overwrite: bool = False) -> AnalysisStore:
        """The store at `place`: as it is when finished and no other calibration is asked for; else made, or resumed.

        A text alone (no `Calibration`) says where the text of a finished store is; all else is the store's.

        Raises StoreError where a finished store lacks what the recipe needs, with the command that makes one; and like
        `unirank.analyze`.
        """
        asked = None if self.calibration is None else calibration_of(self.calibration)
        if not isinstance(self.calibration, Calibration) and not overwrite and (place / MANIFEST).is_file():
            store = open_store(place)
            if store.complete and (asked is None or _is_text_of(store, asked.text, loaded)):
                require(store, self._recipe_for(store))
                store.require_form(self._form)
                return store
        return analyze_for(loaded, place, self.recipe, asked, overwrite=overwrite, progress=self.progress)

    @property
    def _form(self) -> Form:
        """In which low-rank matrices will be stored."""
        if self.ranks is not None:
            return form_of(ranks_text(self.ranks), self.form)
        return self.form or self.recipe.form

    def _recipe_for(self, store: AnalysisStore) -> Preset:
        """The recipe, with the store's scheme where nobody asked for one."""
        free = self.scheme_is_free
        return dataclasses.replace(self.recipe, scheme=store.identity.scheme) if free else self.recipe

    @property
    def text(self) -> str | None:
        """The calibration text, where the user named one."""
        return None if self.calibration is None else calibration_of(self.calibration).text

    def workbench(self, loaded: LoadedModel, store: AnalysisStore) -> Workbench | None:
        """For what runs the model after the analysis; None where nothing does."""
        return workbench_for(loaded, store, self.text, self.progress) if self.tokens_for else None

    def planned(self, store: AnalysisStore, workbench: Workbench | None) -> RankPlan:
        """The ranks."""
        if self.ranks is not None:
            return import_plan(store, ranks_text(self.ranks), form=self.form)
        assert self.remove is not None
        return plan_ranks(
            store,
            self.remove,
            allocator=self.recipe.allocator,
            settings=self.recipe.settings,
            min_rank=self.min_rank,
            multiple_of=self.multiple_for(store.linears),
            options=self.recipe.options,
            workbench=workbench,
            form=self._form,
        )

    def finish(self, loaded: LoadedModel, store: AnalysisStore, *, copy: bool, work: Path) -> CompressedModel:
        """Plan, apply and heal. The model is changed in place unless `copy` is set, or it is needed for healing."""
        heals = self.recipe.heal
        workbench = self.workbench(loaded, store)
        ranks = self.planned(store, workbench)
        windows = None if workbench is None else workbench.windows
        copy = copy or heals is not None
        compressed = apply(
            loaded, store, ranks, refine=self.recipe.refine, windows=windows, copy=copy, progress=self.progress
        )
        if heals is None:
            return compressed
        from unirank.analysis.redraw import calibration_to_redraw
        from unirank.finetuning.healing import heal

        tokens = calibration_to_redraw(store, self.text)
        return heal(compressed, tokens, heals, work=work, against=loaded, progress=self.progress)


@shows_progress
def apply(
    loaded: LoadedModel,
    store: AnalysisStore,
    plan: RankPlan,
    *,
    refine: Refine | None = None,
    windows: torch.Tensor | None = None,
    copy: bool = False,
    progress: Progress = None,
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
        loaded.require_no_experts("The second pass")
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
        report = run_refine(loaded, store, plan, windows, refine, progress=told(progress))
        plan = dataclasses.replace(plan, settings={**plan.settings, "refine": asdict(refine)})
    return CompressedModel(
        loaded.model,
        loaded.tokenizer,
        plan,
        report,
        store.identity,
        loaded.source,
        pages=loaded.pages,
        companions=loaded.companions,
        store=store.path,
    )


def analyze_for(
    loaded: LoadedModel,
    place: Path,
    chosen: Preset,
    calibration: Calibration | None,
    *,
    gradients_from: str | Path | None = None,
    hidden_limit: int | None = None,
    keep_hidden: bool | None = None,
    overwrite: bool = False,
    progress: OnProgress = silent,
) -> AnalysisStore:
    from unirank.analysis.fill_store import fill_store

    asked = calibration or Calibration()
    if gradients_from is None:
        asked = with_gradients(asked, chosen)
    return fill_store(
        loaded,
        place,
        scheme=chosen.scheme,
        calibration=asked,
        gradients_from=gradients_from,
        hidden_limit=hidden_limit,
        keep_hidden=keep_hidden,
        overwrite=overwrite,
        progress=progress,
    )


def workbench_for(loaded: LoadedModel, store: AnalysisStore, text: str | None, progress: OnProgress) -> Workbench:
    from unirank.planning.measuring import make_workbench

    return make_workbench(loaded, store, text=text, progress=progress)


def _is_text_of(store: AnalysisStore, text: str, loaded: LoadedModel) -> bool:
    """Whether `store` was calibrated on `text`. Raises InputError like `read_text`."""
    from unirank.analysis.redraw import is_text_of

    return is_text_of(loaded, store, text)
