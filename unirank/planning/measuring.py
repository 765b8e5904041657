"""A workbench for allocators that measure: the dense model and the calibration windows of a store, made again."""

from __future__ import annotations

from unirank.analysis.redraw import check_model, redrawn_windows, text_to_redraw
from unirank.analysis.store import AnalysisStore
from unirank.planning.allocator.base import Workbench
from unirank.progress import OnProgress, silent
from unirank.types import LoadedModel


def make_workbench(
    loaded: LoadedModel, store: AnalysisStore, *, text: str | None = None, progress: OnProgress = silent
) -> Workbench:
    """The windows that calibrated `store`, drawn again, with the dense model that it was made from.

    Args:
        loaded: the dense model; nothing that measures changes it.
        text: the calibration text, as `Calibration.text` named it; None takes a builtin or named one from the store,
            which knows a file only by its name.

    Raises InputError when the model or the windows are not the store's, or the text has to be named.
    """
    loaded.require_whole("Measuring the model")
    text_to_redraw(store, text)  # cheap, so before the model is hashed
    check_model(loaded, store)
    return Workbench(loaded, redrawn_windows(loaded, store, text=text), progress)
