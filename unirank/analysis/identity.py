"""The identity of an analysis: what its numbers depend on, by hash."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from unirank.analysis.calibration import Calibration
from unirank.disk.hashing import sha256_tensors, sha256_text
from unirank.errors import InputError
from unirank.provenance import device_name, versions
from unirank.text.windows import Text
from unirank.types import LoadedModel

if TYPE_CHECKING:
    from unirank.analysis.store import AnalysisStore


def weights_hash(loaded: LoadedModel) -> str:
    """SHA-256 over every tensor of the model, in name order: the identity of what was analysed."""
    return sha256_tensors(loaded.state(by_name=True))


def check_model(loaded: LoadedModel, store: AnalysisStore) -> None:
    """Raise InputError unless `store` was made from the model `loaded`: the same linears, and the same weights."""
    if store.linears != loaded.linears or store.identity["model"]["weights_sha256"] != weights_hash(loaded):
        raise InputError(
            f"The store {store.path} was made from another model than {loaded.source}: the weights differ."
        )


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over the vocabulary and the special tokens."""
    vocabulary = "\n".join(f"{index} {token!r}" for token, index in sorted(tokenizer.get_vocab().items()))
    return sha256_text(f"{vocabulary}\n{tokenizer.special_tokens_map}")


def _identity(
    loaded: LoadedModel,
    text: Text,
    windows: torch.Tensor,
    calibration: Calibration,
    backward: int,
    scheme: str,
) -> dict[str, Any]:
    parameter = next(loaded.model.parameters())
    return {
        "model": {
            "type": loaded.model.config.model_type,
            "class": type(loaded.model).__name__,
            "config_sha256": sha256_text(loaded.model.config.to_json_string()),
            "weights_sha256": weights_hash(loaded),
            "dtype": str(parameter.dtype).removeprefix("torch."),
        },
        "tokenizer_sha256": tokenizer_hash(loaded.tokenizer),
        "calibration": {
            "text": text.name,
            "text_sha256": text.sha256,
            "windows_sha256": sha256_tensors([("windows", windows)]),
            "windows": calibration.windows,
            "window": calibration.window,
            "seed": calibration.seed,
            "batch": calibration.batch,
            "gradient_windows": backward,
        }
        | {key: value for key in ("split", "revision") if (value := getattr(text, key)) is not None},
        "scheme": scheme,
        "device": device_name(parameter.device),
        "versions": versions(),
    }


# What is read of an identity elsewhere, and its type.
_IDENTITY = {
    ("model", "class"): str,
    ("model", "weights_sha256"): str,
    ("model", "dtype"): str,
    ("calibration", "text"): str,
    ("calibration", "windows_sha256"): str,
    ("calibration", "windows"): int,
    ("calibration", "window"): int,
    ("calibration", "seed"): int,
    ("calibration", "batch"): int,
    ("versions", "unirank"): str,
    ("scheme",): str,
}


def check_identity(identity: Any) -> None:
    """Raise ValueError unless a record says of an analysis what is asked of it."""
    for path, kind in _IDENTITY.items():
        value: Any = identity
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if not isinstance(value, kind):
            raise ValueError(f"its identity has no {'.'.join(path)}")
