"""The analyses that presets need, made beside a curve: one a scheme, gradients once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from unirank.analysis.calibration import Calibration, calibration_of
from unirank.analysis.store import MANIFEST, AnalysisStore, open_store
from unirank.costs import Sizes
from unirank.demands import with_gradients
from unirank.job import Job, analyze_for
from unirank.progress import OnProgress, Stage, silent
from unirank.recipes import Preset
from unirank.stages import analysis_stages
from unirank.types import LoadedModel


class Stores:
    """Stores in the directories `folder/analysis-SCHEME`; a finished one is taken, another one resumed."""

    def __init__(
        self,
        folder: Path,
        loaded: LoadedModel,
        recipes: Sequence[Preset],
        calibration: Calibration | str | Path | None,
        *,
        overwrite: bool = False,
        progress: OnProgress = silent,
    ) -> None:
        """Make nothing yet.

        Args:
            recipes: all that will be asked for: a scheme gets gradients if one of them needs them.
            calibration: as in `unirank.compress`.
            overwrite: replace a store of something else.
        """
        self._folder, self._loaded, self._calibration = folder, loaded, calibration
        self._overwrite, self._progress = overwrite, progress
        self._needs: dict[str, Preset] = {}
        for recipe in sorted(recipes, key=lambda one: one.needs_gradients):
            self._needs[recipe.scheme] = recipe  # the last one needs gradients, if any does
        self._made: dict[str, AnalysisStore] = {}

    def place(self, scheme: str) -> Path:
        return self._folder / f"analysis-{scheme}"

    def finished(self, recipe: Preset) -> bool:
        """Whether the store of a recipe is there and complete."""
        place = self.place(recipe.scheme)
        return not self._overwrite and (place / MANIFEST).is_file() and open_store(place).complete

    def stages(self) -> list[Stage]:
        """Of the analyses, to be announced; those of finished stores too, which end as soon as they begin."""
        return [stage for scheme in self._needs for stage in self.stages_of(scheme)]

    def stages_of(self, scheme: str) -> list[Stage]:
        """Of one analysis."""
        asked = with_gradients(calibration_of(self._calibration), self._needs[scheme])
        numbers = {"windows": asked.windows, "window": asked.window, "backward": asked.gradient_windows or 0}
        made = analysis_stages(Sizes.of(self._loaded), scheme, **numbers)
        return [replace(stage, name=self._named(stage.name, scheme)) for stage in made]

    def _named(self, stage: str, scheme: str) -> str:
        """A stage, told apart from that of another scheme."""
        return stage if len(self._needs) == 1 else f"{stage}, {scheme}"

    def of(self, recipe: Preset) -> AnalysisStore:
        """The store of a recipe. Raises like `unirank.analyze`."""
        scheme = recipe.scheme
        if scheme not in self._made:
            self._made[scheme] = self._make(self._needs.get(scheme, recipe))
        return self._made[scheme]

    def _make(self, recipe: Preset) -> AnalysisStore:
        place = self.place(recipe.scheme)
        finished = self.finished(recipe)

        def told(stage: str, done: int, total: int) -> None:
            self._progress(self._named(stage, recipe.scheme), done, total)

        source = next((store.path for store in self._made.values() if store.has_gradients), None)
        if finished or source is None or not recipe.needs_gradients:
            job = Job(
                remove=0.0,
                ranks=None,
                recipe=recipe,
                min_rank=1,
                multiple_of=None,
                calibration=self._calibration,
                progress=told,
            )
            return job.analyze(self._loaded, place, overwrite=self._overwrite)
        return analyze_for(
            self._loaded,
            place,
            recipe,
            calibration_of(self._calibration),
            gradients_from=source,
            overwrite=self._overwrite,
            progress=told,
        )
