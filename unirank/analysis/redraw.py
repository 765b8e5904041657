"""What a finished analysis was made from, found again: its model checked by hash, its calibration windows redrawn.

A store keeps hashes, and neither weights nor tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from unirank.analysis.calibration import Calibration, texts_of, windows_of
from unirank.analysis.identity import CalibrationIdentity, weights_hash
from unirank.analysis.store import AnalysisStore
from unirank.disk.hashing import sha256_tensors
from unirank.errors import InputError
from unirank.text.mixture import sources_of
from unirank.text.records import NAMED
from unirank.text.windows import BUILTIN, BUILTIN_HELD_OUT
from unirank.types import LoadedModel

_BY_NAME = (BUILTIN, BUILTIN_HELD_OUT, *NAMED)  # texts that their name alone finds, wherever the store goes


def check_model(loaded: LoadedModel, store: AnalysisStore) -> None:
    """Raise InputError unless `loaded` is dense, and the model that `store` was made from: the same linears, and the
    same weights."""
    loaded.require_dense()
    recorded = store.identity.model.weights_sha256
    if store.linears != loaded.linears or recorded != weights_hash(loaded, like=recorded):
        raise InputError(
            f"The store {store.path} was made from another model than {loaded.source}: the weights differ."
        )


def text_to_redraw(store: AnalysisStore, text: str | None) -> str:
    """What is to be read: `text`, or where it is None the recorded text, if its name is enough to find it. Cheap.

    Raises InputError where `text` is None and the store was calibrated on a file, which it knows by name only; and
    where `text` is not as many texts as the store was calibrated on.
    """
    recorded = store.identity.calibration
    names = [one.name for one in recorded.texts] if recorded.texts else [recorded.text]
    if text is not None:
        if len(names) != (given := len(sources_of(text))):
            raise InputError(
                f"The store {store.path} was calibrated on {len(names)} texts ({recorded.text}), and {text!r} is "
                f"{given}; give all of them as text=, with commas between them."
            )
        return text
    files = [name for name in names if name not in _BY_NAME]
    if files and len(names) == 1:
        raise InputError(
            f"The store {store.path} was calibrated on {files[0]!r}, a file that it knows by name only; "
            "give its path as text=."
        )
    if files:
        raise InputError(
            f"The store {store.path} was calibrated on {recorded.text!r}, of which it knows {', '.join(files)} by name "
            "only; give the paths or names of all of them as text=, with commas between them."
        )
    return recorded.text


def calibration_to_redraw(store: AnalysisStore, text: str | None) -> Calibration:
    """Which tokens calibrated `store`, its text as in `text_to_redraw`, and raises like it."""
    recorded = store.identity.calibration
    drawn = Calibration(text_to_redraw(store, text), recorded.windows, recorded.window, recorded.seed)
    drawn = replace(drawn, split=recorded.split, revision=recorded.revision)
    return replace(drawn, shares=[one.windows for one in recorded.texts]) if recorded.texts else drawn


def is_text_of(loaded: LoadedModel, store: AnalysisStore, text: str) -> bool:
    """Whether `store` was calibrated on `text`: the same content, or of several texts the same contents in any order.

    Raises InputError like `texts_of`.
    """
    recorded = store.identity.calibration
    texts = texts_of(loaded, Calibration(text, split=recorded.split, revision=recorded.revision))
    return sorted(one.sha256 for one in texts) == sorted(map(str, _hashes(recorded)))


def _hashes(recorded: CalibrationIdentity) -> list[str | None]:
    return [text.sha256 for text in recorded.texts] if recorded.texts else [recorded.text_sha256]


def redrawn_windows(loaded: LoadedModel, store: AnalysisStore, *, text: str | None = None) -> torch.Tensor:
    """The windows that calibrated `store`, int64 `[W, T]`, checked against the hash that it keeps of them.

    Args:
        loaded: the model that was analysed (see `check_model`), with its tokenizer.
        text: the calibration text, as `Calibration.text` named it, of several all, in any order; None takes builtin or
            named ones from the store.

    Raises InputError where the text must be given, cannot be read, or does not give the store's windows; says whether
    the text or the tokenizer is another one.
    """
    recorded = store.identity.calibration
    drawn = calibration_to_redraw(store, text)
    source = drawn.text
    texts = texts_of(loaded, drawn)
    same = sorted(one.sha256 for one in texts) == sorted(map(str, _hashes(recorded)))
    if same:  # in whatever order they were given
        texts = sorted(texts, key=lambda one: _hashes(recorded).index(one.sha256))
    windows = windows_of(loaded, texts, drawn)
    if sha256_tensors([("windows", windows)]) == recorded.windows_sha256:
        return windows
    if same:
        reason = f"the tokenizer of {loaded.source} makes other windows of it than the store was made from"
    elif source == recorded.text and set(sources_of(source)) <= set(_BY_NAME):
        reason = "it is another here than where the store was made (another version); give that text as text="
    else:
        reason = f"it is not the one that the store was made from ({recorded.text!r}); give that text as text="
    raise InputError(f"The text {source} does not give the calibration windows of the store {store.path}: {reason}.")
