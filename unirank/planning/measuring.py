"""A workbench for allocators that measure: the dense model and the calibration windows of a store, made again."""

from __future__ import annotations

from unirank.analysis.calibration import Calibration, windows_of
from unirank.analysis.identity import check_model
from unirank.analysis.store import AnalysisStore
from unirank.disk.hashing import sha256_tensors
from unirank.errors import InputError
from unirank.planning.allocator import Workbench
from unirank.progress import OnProgress, silent
from unirank.text.records import NAMED
from unirank.text.windows import BUILTIN, BUILTIN_HELD_OUT, read_text
from unirank.types import LoadedModel


def make_workbench(
    loaded: LoadedModel, store: AnalysisStore, *, text: str | None = None, progress: OnProgress = silent
) -> Workbench:
    """The windows that calibrated `store`, drawn again, with the dense model that it was made from.

    Args:
        loaded: the dense model; nothing that measures changes it.
        text: the calibration text, a path or builtin name; None takes a builtin one from the store, which knows a
            file only by its name.

    Raises InputError when the model or the windows are not the store's, or the text has to be named.
    """
    loaded.require_whole("Measuring the model")
    recorded = store.identity["calibration"]
    if text is None and recorded["text"] not in (BUILTIN, BUILTIN_HELD_OUT, *NAMED):
        raise InputError(
            f"The store {store.path} was calibrated on {recorded['text']!r}, a file that it knows by name only; "
            "give its path with --calib."
        )
    check_model(loaded, store)
    dataset = {key: recorded.get(key) for key in ("split", "revision")}
    source = read_text(text if text is not None else recorded["text"], loaded.tokenizer, **dataset)
    drawn = Calibration(source.name, recorded["windows"], recorded["window"], recorded["seed"])
    windows = windows_of(loaded, source, drawn)
    found, expected = sha256_tensors([("windows", windows)]), recorded["windows_sha256"]
    if found != expected:
        raise InputError(
            f"The text {source.name} does not give the calibration windows of the store {store.path}: their sha256 is "
            f"{found[:12]}, the store's is {expected[:12]}; give the text it was calibrated on ({recorded['text']!r})."
        )
    return Workbench(loaded, windows, progress)
