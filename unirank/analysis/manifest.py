"""`analysis.json`: what a store says of itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from unirank.analysis.identity import Identity
from unirank.disk.files import write_json
from unirank.disk.hashing import differences
from unirank.disk.strictjson import Damaged, entry, read_object
from unirank.types import LinearSpec

MANIFEST = "analysis.json"
_FORMAT = 5
_FORMATS = (3, 4, 5)  # up to 4, factors end at ceil(r*); 3 has another kind of hash of the weights
_FULL = 5
# The hash of a model's weights, of the kind of the one that is given (see `weights_hash`).
Weights = Callable[[str], str]


def write_manifest(folder: Path, identity: Identity, linears: Sequence[LinearSpec]) -> None:
    """Write the manifest of a store in `folder`. Raises WriteError when the disk refuses."""
    specs = [asdict(spec) for spec in linears]
    write_json(folder / MANIFEST, {"format": _FORMAT, "identity": identity.as_dict(), "linears": specs})


def read_manifest(folder: Path) -> tuple[Identity, tuple[LinearSpec, ...], bool]:
    """What `write_manifest` wrote, of this version or an older one, and whether factors are kept up to K.

    Raises Damaged for anything else.
    """
    manifest = read_object(folder / MANIFEST)
    if (found := entry(manifest, "format", int)) not in _FORMATS:
        raise Damaged(f"format {found}, this version reads the formats {_FORMATS[0]} to {_FORMAT}")
    linears = tuple(LinearSpec.from_dict(spec) for spec in entry(manifest, "linears", list))
    layers = [spec.layer for spec in linears]
    if layers != sorted(layers) or set(layers) != set(range(len(set(layers)))) or not layers:
        raise Damaged("its linears are not those of layers 0, 1, 2 ...")
    return Identity.from_dict(entry(manifest, "identity", dict)), linears, found >= _FULL


def identity_differences(recorded: Identity, now: Identity, weights: Weights | None) -> list[str]:
    """What differs, in words; with `weights`, the model is hashed in the way of the record, which may be an old one."""
    if weights is not None:
        found = weights(recorded.model.weights_sha256)
        now = replace(now, model=replace(now.model, weights_sha256=found))
    return differences(recorded.as_dict(), now.as_dict())
