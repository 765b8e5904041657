"""The stages of a recipe, in their order, with what they cost; announced before they begin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from unirank import costs
from unirank.costs import Sizes
from unirank.planning.allocator import allocator as allocator_of
from unirank.progress import OnProgress, Stage, expect
from unirank.recipes import Preset
from unirank.types import LoadedModel

if TYPE_CHECKING:
    from unirank.analysis.calibration import Calibration
    from unirank.analysis.identity import CalibrationIdentity
    from unirank.analysis.needs import Needs
    from unirank.analysis.store import AnalysisStore


def analysis_stages(sizes: Sizes, scheme: str, *, windows: int, window: int, backward: int) -> list[Stage]:
    """Of an analysis.

    Args:
        windows, window: of the calibration.
        backward: windows that run backward.
    """
    first = [costs.gradients(sizes, backward * window)] if backward else []
    return [*first, costs.calibration(sizes, scheme, windows * window)]


def stages_behind(sizes: Sizes, recipe: Preset, *, windows: int, window: int, ranks_are_given: bool) -> list[Stage]:
    """Of what follows the analysis, up to the compressed model in memory; arguments as above."""
    tokens = windows * window
    stages = [] if ranks_are_given else planning_stages(sizes, recipe, window=window)
    stages.append(costs.truncation(sizes) if recipe.refine is None else costs.second_pass(sizes, tokens))
    heal = recipe.heal
    if heal is not None:
        if heal.passes:
            stages.append(costs.healing(sizes, tokens, heal.passes))
        if heal.distill_steps:
            written = heal.sampled(heal.distill_steps * heal.batch)
            stages += [costs.sampling(sizes, written * window)] * (written > 0)
            stages.append(costs.distillation(sizes, heal.distill_steps, heal.batch * window))
    return stages


def planning_stages(sizes: Sizes, recipe: Preset, *, window: int) -> list[Stage]:
    """Of an allocator that runs the model; the others take no time to speak of."""
    if not recipe.measures:
        return []
    known = _MEASURING.get(recipe.allocator)
    options = {**allocator_of(recipe.allocator).options, **recipe.options}
    return [] if known is None else known(sizes, options, window)


def with_stages_behind(
    needs: Needs, loaded: LoadedModel, recipe: Preset, calibration: Calibration, *, ranks_are_given: bool
) -> Needs:
    """What a dry run found, with the time of the stages that run the model behind the analysis.

    They are not tried: what they cost beside an analysis of this model is in `unirank.costs`, and the dry run says how
    many seconds that analysis takes here.

    Args:
        needs: of a dry run with `remove`.
    """
    sizes, numbers = Sizes.of(loaded), {"windows": calibration.windows, "window": calibration.window}
    tried = analysis_stages(sizes, recipe.scheme, **numbers, backward=_backward(recipe, calibration))
    rate = needs.seconds / sum(stage.work for stage in [*tried, costs.truncation(sizes), costs.save(sizes)])
    stages = stages_behind(sizes, recipe, **numbers, ranks_are_given=ranks_are_given)
    behind = {stage.name: rate * stage.work for stage in stages if stage.name != "truncate"}  # the dry run has it
    return replace(needs, seconds=needs.seconds + sum(behind.values()), behind=behind)


def _lems(sizes: Sizes, options: Mapping[str, float], window: int) -> list[Stage]:
    cut = min(window, int(options["first"] + options["tokens"]))
    whole = costs.evaluation(sizes, "", int(options["held_out"]) * cut).work  # of one plan
    stages = [costs.measuring(sizes, "measure each linear", int(options["windows"]), cut)]
    if options["depth"]:
        stages.append(Stage("try depth factors", options["depth"] * whole))
    for number in range(1, int(options["rounds"]) + 1):
        inside = int(options["round_windows"])
        for side in ("below", "above"):
            stages.append(costs.measuring(sizes, f"measure in plan {number}, {side}", inside, cut))
        stages.append(Stage(f"measure in plan {number}, compare", 4 * whole))
    if options["swaps"]:
        stages.append(Stage("swap ranks", 0.5 * options["swaps"] * whole))
    return stages


def _swift(sizes: Sizes, options: Mapping[str, float], window: int) -> list[Stage]:
    return [costs.evaluation(sizes, "measure allocations", int(options["windows"]) * window, 11)]


def _ara(sizes: Sizes, options: Mapping[str, float], window: int) -> list[Stage]:
    tokens = int(options["batch"]) * min(window, int(options["tokens"]))
    return [costs.training(sizes, "train ranks", int(options["steps"]), tokens)]


_MEASURING = {"lems": _lems, "swift": _swift, "ara": _ara}


def announce_job(
    progress: OnProgress,
    loaded: LoadedModel | None,
    recipe: Preset,
    calibration: Calibration | CalibrationIdentity,
    *,
    ranks_are_given: bool,
    search: Sequence[Stage] = (),
    then: Sequence[str] = (),
) -> None:
    """Announce a whole compression.

    Args:
        loaded: None before the model is loaded; the stages then have names and cost nothing yet.
        search: for the fraction to remove, behind what allocators measure.
        then: stages that follow: "save".
    """
    sizes = Sizes.of(loaded)
    numbers: dict[str, Any] = {"windows": calibration.windows, "window": calibration.window}
    stages = [costs.load(sizes)]
    stages += analysis_stages(sizes, recipe.scheme, **numbers, backward=_backward(recipe, calibration))
    if not ranks_are_given:
        stages += planning_stages(sizes, recipe, window=calibration.window)
    stages += [*search, *stages_behind(sizes, recipe, **numbers, ranks_are_given=True)]
    expect(progress, stages + [_THEN[name](sizes) for name in then])


def announce_analysis(
    progress: OnProgress,
    loaded: LoadedModel | None,
    recipe: Preset,
    calibration: Calibration,
    *,
    gradients_are_given: bool,
) -> None:
    """Announce an analysis; arguments as above. Gradients that are given are not made."""
    sizes, backward = Sizes.of(loaded), 0 if gradients_are_given else _backward(recipe, calibration)
    windows, window = calibration.windows, calibration.window
    stages = analysis_stages(sizes, recipe.scheme, windows=windows, window=window, backward=backward)
    expect(progress, [costs.load(sizes), *stages])


def announce_planning(progress: OnProgress, loaded: LoadedModel | None, recipe: Preset, store: AnalysisStore) -> None:
    """Announce an allocator that runs the model."""
    sizes = Sizes.of(loaded)
    expect(progress, [costs.load(sizes), *planning_stages(sizes, recipe, window=store.identity.calibration.window)])


_THEN = {"save": costs.save}


def _backward(recipe: Preset, calibration: Calibration | CalibrationIdentity) -> int:
    """How many windows will run backward; what is not legal is refused elsewhere."""
    from unirank.analysis.calibration import GRADIENT_WINDOWS

    if calibration.gradient_windows is not None:
        return calibration.gradient_windows
    return min(GRADIENT_WINDOWS, calibration.windows) if recipe.needs_gradients else 0
