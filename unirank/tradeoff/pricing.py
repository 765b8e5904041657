"""What a recipe will take on this machine, from what was measured of it so far."""

from __future__ import annotations

from unirank import costs
from unirank.analysis.calibration import GRADIENT_WINDOWS, Calibration
from unirank.analysis.identity import CalibrationIdentity
from unirank.costs import Sizes
from unirank.progress import Stage
from unirank.recipes import Preset
from unirank.stages import analysis_stages, planning_stages, stages_behind
from unirank.types import LoadedModel

_CAUTION = 1.2  # a promise to be done in time is better kept than sharp (**choice**)


class Prices:
    """Seconds of analyses and points, predicted.

    Costs in forward passes are those of `unirank.costs`; seconds a unit of them are measured: of the dense model's
    evaluation first, then of everything that was run.
    """

    def __init__(self, loaded: LoadedModel, calibration: Calibration | CalibrationIdentity, *, tokens: int) -> None:
        """
        Args:
            tokens: that the perplexities of a point read.
        """
        self._sizes, self._calibration = Sizes.of(loaded), calibration
        self.evaluation = costs.evaluation(self._sizes, "", tokens).work
        self._work = self._seconds = 0.0

    def learn(self, work: float, seconds: float) -> None:
        """`work` took `seconds`."""
        self._work, self._seconds = self._work + work, self._seconds + seconds

    def seconds(self, work: float) -> float:
        """What `work` will take at the mean speed of all that was learned, and a fifth more. 0 before that."""
        return _CAUTION * work * self._seconds / self._work if self._work else 0.0

    def analysis(self, recipe: Preset) -> float:
        """Work of an analysis."""
        asked = self._calibration
        backward = 0
        if recipe.needs_gradients:
            backward = asked.gradient_windows or min(GRADIENT_WINDOWS, asked.windows)
        stages = analysis_stages(
            self._sizes, recipe.scheme, windows=asked.windows, window=asked.window, backward=backward
        )
        return sum(stage.work for stage in stages)

    def measuring(self, recipe: Preset) -> float:
        """Work of an allocator that runs the model; the store keeps it, so it is done once."""
        return sum(stage.work for stage in self.measuring_stages(recipe))

    def measuring_stages(self, recipe: Preset) -> list[Stage]:
        """The stages of that."""
        return planning_stages(self._sizes, recipe, window=self._calibration.window)

    def making(self, recipe: Preset) -> float:
        """Work of truncation or second pass and what follows, at one fraction."""
        return sum(stage.work for stage in self.making_stages(recipe))

    def making_stages(self, recipe: Preset) -> list[Stage]:
        """The stages of that."""
        asked = self._calibration
        return stages_behind(self._sizes, recipe, windows=asked.windows, window=asked.window, ranks_are_given=True)

    def point(self, recipe: Preset) -> float:
        """Work of one point of a search."""
        return self.making(recipe) + self.evaluation
