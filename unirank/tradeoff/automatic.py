"""`unirank.auto`: which preset, and how far, for a target and so many minutes."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unirank import costs
from unirank.analysis.calibration import Calibration, calibration_of
from unirank.costs import Sizes
from unirank.display import shows_progress, told
from unirank.errors import InputError
from unirank.evaluation.measured_curve import Curve, CurvePoint
from unirank.inputs import loaded_from
from unirank.job import Job
from unirank.progress import Progress, Stage
from unirank.recipes import Preset
from unirank.recipes import preset as preset_of
from unirank.tradeoff.announcing import Announcer
from unirank.tradeoff.choosing import Reached, by_amount, held_out_name, increase_of, reachable
from unirank.tradeoff.points import Points
from unirank.tradeoff.pricing import Prices
from unirank.tradeoff.searching import largest_within
from unirank.tradeoff.stores import Stores
from unirank.tradeoff.target import Target
from unirank.types import LoadedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from unirank.compression.checkpoint import CompressedModel

WITHOUT_TRAINING = ("unirank", "fast", "best")
_LEAST = 2  # points of a search that is worth beginning (**choice**)


@dataclass(frozen=True)
class Tried:
    """A preset, and how far it came; `point` is None where it was not run, and `why` says why."""

    preset: str
    point: CurvePoint | None
    increase: float | None
    evaluations: int
    seconds: float
    why: str = ""

    def as_dict(self) -> dict[str, Any]:
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return found | {"point": None if self.point is None else self.point.as_dict()}


@dataclass(frozen=True)
class AutoResult:
    """What was chosen, and what it was chosen from.

    Attributes:
        compressed: the model; save it.
        reached: the target, and how it was met.
        preset: that was chosen.
        tried: every preset that was thought of, cheapest first.
        curve: all points that were measured.
        seconds: of everything.
        store: of the chosen preset.
    """

    compressed: CompressedModel
    reached: Reached
    preset: str
    tried: tuple[Tried, ...]
    curve: Curve
    seconds: float
    store: Path


@shows_progress
def auto(
    model: str | Path | PreTrainedModel | LoadedModel,
    target: Target,
    *,
    place: str | Path,
    minutes: float | None = None,
    presets: Sequence[str] | None = None,
    calibration: Calibration | str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = None,
) -> AutoResult:
    """Try presets, the cheapest first, as far as the minutes go, and take the best one.

    With a perplexity as target, the best one removes most; with parameters or bytes, it has the lowest perplexity on
    `Target.text`. A preset is begun only where its analysis, at least two points (one, for parameters and bytes) and
    the compression itself are expected to fit into what is left of the time. What is expected comes from
    `unirank.costs` and from the seconds of what has run; the first preset is always run.

    Args:
        model: a path or hub name; or a model in memory, which is not changed.
        target: see `unirank.Target`. Its `evaluations` are of each preset.
        place: directory for analyses and points, which the next run finds again.
        minutes: for all of it, loading and compression included; None has no end.
        presets: to choose from; None is "unirank", "fast" and "best", and with `minutes` also "healed" and "distilled",
            which train.
        calibration: as in `unirank.compress`.

    What loads the model, `tokenizer` and `progress` are as in `compress`.

    Raises InputError where no preset meets the target; and like `unirank.compress`.
    """
    clock = _Clock(minutes)
    report = told(progress)
    names = tuple(presets or (WITHOUT_TRAINING if minutes is None else (*WITHOUT_TRAINING, "healed", "distilled")))
    recipes = {name: preset_of(name) for name in names}
    loaded = loaded_from(
        model,
        tokenizer,
        dtype=dtype,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        progress=report,
    )
    loaded.require_whole("Choosing a preset")
    stores = Stores(Path(place), loaded, list(recipes.values()), calibration, progress=report)
    teller = Announcer(report, recipes)
    search = _Search(target, loaded, stores, calibration_of(calibration), clock, Path(place), recipes, teller)
    tried = [search.run(name, chosen) for name, chosen in recipes.items()]
    best = search.best(tried)
    chosen = recipes[best.preset]
    job = dataclasses.replace(search.job(chosen), remove=search.fraction[best.preset])
    store, reached = stores.of(chosen), search.reached[best.preset]
    teller.finish(search.prices.making_stages(chosen))
    found = sorted(search.points_of.values(), key=lambda point: (names.index(point.preset), point.remove))
    curve = Curve(loaded.source, search.dense, tuple(found), search.points.meta)
    ours = isinstance(model, str | Path)  # loaded here, so nobody misses it
    work = Path(place) / "healing"
    compressed = job.finish(loaded, store, copy=not ours, work=work)
    if work.exists():
        shutil.rmtree(work)
    return AutoResult(reached.told(compressed), reached, best.preset, tuple(tried), curve, clock.elapsed, store.path)


class _Clock:
    def __init__(self, minutes: float | None) -> None:
        if minutes is not None and not 0 < minutes < float("inf"):
            raise InputError(f"minutes = {minutes!r} is not legal; it is a number above 0.")
        self._start, self._seconds = time.perf_counter(), None if minutes is None else 60 * minutes

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self._start

    @property
    def left(self) -> float:
        return float("inf") if self._seconds is None else self._seconds - self.elapsed


@dataclass
class _Search:
    """One preset after the other; what was measured stays."""

    target: Target
    loaded: LoadedModel
    stores: Stores
    calibration: Calibration
    clock: _Clock
    place: Path
    recipes: dict[str, Preset]
    teller: Announcer
    fraction: dict[str, float] = field(default_factory=dict)
    reached: dict[str, Reached] = field(default_factory=dict)
    points_of: dict[tuple[str, float], CurvePoint] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.text = self.target.text or held_out_name(self.loaded, self.calibration, self.place)
        self.points = Points(
            self.loaded,
            self.stores.of,
            texts=[self.text],
            window=self.target.window,
            limit=self.target.limit,
            calibration=self.calibration.text,
            place=self.place,
            progress=self.teller,
        )
        self.prices = Prices(self.loaded, self.calibration, tokens=self.points.texts[0].windows.numel())
        first = [costs.load(Sizes.of(self.loaded)), Stage("perplexity, dense", self.prices.evaluation)]
        everything = dict.fromkeys(self.recipes, self._most)  # nothing is known of the speed yet
        self.teller.announce(everything, self.stores, self.prices, first=first)
        start = time.perf_counter()
        self.dense = self.points.dense()
        if self.points.evaluated:
            self.prices.learn(self.prices.evaluation, time.perf_counter() - start)
        else:  # found again: what it took then
            self.prices.learn(self.prices.evaluation, self.dense.seconds)

    def job(self, chosen: Preset) -> Job:
        return Job(
            remove=0.0,
            ranks=None,
            recipe=chosen,
            min_rank=1,
            multiple_of=None,
            calibration=self.calibration,
            progress=self.teller,
        )

    def run(self, name: str, chosen: Preset) -> Tried:
        """Search with one preset, where the time allows."""
        start, prices, known = time.perf_counter(), self.prices, self.stores.finished(chosen)
        count = self._expected(name)
        if not count:
            work = self._beginning(chosen, known) + _LEAST * prices.point(chosen) + prices.making(chosen)
            needed = prices.seconds(work)
            why = f"it takes about {needed / 60:.0f} minutes, and {max(self.clock.left, 0) / 60:.0f} are left"
            return Tried(name, None, None, 0, 0.0, why)
        self.teller.begin(name)
        store = self.stores.of(chosen)
        if not known:
            prices.learn(prices.analysis(chosen), time.perf_counter() - start)
        job = self.job(chosen)
        if self._by_quality:
            return self._quality(name, chosen, count, start)
        found = by_amount(self.target, job, self.loaded, store)
        self.teller.points(0, 1)
        point = self._measure(name, chosen, found.remove)
        self.teller.points(1, 1)
        self.reached[name] = dataclasses.replace(found, text=self.text, dense=self.dense, point=point)
        self.fraction[name] = found.remove
        return Tried(name, point, increase_of(point, self.dense), 1, time.perf_counter() - start)

    @property
    def _by_quality(self) -> bool:
        return self.target.max_perplexity_increase is not None

    @property
    def _most(self) -> int:
        """Points of a preset."""
        return self.target.evaluations if self._by_quality else 1

    def _beginning(self, chosen: Preset, known: bool) -> float:
        """Work of what comes before the first point; `known`: the analysis is there."""
        return (0.0 if known else self.prices.analysis(chosen)) + self.prices.measuring(chosen)

    def _expected(self, name: str) -> int:
        """How many points of a preset the time allows, 0 for none. Announces them, and those of the presets behind."""
        prices, left = self.prices, self.clock.left
        least = min(_LEAST, self._most)
        kept = prices.making(self._best_so_far() or self.recipes[name])
        counts, schemes = dict[str, int](), set[str]()
        names = list(self.recipes)
        for later in names[names.index(name) :]:
            chosen = self.recipes[later]
            begin = self._beginning(chosen, chosen.scheme in schemes or self.stores.finished(chosen))
            room = left - prices.seconds(max(kept, prices.making(chosen))) - prices.seconds(begin)
            count = int(min(room / prices.seconds(prices.point(chosen)), self._most))
            if count < least:  # nothing is there yet: one preset is always run
                count = least if later == name and not self.fraction else 0
            counts[later] = count
            if count:
                left -= prices.seconds(begin + count * prices.point(chosen))
                schemes.add(chosen.scheme)
        self.teller.announce(counts, self.stores, prices)
        return counts[name]

    def _quality(self, name: str, chosen: Preset, count: int, start: float) -> Tried:
        limit = self.target.max_perplexity_increase
        assert limit is not None
        before, done = max(self.fraction.values(), default=0.0), itertools.count()

        def increase(remove: float) -> float:
            self.teller.points(next(done), count)
            return increase_of(self._measure(name, chosen, remove), self.dense)

        search = largest_within(
            increase,
            limit,
            evaluations=count,
            most=reachable(self.job(chosen), self.loaded),
            first=before or None,
            go_on=lambda: self._time_for_another(chosen),
        )
        self.teller.points(count, count)
        seconds = time.perf_counter() - start
        if search.remove == 0:
            return Tried(name, None, None, len(search.tried), seconds, "nothing that was tried stays within the target")
        point = self.points_of[name, search.remove]
        self.fraction[name] = search.remove
        self.reached[name] = Reached(self.target, search.remove, self.text, self.dense, point, search)
        return Tried(name, point, search.increase, len(search.tried), seconds)

    def _time_for_another(self, chosen: Preset) -> bool:
        """Whether one more point and then the compression fit: what was expected at first may have been too little."""
        another, kept = self.prices.point(chosen), self.prices.making(chosen)
        return self.prices.seconds(another + kept) <= self.clock.left

    def _measure(self, name: str, chosen: Preset, remove: float) -> CurvePoint:
        start, before = time.perf_counter(), self.points.evaluated
        point = self.points.at(chosen, remove, name=name)
        first = not any(preset == name for preset, _ in self.points_of)
        if self.points.evaluated > before:
            work = self.prices.point(chosen) + (self.prices.measuring(chosen) if first else 0.0)
            self.prices.learn(work, time.perf_counter() - start)
        self.points_of[name, remove] = point
        return point

    def _best_so_far(self) -> Preset | None:
        return preset_of(max(self.fraction, key=lambda name: self.fraction[name])) if self.fraction else None

    def best(self, tried: Sequence[Tried]) -> Tried:
        """The one to take; raises InputError where there is none."""
        met = [one for one in tried if one.point is not None]
        if not met:
            reasons = "; ".join(f"{one.preset}: {one.why}" for one in tried)
            raise InputError(f"No preset meets the target ({reasons}). Allow more, or more minutes=.")
        if self._by_quality:
            return max(met, key=lambda one: self.fraction[one.preset])  # of equal ones the cheaper
        return min(met, key=lambda one: one.increase if one.increase is not None else 0.0)
