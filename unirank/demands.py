"""What a recipe demands: of a finished store, of the calibration that makes one, and of the machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unirank.analysis.calibration import GRADIENT_WINDOWS, Calibration, calibration_of
from unirank.analysis.store import AnalysisStore
from unirank.errors import InputError, StoreError, capitalised
from unirank.recipes import Preset
from unirank.stages import with_stages_behind
from unirank.types import LoadedModel

if TYPE_CHECKING:
    from unirank.analysis.needs import Needs


def require(store: AnalysisStore, chosen: Preset) -> None:
    """Raise StoreError where a finished store lacks what a recipe needs: says what, and which command makes it."""
    scheme, used = store.identity.scheme, store.identity.calibration
    command = f"unirank analyze MODEL -o NEW-STORE --scheme {chosen.scheme} --calib {used.text}"
    command += f" --windows {used.windows} --window {used.window} --seed {used.seed} --batch {used.batch}"
    if used.texts:
        command += f" --calib-shares {','.join(str(text.windows) for text in used.texts)}"
    command += f" --clip {used.clip or 0:g}" + (f" --shrink {used.shrink:g}" if used.shrink else "")
    command += f" --precision {used.precision}" if used.precision else ""
    if chosen.needs_gradients:
        count = min(GRADIENT_WINDOWS, used.windows)
        command += f" --gradients-from {store.path}" if store.has_gradients else f" --gradients {count}"
    if scheme != chosen.scheme:
        raise StoreError(
            f"The store {store.path} has the scheme {scheme}, and {chosen.scheme} is needed; make one with: {command}."
        )
    if chosen.needs_gradients and not store.has_gradients:
        raise StoreError(
            f"The store {store.path} has no gradients, and {chosen.needs_gradients_for} needs them; make one with: "
            f"{command}."
        )


def with_gradients(calibration: Calibration, chosen: Preset) -> Calibration:
    """Gradients are made where the recipe needs them and nothing is said about them (**choice**: 32 windows)."""
    if not chosen.needs_gradients or calibration.gradient_windows is not None:
        if chosen.needs_gradients and calibration.gradient_windows == 0:
            raise InputError(
                f"{capitalised(chosen.needs_gradients_for)} needs gradients; Calibration.gradient_windows must be at "
                "least 1."
            )
        return calibration
    return dataclasses.replace(calibration, gradient_windows=min(GRADIENT_WINDOWS, calibration.windows))


def needs_of(
    loaded: LoadedModel,
    place: Path,
    chosen: Preset,
    calibration: Calibration | str | Path | None,
    *,
    remove: float | None,
    ranks_are_given: bool = False,
    **more: Any,
) -> Needs:
    """What a recipe needs of this machine: its analysis, and with `remove` all of it.

    Args:
        ranks_are_given: whether no allocator will run.
        more: of `unirank.analysis.needs.dry_run`.
    """
    from unirank.analysis.needs import dry_run

    asked = with_gradients(calibration_of(calibration), chosen)
    found = dry_run(loaded, place, scheme=chosen.scheme, calibration=asked, remove=remove, **more)
    if remove is None:
        return found
    return with_stages_behind(found, loaded, chosen, asked, ranks_are_given=ranks_are_given)
