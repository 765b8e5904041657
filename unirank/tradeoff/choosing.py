"""From a target to a fraction to remove, once the analysis is there: what `Job.choose` calls."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unirank import costs
from unirank.analysis.calibration import Calibration, calibration_of
from unirank.analysis.held_out_text import held_out_text
from unirank.analysis.redraw import calibration_to_redraw
from unirank.analysis.store import AnalysisStore
from unirank.compression.evaluations import evaluation_of
from unirank.disk.files import make_directory, write_text
from unirank.display import told
from unirank.errors import InputError
from unirank.evaluation.measured_curve import Curve, CurvePoint
from unirank.evaluation.perplexity import prepare
from unirank.job import Job
from unirank.progress import Stage
from unirank.recipes import name_of
from unirank.stages import stages_behind
from unirank.text.windows import BUILTIN, BUILTIN_HELD_OUT
from unirank.tradeoff.points import Points
from unirank.tradeoff.searching import Found, largest_within, least_within
from unirank.tradeoff.sizes import Sizes
from unirank.tradeoff.target import Target
from unirank.tradeoff.telling import between_points
from unirank.types import DENSE, Form, LoadedModel, Rank

if TYPE_CHECKING:
    from unirank.compression.checkpoint import CompressedModel

HELD_OUT_FILE = "held-out.txt"
SEARCH = "search"
_WINDOWS = 16  # of a text whose length is not known yet, to tell how long the search will take
_STEP = 1e-5  # of fractions that parameters or bytes ask for: a thousandth of a percent (**choice**)
_MOST = 0.95  # the largest fraction that is tried (**choice**)


@dataclass(frozen=True)
class Reached:
    """How a target was met.

    Attributes:
        target: what was asked for.
        remove: the fraction that was chosen.
        text: what the perplexity is of; a path where the user can evaluate it again. None for other targets.
        dense: measured of the dense model, where perplexity was the target; `point` at `remove`.
        search: every fraction that was measured.
        curve: the same as points.
        amount: parameters or bytes at `remove`, where they were the target; `dense_amount` of the dense model.
    """

    target: Target
    remove: float
    text: str | None = None
    dense: CurvePoint | None = None
    point: CurvePoint | None = None
    search: Found | None = None
    curve: Curve | None = None
    amount: int | None = None
    dense_amount: int | None = None

    @property
    def increase(self) -> float:
        """Of the perplexity over the dense model's, as a fraction."""
        return 0.0 if self.search is None else self.search.increase

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the target, and what was found."""
        asked = {name: value for name, value in dataclasses.asdict(self.target).items() if value is not None}
        found: dict[str, Any] = {"target": asked, "remove": self.remove}
        if self.search is not None and self.dense is not None:
            found |= {"text": self.text, "increase": self.increase, "evaluations": len(self.search.tried)}
            found |= {"tried": [list(one) for one in self.search.tried], "fails": self.search.fails}
            found["perplexity_dense"] = self.dense.evaluations[0].perplexity
        else:
            found |= {"amount": self.amount, "amount_dense": self.dense_amount}
        return found

    def told(self, compressed: CompressedModel) -> CompressedModel:
        """`compressed` with the perplexity that the search measured of it in its record."""
        if self.point is None or self.dense is None:
            return compressed
        added = evaluation_of(self.point.evaluations[0], dense=self.dense.evaluations[0])
        return dataclasses.replace(compressed, evaluations=(added,))


@dataclass
class TargetChooser:
    """A `unirank.job.Chooser` for a `Target`.

    Attributes:
        place: directory where measured points are kept, and the held-out text; None keeps neither.
        reached: what was found, after the call.
    """

    target: Target
    place: Path | None = None
    reached: Reached | None = field(default=None, init=False)

    @property
    def whole_model_for(self) -> str:
        return "measuring perplexities" if self.target.max_perplexity_increase is not None else ""

    def stages(self, job: Job, loaded: LoadedModel, windows: int, window: int) -> list[Stage]:
        """What the search costs, to be announced."""
        if self.target.max_perplexity_increase is None:
            return []
        sizes = costs.Sizes.of(loaded)
        made = stages_behind(sizes, job.recipe, windows=windows, window=window, ranks_are_given=True)
        read = costs.evaluation(sizes, "", 1024 * (self.target.limit or _WINDOWS)).work
        points = self.target.evaluations
        return [Stage(SEARCH, points * sum(one.work for one in made) + (points + 1) * read)]

    def check(self, job: Job, loaded: LoadedModel) -> None:
        """Read the text. Raises InputError like `unirank.evaluation.perplexity.prepare` and `held_out_text`."""
        if self.target.max_perplexity_increase is None:
            for name in ("text", "window", "limit"):
                if getattr(self.target, name) is not None:
                    raise InputError(f"{name}= is of the perplexity, so it needs max_perplexity_increase=.")
            return
        if (target := self.target).text is not None:
            prepare(loaded.model, loaded.tokenizer, text=str(target.text), window=target.window, limit=target.limit)
        elif job.calibration is not None and job.text != BUILTIN:
            held_out_text(loaded, calibration_of(job.calibration))

    def __call__(self, job: Job, loaded: LoadedModel, store: AnalysisStore) -> float:
        if self.target.max_perplexity_increase is None:
            self.reached = by_amount(self.target, job, loaded, store)
        else:
            self.reached = by_perplexity(self.target, job, loaded, store, self.place)
        return self.reached.remove


def by_amount(target: Target, job: Job, loaded: LoadedModel, store: AnalysisStore) -> Reached:
    """The least fraction at which parameters, or bytes, are within the target.

    Counted from ranks; no model is compressed for it. Raises InputError where the dense model is within it already, or
    no fraction is.
    """
    sizes = Sizes.of(loaded)
    kind = f"int{target.bits}" if target.bits is not None else str(loaded.model.dtype).removeprefix("torch.")
    refine = job.recipe.refine
    adds = refine.centred if refine is not None else any(store.input_mean(spec) is not None for spec in store.linears)
    workbench = job.workbench(loaded, store)

    @cache
    def amount(remove: float) -> int:
        form: Form = "factors"
        if remove == 0:
            ranks: Mapping[str, Rank] = {spec.name: DENSE for spec in store.linears}
        else:
            plan = dataclasses.replace(job, remove=remove, choose=None).planned(store, workbench)
            ranks, form = plan.ranks, plan.form
        if target.params is not None:
            return sizes.parameters_at(ranks, form, adds_bias=adds)
        size = sizes.weight_bytes(ranks, form, kind, adds_bias=adds)
        return size + headers(loaded, ranks, whole=target.bits is not None)

    limit, what = (target.params, "parameters") if target.params is not None else (target.size, f"bytes as {kind}")
    assert limit is not None
    most = reachable(job, loaded)
    remove = least_within(amount, limit, most=most, step=_STEP)
    if remove is None:
        name = "params" if target.params is not None else "size"
        raise InputError(
            f"{name} = {limit:,} cannot be reached: with {most:.0%} of the decoder's weights removed, {amount(most):,} "
            f"{what} are left; embeddings and head stay as they are."
        )
    if remove == 0:
        raise InputError(
            f"Nothing has to be removed: the dense model has {amount(0.0):,} {what}, and {limit:,} are allowed."
        )
    return Reached(target, remove, amount=amount(remove), dense_amount=amount(0.0))


def by_perplexity(target: Target, job: Job, loaded: LoadedModel, store: AnalysisStore, place: Path | None) -> Reached:
    """The largest fraction that was measured to stay within the target (`largest_within`).

    Raises InputError where none that was tried does, and like `Points` and `held_out_text`.
    """
    limit, report = target.max_perplexity_increase, told(job.progress)
    assert limit is not None
    with tempfile.TemporaryDirectory(prefix="unirank-") as scratch:
        drawn = calibration_to_redraw(store, job.text)
        text = target.text or held_out_name(loaded, drawn, place or Path(scratch))
        points = Points(
            loaded,
            lambda _: store,
            texts=[text],
            window=target.window,
            limit=target.limit,
            calibration=job.text,
            place=place,
            progress=between_points(report),
        )
    report(SEARCH, 0, target.evaluations + 1)
    dense = points.dense()
    recipe = dataclasses.replace(job.recipe, scheme=store.identity.scheme)
    found: dict[float, CurvePoint] = {}

    def increase(remove: float) -> float:
        report(SEARCH, 1 + len(found), target.evaluations + 1)
        found[remove] = points.at(
            recipe,
            remove,
            form=job.form,
            min_rank=job.min_rank,
            multiple_of=job.multiple_of,
            name=name_of(recipe),
        )
        return increase_of(found[remove], dense)

    search = largest_within(increase, limit, evaluations=target.evaluations, most=reachable(job, loaded))
    report(SEARCH, target.evaluations + 1, target.evaluations + 1)
    if search.remove == 0:
        least, value = min(search.tried)
        raise InputError(
            f"max_perplexity_increase = {limit:g} is not met at any fraction that was tried; the least, {least:g}, "
            f"gives {value:+.1%} on {text}. Allow more, take a better preset, or give evaluations= a larger number."
        )
    measured = sorted((point for point in found.values() if point.remove), key=lambda point: point.remove)
    curve = Curve(loaded.source, dense, tuple(measured), points.meta)
    return Reached(target, search.remove, text, dense, found[search.remove], search, curve)


def headers(loaded: LoadedModel, ranks: Mapping[str, Rank], *, whole: bool) -> int:
    """The most bytes that safetensors' headers take: an entry for each tensor, of its name and a hundred more.

    A low-rank linear has left, right, place, guard and perhaps a bias; as whole numbers, its matrices have scales too.
    """
    names = list(loaded.model.state_dict())
    more = sum(2 * whole if rank == DENSE else 4 + 2 * whole for rank in ranks.values())
    return (len(names) + more) * (max(map(len, names)) + 100)


def increase_of(point: CurvePoint, dense: CurvePoint) -> float:
    """Of the perplexity on the first text over the dense model's, as a fraction."""
    return point.evaluations[0].perplexity / dense.evaluations[0].perplexity - 1


def reachable(job: Job, loaded: LoadedModel) -> float:
    """The largest fraction, in steps of 5 %, that `min_rank` leaves room for."""
    for percent in range(round(100 * _MOST), 0, -5):
        try:
            dataclasses.replace(job, remove=percent / 100, choose=None).check_model(loaded)
        except InputError:
            if percent == 5:
                raise
        else:
            return percent / 100
    raise AssertionError("the last fraction returns or raises")


def held_out_name(loaded: LoadedModel, calibration: Calibration, place: Path) -> str:
    """A text beside what calibrated: a name, or a file that is written into `place`."""
    if calibration.text == BUILTIN:
        return BUILTIN_HELD_OUT
    content = held_out_text(loaded, calibration)
    make_directory(place)
    write_text(place / HELD_OUT_FILE, content)
    return str(place / HELD_OUT_FILE)
