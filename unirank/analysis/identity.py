"""The identity of an analysis: what its numbers depend on, by hash."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from unirank.analysis.calibration import PRECISIONS, Calibration, windows_each
from unirank.disk.hashing import fingerprint, sha256_tensors, sha256_text, sha256_tree
from unirank.disk.strictjson import Damaged, entry
from unirank.provenance import device_name, versions
from unirank.text.mixture import SEPARATOR
from unirank.types import LoadedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from unirank.text.windows import Text

TREE = "tree:"  # before a hash of hashes; without it, a hash is of the serial kind of stores up to format 3
_READ_BYTES = 2**26  # of a streamed model's tensors, that wait to be hashed while the next is read
_KEYS = {"class_name": "class"}  # fields whose names in JSON are no names in Python
_Part = TypeVar("_Part", bound="_Fields")


@dataclass(frozen=True, kw_only=True)
class _Fields:
    """Reads and writes the plain fields of a record: `str`, `int`, or one of them that may be absent (None)."""

    more: Mapping[str, Any] = field(default_factory=dict)  # what else was read; kept as it was

    @classmethod
    def _parse(cls: type[_Part], record: Any, place: str, **known: Any) -> _Part:
        rest, values = dict(record), dict(known)
        for one in fields(cls):
            key, kinds = _KEYS.get(one.name, one.name), str(one.type).split(" | ")
            if one.name == "more":
                continue
            if one.name in known:
                rest.pop(key, None)
            elif key in rest and type(rest[key]).__name__ in kinds:
                values[one.name] = rest.pop(key)
            elif "None" not in kinds or rest.get(key) is not None:
                said = f"is {str(rest[key])[:80]!r}" if key in rest else "is missing"
                raise Damaged(f"its identity is not legal: {place}{key} {said}")
        return cls(**values, more=rest)

    def as_dict(self) -> dict[str, Any]:
        """The record for JSON, exactly as it was read."""
        own = {_KEYS.get(one.name, one.name): getattr(self, one.name) for one in fields(self) if one.name != "more"}
        return {key: value for key, value in own.items() if value is not None} | dict(self.more)


@dataclass(frozen=True, kw_only=True)
class ModelIdentity(_Fields):
    """The model that was analysed.

    Attributes:
        class_name: of transformers; "class" in JSON.
        weights_sha256: see `weights_hash`.
        dtype: of the weights, "float32".
        type: of the config.
    """

    class_name: str
    weights_sha256: str
    dtype: str
    type: str | None = None
    config_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class TextIdentity(_Fields):
    """One of several texts: its name, SHA-256 of its content, and how many windows are of it."""

    name: str
    sha256: str
    windows: int


@dataclass(frozen=True, kw_only=True)
class CalibrationIdentity(_Fields):
    """The windows that calibrated it: `Calibration`, with hashes, and the text by its name alone.

    Attributes:
        text, text_sha256: of one text; of several, all names with commas between them, and None.
        texts: of several texts, each; None is one.
        clip, shrink: of `Calibration`; None is 0, as in all stores from before there was one.
        precision: `Calibration.precision`; None is "float64", as in all stores from before there was a choice.
    """

    text: str
    windows_sha256: str
    windows: int
    window: int
    seed: int
    batch: int
    text_sha256: str | None = None
    gradient_windows: int | None = None
    split: str | None = None
    revision: str | None = None
    clip: float | None = None
    shrink: float | None = None
    precision: str | None = None
    texts: tuple[TextIdentity, ...] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The record for JSON, exactly as it was read."""
        found = super().as_dict()
        return found if self.texts is None else found | {"texts": [text.as_dict() for text in self.texts]}


@dataclass(frozen=True, kw_only=True)
class Identity(_Fields):
    """What an analysis depends on. Two stores with one identity hold the same bytes.

    Attributes:
        processes: that shared the windows; None is one.
    """

    model: ModelIdentity
    calibration: CalibrationIdentity
    scheme: str
    versions: Mapping[str, str]
    tokenizer_sha256: str | None = None
    device: str | None = None
    processes: int | None = None

    @classmethod
    def from_dict(cls, record: Any) -> Identity:
        """Read `as_dict`'s result, of any version. Raises Damaged, with what is missing or not legal."""
        if not isinstance(record, dict):
            raise Damaged("its identity is no object")
        model = ModelIdentity._parse(entry(record, "model", dict), "model.")
        calibration = _parsed_calibration(entry(record, "calibration", dict))
        used = entry(record, "versions", dict)
        if not all(isinstance(version, str) for version in (used.get("unirank"), *used.values())):
            raise Damaged("its identity is not legal: versions.unirank is missing, or a version is no text")
        found = cls._parse(record, "", model=model, calibration=calibration, versions=used)
        least = {"windows": 1, "window": 1, "batch": 1, "gradient_windows": 0}
        for key, low in least.items():
            value = getattr(calibration, key)
            if value is not None and value < low:
                raise Damaged(f"its identity is not legal: calibration.{key} is {value}")
        if calibration.clip is not None and not 1 <= calibration.clip < math.inf:
            raise Damaged(f"its identity is not legal: calibration.clip is {calibration.clip}")
        if calibration.shrink is not None and not 0 < calibration.shrink <= 1:
            raise Damaged(f"its identity is not legal: calibration.shrink is {calibration.shrink}")
        if calibration.precision not in (None, *PRECISIONS):
            raise Damaged(f"its identity is not legal: calibration.precision is {calibration.precision!r}")
        return found

    def as_dict(self) -> dict[str, Any]:
        """The record for JSON, exactly as it was read."""
        parts = {"model": self.model.as_dict(), "calibration": self.calibration.as_dict()}
        return super().as_dict() | parts | {"versions": dict(self.versions)}


def _parsed_calibration(record: Any) -> CalibrationIdentity:
    place, known = "calibration.", {}
    if record.get("texts") is not None:
        texts = entry(record, "texts", list)
        if len(texts) < 2 or not all(isinstance(text, dict) for text in texts):
            raise Damaged(f"its identity is not legal: {place}texts are not two or more objects")
        named = [(f"{place}texts.{index}.", text) for index, text in enumerate(texts)]
        known["texts"] = tuple(TextIdentity._parse(text, where) for where, text in named)
        if (few := min(text.windows for text in known["texts"])) < 1:
            raise Damaged(f"its identity is not legal: {place}texts has a text of {few} windows")
    return CalibrationIdentity._parse(record, place, **known)


def make_identity(
    loaded: LoadedModel,
    texts: Sequence[Text],
    windows: torch.Tensor,
    calibration: Calibration,
    backward: int,
    scheme: str,
    *,
    weights_sha256: str,
) -> Identity:
    """The identity of an analysis that is about to be made.

    Args:
        texts: as `texts_of` gives them.
        windows: calibration tokens, int64 `[W, T]`, of which the first `backward` run backward.
        calibration: as `settled` gives it.
        weights_sha256: what `weights_hash` says of the model.
    """
    parameter = next(loaded.model.parameters())
    several = None
    if len(texts) > 1:
        counted = zip(texts, windows_each(texts, calibration), strict=True)
        several = tuple(TextIdentity(name=text.name, sha256=text.sha256, windows=count) for text, count in counted)
    return Identity(
        model=ModelIdentity(
            type=loaded.model.config.model_type,
            class_name=type(loaded.model).__name__,
            config_sha256=sha256_text(loaded.model.config.to_json_string()),
            weights_sha256=weights_sha256,
            dtype=str(parameter.dtype).removeprefix("torch."),
        ),
        tokenizer_sha256=tokenizer_hash(loaded.tokenizer),
        calibration=CalibrationIdentity(
            text=SEPARATOR.join(text.name for text in texts),
            text_sha256=None if several else texts[0].sha256,
            windows_sha256=sha256_tensors([("windows", windows)]),
            windows=calibration.windows,
            window=calibration.window,
            seed=calibration.seed,
            batch=calibration.batch,
            gradient_windows=backward,
            split=texts[0].split,
            revision=texts[0].revision,
            clip=calibration.clip or None,
            shrink=calibration.shrink or None,
            precision=None if calibration.precision == "float64" else calibration.precision,
            texts=several,
        ),
        scheme=scheme,
        device=device_name(loaded.device),
        versions=versions(),
    )


def weights_hash(loaded: LoadedModel, *, like: str = TREE) -> str:
    """SHA-256 over every tensor of the model: the identity of what was analysed.

    It is remembered with the model, and made again where a tensor was written to, replaced or moved since.

    Args:
        like: a hash on record, whose kind is taken: "tree:" and a hash of hashes (see `sha256_tree`), or plainly the
            hash over all bytes in the order of names (see `sha256_tensors`), as stores up to format 3 have it.
    """
    kind = TREE if like.startswith(TREE) else ""
    seen = _stamps(loaded)
    known = loaded.hashes.get(kind)
    if seen is not None and known is not None and known[0] == seen:
        return known[1]
    if kind == TREE:
        found = TREE + sha256_tree(loaded.state(by_name=True), limit=None if loaded.pages is None else _READ_BYTES)
    else:
        found = sha256_tensors(loaded.state(by_name=True))
    loaded.hashes[kind] = seen, found
    return found


def _stamps(loaded: LoadedModel) -> tuple[Any, ...] | None:
    """One of each tensor of the model: where it is, and what tells that it is as it was; None where nothing tells."""
    stamps = []
    for name, tensor in sorted(loaded.model.state_dict().items()):
        if tensor.is_meta:
            stamp = None if loaded.pages is None else loaded.pages.stamp(name)
            if stamp is None:
                return None
            stamps.append((name, stamp))
        else:
            # torch counts what it writes itself, but not through `.data` or numpy.
            version = None if tensor.is_inference() else tensor._version
            stamps.append((name, tensor.device, tensor.data_ptr(), version, fingerprint(tensor)))
    return tuple(stamps)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over the vocabulary and the special tokens."""
    vocabulary = "\n".join(f"{index} {token!r}" for token, index in sorted(tokenizer.get_vocab().items()))
    return sha256_text(f"{vocabulary}\n{tokenizer.special_tokens_map}")
