"""The stages of `unirank.auto`, each under the name of its preset, announced as far as they are expected to run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from unirank.progress import OnProgress, Stage, expect
from unirank.recipes import Preset
from unirank.tradeoff.pricing import Prices
from unirank.tradeoff.stores import Stores
from unirank.tradeoff.telling import between_points

SEARCH = "search"
_COMPRESS = "compress"  # stands for what follows the choice, until that is made


class Announcer:
    """An `OnProgress` between what presets run and who watches."""

    def __init__(self, progress: OnProgress, presets: Mapping[str, Preset]) -> None:
        self._progress, self._presets = progress, presets
        self._running = ""
        self._preset_of: dict[str, str] = {}  # of every stage that was announced

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._running:
            between_points(self._under_its_name)(stage, done, total)
        else:
            self._progress(stage, done, total)

    def expect(self, stages: Sequence[Stage]) -> None:
        """Announce stages that are no preset's; what a preset announces of itself is in `announce` already."""
        if not self._running:
            expect(self._progress, stages)

    def begin(self, preset: str) -> None:
        """What is reported from here on is this preset's; "" for none's."""
        self._running = preset

    def points(self, done: int, total: int) -> None:
        """So many points of the preset that runs are measured."""
        self._under_its_name(SEARCH, done, total)

    def announce(
        self, points: Mapping[str, int], stores: Stores, prices: Prices, *, first: Sequence[Stage] = ()
    ) -> None:
        """Announce presets that have not begun, or take back what was announced of them.

        Args:
            points: how many are expected of each; with 0 it is not expected to run.
            first: what comes before all of them.
        """
        expected: dict[str, Stage] = {}
        for name in [name for name, count in points.items() if count]:
            chosen = self._presets[name]
            own = [*prices.measuring_stages(chosen), Stage(SEARCH, points[name] * prices.point(chosen))]
            stages = [replace(stage, name=self._named(stage.name, name)) for stage in own]
            for stage in [*stores.stages_of(chosen.scheme), *stages]:
                expected[stage.name] = stage
                self._preset_of.setdefault(stage.name, name)
        dropped = [name for name, preset in self._preset_of.items() if preset in points and name not in expected]
        last = max((prices.making(self._presets[name]) for name, count in points.items() if count), default=0.0)
        behind = [Stage(_COMPRESS, last)] * bool(expected)
        expect(self._progress, [*first, *expected.values(), *(Stage(name, 0.0) for name in dropped), *behind])

    def finish(self, stages: Sequence[Stage]) -> None:
        """The choice is made; announce what follows."""
        self.begin("")
        self.expect([Stage(_COMPRESS, 0.0), *stages])

    def _under_its_name(self, stage: str, done: int, total: int) -> None:
        self._progress(self._named(stage, self._running), done, total)

    def _named(self, stage: str, preset: str) -> str:
        return stage if len(self._presets) == 1 else f"{stage}, {preset}"
