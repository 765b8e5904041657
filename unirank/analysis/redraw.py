"""What a finished analysis was made from, found again: its model checked by hash, its calibration windows redrawn.

A store keeps hashes, and neither weights nor tokens.
"""

from __future__ import annotations

import torch

from unirank.analysis.calibration import Calibration, windows_of
from unirank.analysis.identity import weights_hash
from unirank.analysis.store import AnalysisStore
from unirank.disk.hashing import sha256_tensors
from unirank.errors import InputError
from unirank.text.records import NAMED
from unirank.text.windows import BUILTIN, BUILTIN_HELD_OUT, read_text
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

    Raises InputError where `text` is None and the store was calibrated on a file, which it knows by name only.
    """
    recorded = store.identity.calibration.text
    if text is not None:
        return text
    if recorded not in _BY_NAME:
        raise InputError(
            f"The store {store.path} was calibrated on {recorded!r}, a file that it knows by name only; "
            "give its path as text=."
        )
    return recorded


def redrawn_windows(loaded: LoadedModel, store: AnalysisStore, *, text: str | None = None) -> torch.Tensor:
    """The windows that calibrated `store`, int64 `[W, T]`, checked against the hash that it keeps of them.

    Args:
        loaded: the model that was analysed (see `check_model`), with its tokenizer.
        text: the calibration text, as `Calibration.text` named it; None takes a builtin or named one from the store.

    Raises InputError where the text must be given, cannot be read, or does not give the store's windows; says whether
    the text or the tokenizer is another one.
    """
    recorded = store.identity.calibration
    source = text_to_redraw(store, text)
    content = read_text(source, loaded.tokenizer, split=recorded.split, revision=recorded.revision)
    drawn = Calibration(source, recorded.windows, recorded.window, recorded.seed)
    windows = windows_of(loaded, content, drawn)
    if sha256_tensors([("windows", windows)]) == recorded.windows_sha256:
        return windows
    if content.sha256 == recorded.text_sha256:
        reason = f"the tokenizer of {loaded.source} makes other windows of it than the store was made from"
    elif source == recorded.text and source in _BY_NAME:
        reason = "it is another here than where the store was made (another version); give that text as text="
    else:
        reason = f"it is not the one that the store was made from ({recorded.text!r}); give that text as text="
    raise InputError(f"The text {source} does not give the calibration windows of the store {store.path}: {reason}.")
