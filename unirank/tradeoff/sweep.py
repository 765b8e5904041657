"""`unirank.curve`: a ladder of removed fractions for one preset or several, from one analysis each."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unirank import costs
from unirank.analysis.calibration import Calibration, calibration_of
from unirank.analysis.store import AnalysisStore, open_store
from unirank.costs import Sizes
from unirank.demands import require
from unirank.disk.files import make_directory, write_text
from unirank.display import shows_progress, told
from unirank.errors import InputError
from unirank.evaluation.measured_curve import Curve, CurvePoint
from unirank.inputs import loaded_from
from unirank.progress import OnProgress, Progress, Stage, expect
from unirank.rank_plan import check_form
from unirank.recipes import Preset, recipe
from unirank.text.windows import BUILTIN_HELD_OUT
from unirank.tradeoff.kept import CURVE_FILE, Kept
from unirank.tradeoff.ladder import MORE, check_ladders, next_fraction
from unirank.tradeoff.points import Points
from unirank.tradeoff.pricing import Prices
from unirank.tradeoff.stores import Stores
from unirank.tradeoff.telling import between_points
from unirank.types import Form, LoadedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@shows_progress
def curve(
    model: str | Path | PreTrainedModel | LoadedModel,
    *,
    store: AnalysisStore | str | Path | None = None,
    presets: str | Sequence[str] = ("unirank",),
    remove: Sequence[float] | Mapping[str, Sequence[float]] | None = None,
    more: int = MORE,
    texts: str | Path | Sequence[str | Path] = (BUILTIN_HELD_OUT,),
    window: int | None = None,
    limit: int | None = None,
    split: str | None = None,
    place: str | Path | None = None,
    calibration: Calibration | str | Path | None = None,
    form: Form | None = None,
    min_rank: int = 1,
    multiple_of: int | None = None,
    speed: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    progress: Progress = None,
) -> Curve:
    """Perplexity, parameters, bytes and operations over the removed fraction. No checkpoint is written.

    A point has, to the bit on a CPU, the perplexity that `unirank.evaluate` gives for the checkpoint that
    `unirank.compress` makes at that fraction from the same store.

    Args:
        model: the dense model: a path, a hub name, or a model in memory, which stays as it is.
        store: a finished analysis of it, for all presets; None makes one for each scheme in
            `place/analysis-SCHEME`, where it is resumed and found again.
        presets: names from `unirank.presets()`.
        remove: fractions of the decoder linears' weights, in [0, 1), for all presets, or by preset; 0, the dense model,
            is always measured. None, and a preset that is not named, is 0, 1, 2, 5, 10, 15, 20, 30, 40, 50 and 60 %.
        more: at most so many points are added to each preset, where a straight line between two points would be off by
            2 % of the perplexity or more, the worst interval first, in its middle (**choice**). 0 adds none.
        texts: of the perplexities, see `unirank.evaluate`, like `window`, `limit` and `split`. The first one says where
            points are added.
        place: directory in which every point is kept as soon as it is measured, so that a second run goes on from
            there; and `curve.json`. None keeps nothing.
        calibration: which tokens calibrate, as in `unirank.compress`; beside `store` only its text, where it was a
            file.
        form: as in `unirank.compress`.
        min_rank: the same.
        multiple_of: the same.
        speed: also measure tokens a second; worth something on a machine that does nothing else.
        tokenizer: needed when `model` is a `PreTrainedModel`.
        overwrite: replace an analysis of something else in `place`.
        progress: as in `unirank.compress`.

    `dtype`, `device`, `revision` and `trust_remote_code` are for a path or name: see `unirank.load`.

    Returns the curve. Fractions that `min_rank` and the form leave out of reach stand in `meta["unreachable"]`, with
    the reason.

    Raises:
        InputError: an argument is not legal, a text cannot be used, `place` is something else, no fraction is in reach.
        StoreError: the store is unfinished, or lacks what a preset needs (another scheme, gradients).
        NonFiniteError, WriteError: as in `unirank.compress`.
    """
    names = (presets,) if isinstance(presets, str) else tuple(presets)
    if not names or len(set(names)) < len(names):
        raise InputError(f"presets = {names!r} is not legal; give one name or several, each once.")
    if form is not None:
        check_form(form)
    recipes = {name: recipe(name, form=form) for name in names}
    ladders = check_ladders(remove, names, more)
    analysis = None
    if store is not None:
        analysis = store if isinstance(store, AnalysisStore) else open_store(store)
        analysis.require_complete()
        for chosen in recipes.values():
            require(analysis, chosen)
            analysis.require_form(chosen.form)
    folder = None if place is None else Path(place)
    if folder is not None:
        Kept(folder).check()
    report = told(progress)
    if analysis is not None and dtype == "auto":
        dtype = analysis.identity.model.dtype
    loaded = loaded_from(
        model,
        tokenizer,
        dtype=dtype,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        progress=report,
    )
    with ExitStack() as stack:
        scratch = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="unirank-")))
        made = Stores(scratch, loaded, list(recipes.values()), calibration, overwrite=overwrite, progress=report)
        points = Points(
            loaded,
            made.of if analysis is None else lambda _: analysis,
            texts=[os.fspath(text) for text in ([texts] if isinstance(texts, str | Path) else texts)],
            window=window,
            limit=limit,
            split=split,
            calibration=None if calibration is None else calibration_of(calibration).text,
            speed=speed,
            place=folder,
            progress=between_points(report),
        )
        asked = _Asked(recipes, ladders, more, {"form": form, "min_rank": min_rank, "multiple_of": multiple_of})
        tokens = calibration_of(calibration) if analysis is None else analysis.identity.calibration
        prices = Prices(loaded, tokens, tokens=sum(text.windows.numel() for text in points.texts))
        return _Sweep(points, asked, folder, report, made.stages() if analysis is None else [], prices).run()


@dataclass(frozen=True)
class _Asked:
    """What was asked of a curve; `options` are those of every plan."""

    recipes: dict[str, Preset]
    ladders: dict[str, tuple[float, ...]]
    more: int
    options: dict[str, Any]


class _Sweep:
    """Measures the points in order, and writes the curve behind each."""

    def __init__(
        self,
        points: Points,
        asked: _Asked,
        folder: Path | None,
        progress: OnProgress,
        analyses: Sequence[Stage],
        prices: Prices,
    ) -> None:
        """Measure nothing yet.

        Args:
            analyses: stages of those that are to be made first.
        """
        self._points, self._asked, self._folder, self._progress = points, asked, folder, progress
        self._analyses, self._prices = analyses, prices
        self._found: list[CurvePoint] = []
        self._unreachable: list[dict[str, object]] = []

    def run(self) -> Curve:
        asked, points = self._asked, self._points
        ladders = {name: self._reachable(name) for name in asked.recipes}
        if not any(ladders.values()):
            raise InputError(f"No fraction of remove= is in reach: {self._unreachable[0]['reason']}")
        self._announce(ladders)
        for name, chosen in asked.recipes.items():
            if ladders[name]:
                points.store(chosen)  # made now, where it is not there
        total = 1 + sum(min(1, len(ladder)) * asked.more + len(ladder) for ladder in ladders.values())
        self._progress("points", 0, total)
        points.dense()
        done = 1
        for name, ladder in ladders.items():
            self._progress("points", done, total)
            perplexities = {0.0: points.dense().evaluations[0].perplexity}
            for at in ladder:
                perplexities[at] = self._measure(name, at)
                done += 1
                self._progress("points", done, total)
            for _ in range(asked.more if ladder else 0):
                at = next_fraction(perplexities)
                if at is not None:
                    perplexities[at] = self._measure(name, at)
                done += 1
                self._progress("points", done, total)
        return self._curve()

    def _announce(self, ladders: Mapping[str, Sequence[float]]) -> None:
        """What will be done, before any of it: analyses, what allocators measure, points, which cost unlike much."""
        prices = self._prices
        works, measuring = [prices.evaluation], dict[str, Stage]()
        for name, ladder in ladders.items():
            chosen = self._asked.recipes[name]
            works += [prices.point(chosen)] * (len(ladder) + min(1, len(ladder)) * self._asked.more)
            if ladder:
                measuring |= {stage.name: stage for stage in prices.measuring_stages(chosen)}
        whole = sum(works)
        parts = tuple((1 / len(works), work / whole) for work in works) if whole else ()
        load = costs.load(Sizes.of(self._points.loaded))
        expect(self._progress, [load, *self._analyses, *measuring.values(), Stage("points", whole, parts)])

    def _reachable(self, name: str) -> list[float]:
        """The fractions above 0 that can be had; what cannot be is noted. Raises InputError for other reasons."""
        self._points.check(name, 0.0, **self._asked.options)
        found = []
        for at in self._asked.ladders[name]:
            try:
                self._points.check(name, at, **self._asked.options)
            except InputError as error:
                self._unreachable.append({"preset": name, "remove": at, "reason": str(error)})
            else:
                found += [at] if at else []
        return found

    def _measure(self, name: str, at: float) -> float:
        point = self._points.at(name, at, **self._asked.options)
        self._found.append(point)
        if self._folder is not None:
            make_directory(self._folder)
            write_text(self._folder / CURVE_FILE, self._curve().to_json())
        return point.evaluations[0].perplexity

    def _curve(self) -> Curve:
        order = list(self._asked.recipes)
        found = sorted(self._found, key=lambda point: (order.index(point.preset), point.remove))
        meta = self._points.meta | {"unreachable": self._unreachable, "options": self._asked.options}
        return Curve(self._points.loaded.source, self._points.dense(), tuple(found), meta)
