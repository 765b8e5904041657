"""Points of a curve: one model at one removed fraction, made, measured and kept."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unirank.analysis.identity import weights_hash
from unirank.analysis.redraw import calibration_to_redraw, check_model
from unirank.analysis.store import AnalysisStore
from unirank.demands import require
from unirank.disk.hashing import sha256_tensors
from unirank.errors import InputError, UnirankError
from unirank.evaluation.measured_curve import DENSE_PRESET, CurvePoint
from unirank.evaluation.perplexity import EvalWindows, prepare
from unirank.evaluation.speed import tokens_per_second
from unirank.job import Job, apply, workbench_for
from unirank.progress import OnProgress, silent
from unirank.provenance import device_name, meta, versions
from unirank.rank_plan import RankPlan, budget_of
from unirank.recipes import Preset
from unirank.recipes import preset as preset_of
from unirank.text.windows import BUILTIN_HELD_OUT
from unirank.tradeoff.kept import Kept
from unirank.tradeoff.sizes import Sizes
from unirank.tradeoff.swapping import Swapping, added_biases, on_loan
from unirank.types import DENSE, Form, LoadedModel, Rank

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from unirank.planning.allocator.base import Workbench


class Points:
    """Measures one model at any removed fraction, of any recipe.

    The model is loaded once. Whatever happens in `dense` and `at`, it is the same dense model with the same tensors
    afterwards. A point has the perplexity, to the bit on a CPU, that `evaluate` gives for the checkpoint that
    `compress` saves with the same store and recipe.

    Recipes without a second pass only swap matrices whose rank changed since the last point; beside the model, memory
    holds the low-rank matrices of one point (at most as much as the targets) and aligned copies of what stays dense (at
    most the rest). A second pass runs on the model itself and is taken back, in the same memory and that of the pass;
    healing needs a second model, as `compress` does.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        store_of: Callable[[Preset], AnalysisStore],
        *,
        texts: Sequence[str | EvalWindows] = (BUILTIN_HELD_OUT,),
        window: int | None = None,
        limit: int | None = None,
        split: str | None = None,
        calibration: str | None = None,
        speed: bool = False,
        place: Path | None = None,
        progress: OnProgress = silent,
    ) -> None:
        """Read the texts, and nothing else.

        Args:
            loaded: the dense model.
            store_of: a finished analysis for a recipe; asked once for each scheme, and for gradients.
            texts: of the perplexities, as in `evaluate`, like `window`, `limit` and `split`; or windows that are cut
                already. The first one counts where one number is needed.
            calibration: the text of the stores, where it was a file, for what runs the model on it again.
            speed: also measure tokens a second.
            place: directory in which each point is kept as soon as it is measured, and found again by the next run with
                the same model, store, tokens, recipe, fraction, versions and kind of device; None keeps them in memory.

        Raises InputError for a text that cannot be used, a model that is compressed or streamed, and where `place` is
        something else.
        """
        loaded.require_dense()
        loaded.require_whole("A curve")
        if not texts:
            raise InputError("texts = () is not legal; at least one text is needed.")
        self.loaded, self.speed, self.calibration, self.progress = loaded, speed, calibration, progress
        self._kept = None if place is None else Kept(place)
        if self._kept is not None:
            self._kept.check()
        asked = {"window": window, "limit": limit, "split": split}
        self.texts = [
            text if isinstance(text, EvalWindows) else prepare(loaded.model, loaded.tokenizer, text=text, **asked)
            for text in texts
        ]
        for text in self.texts:
            if [other.sha256 for other in self.texts].count(text.sha256) > 1:
                raise InputError(f"The text {text.name} has the content of another one; give it once.")
        self.sizes = Sizes.of(loaded)
        self.evaluated = 0  # models that were really run, and not found
        self._store_of = store_of
        self._stores: dict[tuple[str, bool], AnalysisStore] = {}
        self._benches: dict[str, Workbench] = {}
        self._swapping = Swapping(loaded)
        self._known: dict[str, CurvePoint] = {}
        self._weights: str | None = None

    # -- what is asked ------------------------------------------------------------------------------------------------

    def dense(self) -> CurvePoint:
        """The model that nothing was removed from, as `evaluate` sees it."""

        def make() -> CurvePoint:
            start = time.perf_counter()
            ranks: dict[str, Rank] = {spec.name: DENSE for spec in self.loaded.linears}
            with on_loan(self.loaded):
                measured = self._measure(self.loaded.model, "dense")
            targets = self.sizes.targets
            return CurvePoint(
                preset=DENSE_PRESET,
                remove=0.0,
                removed_of_targets=0.0,
                removed_of_model=0.0,
                used=targets,
                budget=targets,
                parameters=self.sizes.parameters,
                bytes=self.sizes.table(ranks, "factors"),
                flops=self.sizes.flops(targets),
                seconds=time.perf_counter() - start,
                **measured,
            )

        return self._found({"recipe": None}, make)

    def check(
        self,
        preset: str | Preset,
        remove: float,
        *,
        form: Form | None = None,
        min_rank: int = 1,
        multiple_of: int | None = None,
    ) -> None:
        """Raise InputError where `at` would, before any work: what is not legal, or out of reach of `min_rank`."""
        job = self._job(preset, remove, form, min_rank, multiple_of)
        job.check()
        job.check_model(self.loaded)

    def at(
        self,
        preset: str | Preset,
        remove: float,
        *,
        form: Form | None = None,
        min_rank: int = 1,
        multiple_of: int | None = None,
        name: str | None = None,
    ) -> CurvePoint:
        """The model that `compress` makes at `remove`; nothing is written but the point.

        Args:
            preset: a name from `unirank.presets()`, or a recipe.
            remove: in [0, 1); 0 is the dense model.
            form: as in `unirank.compress`.
            min_rank: the same.
            multiple_of: the same.
            name: of the point's preset, where `preset` is a recipe; None is its scheme and allocator.

        Raises InputError like `check`; StoreError where the store lacks what the recipe needs; NonFiniteError for a
        factor or a loss that is no number; WriteError when the disk refuses the point.
        """
        self.check(preset, remove, form=form, min_rank=min_rank, multiple_of=multiple_of)
        if remove == 0:
            return self.dense()
        job = self._job(preset, remove, form, min_rank, multiple_of)
        recipe = job.recipe
        if name is None:
            name = preset if isinstance(preset, str) else f"{recipe.scheme}+{recipe.allocator}"
        store = self.store(recipe)
        multiple = job.multiple_for(self.loaded.linears)
        conditions = {
            "recipe": asdict(dataclasses.replace(recipe, multiple_of=multiple)),
            "store": store.digest,
            "remove": float(remove),
            "min_rank": min_rank,
            "preset": name,
        }
        return self._found(conditions, lambda: self._point(name, recipe, store, remove, min_rank, multiple))

    def store(self, recipe: Preset) -> AnalysisStore:
        """The analysis that a recipe is made from, checked against the model once.

        Raises StoreError where it is unfinished or lacks what the recipe needs, InputError where it is another model's.
        """
        key = recipe.scheme, recipe.needs_gradients
        if key not in self._stores:
            store = self._store_of(recipe)
            store.require_complete()
            require(store, recipe)
            check_model(self.loaded, store)
            self._stores[key] = store
        self._stores[key].require_form(recipe.form)
        return self._stores[key]

    def plan(
        self,
        preset: str | Preset,
        remove: float,
        *,
        form: Form | None = None,
        min_rank: int = 1,
        multiple_of: int | None = None,
    ) -> RankPlan:
        """The ranks of a point, for what can be told without running it (`sizes`). Arguments and errors as in `at`."""
        job = self._job(preset, remove, form, min_rank, multiple_of)
        store = self.store(job.recipe)
        return job.planned(store, self._bench(store) if job.recipe.measures else None)

    @property
    def rebuilt(self) -> int:
        """Matrices that the last point without a second pass needed new."""
        return self._swapping.rebuilt

    @property
    def meta(self) -> dict[str, Any]:
        """Versions, device and hashes, for files."""
        stores = {store.path.name: store for store in self._stores.values()}
        return meta(
            self.loaded.device,
            seed={name: store.identity.calibration.seed for name, store in stores.items()},
            weights_sha256=self.weights,
            stores={name: store.digest for name, store in stores.items()},
            texts={text.name: text.sha256 for text in self.texts},
        )

    @property
    def weights(self) -> str:
        """Hash of the dense model (see `weights_hash`), made once."""
        if self._weights is None:
            self._weights = weights_hash(self.loaded)
        return self._weights

    # -- how it is made -----------------------------------------------------------------------------------------------

    def _job(
        self, preset: str | Preset, remove: float, form: Form | None, min_rank: int, multiple_of: int | None
    ) -> Job:
        recipe = preset_of(preset) if isinstance(preset, str) else preset
        return Job(
            remove=remove,
            ranks=None,
            recipe=recipe if form is None else dataclasses.replace(recipe, form=form),
            min_rank=min_rank,
            multiple_of=multiple_of,
            calibration=self.calibration,
            form=form,
            progress=self.progress,
        )

    def _point(
        self, name: str, recipe: Preset, store: AnalysisStore, remove: float, min_rank: int, multiple: int
    ) -> CurvePoint:
        start = time.perf_counter()
        plan = self.plan(recipe, remove, min_rank=min_rank, multiple_of=multiple)
        with self._made(recipe, store, plan) as model:
            measured = self._measure(model, f"{name} {remove:.3g}")
            counted = measured["evaluations"][0].parameters
            biased = added_biases(model, plan.ranks)
        parameters = self.sizes.parameters_at(plan.ranks, plan.form, adds_bias=biased)
        if parameters != counted:
            raise UnirankError(f"The model holds {counted} parameters, its ranks say {parameters}.")
        return CurvePoint(
            preset=name,
            remove=float(remove),
            removed_of_targets=1 - plan.used / plan.total,
            removed_of_model=1 - parameters / self.sizes.parameters,
            used=plan.used,
            budget=budget_of(remove, plan.total),
            parameters=parameters,
            bytes=self.sizes.table(plan.ranks, plan.form, adds_bias=biased),
            flops=self.sizes.flops(plan.used),
            seconds=time.perf_counter() - start,
            **measured,
        )

    @contextmanager
    def _made(self, recipe: Preset, store: AnalysisStore, plan: RankPlan) -> Iterator[PreTrainedModel]:
        """The compressed model, inside."""
        loaded = self.loaded
        if recipe.heal is None and recipe.refine is None:
            with on_loan(loaded):
                self._swapping.put(store, plan, progress=self.progress)
                yield loaded.model
            return
        windows = self._bench(store).windows
        asked: dict[str, Any] = {"refine": recipe.refine, "windows": windows, "progress": self.progress}
        if recipe.heal is None and recipe.refine is not None and not recipe.refine.dense:
            with on_loan(loaded):
                yield apply(loaded, store, plan, **asked).model
            return
        compressed = apply(loaded, store, plan, copy=True, **asked)
        if recipe.heal is not None:
            from unirank.finetuning.healing import heal

            work = Path(tempfile.mkdtemp(prefix="unirank-"))
            try:
                tokens = calibration_to_redraw(store, self.calibration)
                compressed = heal(compressed, tokens, recipe.heal, work=work, against=loaded, progress=self.progress)
            finally:
                shutil.rmtree(work, ignore_errors=True)
        yield compressed.model

    def _bench(self, store: AnalysisStore) -> Workbench:
        if store.digest not in self._benches:
            self._benches[store.digest] = workbench_for(self.loaded, store, self.calibration, self.progress)
        return self._benches[store.digest]

    def _measure(self, model: PreTrainedModel, label: str) -> dict[str, Any]:
        """Perplexities and speed, as fields of a point."""

        def one(text: EvalWindows) -> Any:
            stage = f"perplexity, {label}" if len(self.texts) == 1 else f"perplexity, {label}, {text.name}"
            return text.measure(model, stage=stage, progress=self.progress)

        reports = tuple(one(text) for text in self.texts)
        self.evaluated += 1
        if not self.speed:
            return {"evaluations": reports, "tokens_per_second": None}
        (rate,) = tokens_per_second([(model, self.loaded.tokenizer)], progress=self.progress)
        return {"evaluations": reports, "tokens_per_second": rate.rates}

    def _found(self, conditions: dict[str, Any], make: Callable[[], CurvePoint]) -> CurvePoint:
        """The point under `conditions`: one that is known, or kept, or made now."""
        conditions |= {
            "weights": self.weights,
            "dtype": str(self.loaded.model.dtype).removeprefix("torch."),
            "texts": [[text.name, text.sha256, sha256_tensors([("windows", text.windows)])] for text in self.texts],
            "speed": self.speed,
            "device": device_name(self.loaded.device),
            "versions": versions(),
        }
        key = json.dumps(conditions, sort_keys=True)
        if key not in self._known:
            point = None if self._kept is None else self._kept.find(conditions)
            if point is None:
                point = make()
                if self._kept is not None:
                    self._kept.keep(conditions, point, self.meta)
            self._known[key] = point
        return self._known[key]
