"""The analysis store: everything expensive about a model, once, for every ratio and every allocator.

A directory with `analysis.json` (what was analysed, how, by which versions) and one safetensors file per decoder layer
(energies, factors, cosines, damping). Files appear whole or not at all; a killed run resumes at the first missing layer
from the hidden states that entered it; equal inputs give equal bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from unirank.calibrate import Streams
from unirank.errors import StoreError
from unirank.files import check_output, make_directory, sha256_text, write_json, write_tensors
from unirank.types import CosineStat, Factors, LinearSpec

MANIFEST = "analysis.json"
_FORMAT = 1
_TENSORS = r"(layer|stream)-\d{4}\.safetensors"
# What a run that was killed while it wrote leaves behind (see `write_atomically`).
_LEFTOVER = rf"\.({re.escape(MANIFEST)}|{_TENSORS})\.\d+\.tmp"


@dataclass(frozen=True)
class AnalysisStore:
    """An open store. `identity` says what the numbers depend on; two stores with one identity hold the same bytes."""

    path: Path
    identity: Mapping[str, Any]
    linears: tuple[LinearSpec, ...]

    @property
    def layer_count(self) -> int:
        return self.linears[-1].layer + 1

    @property
    def digest(self) -> str:
        """SHA-256 of the identity."""
        return sha256_text(json.dumps(self.identity, sort_keys=True))

    def layer_file(self, layer: int) -> Path:
        return self.path / f"layer-{layer:04d}.safetensors"

    def _stream_file(self, layer: int) -> Path:
        return self.path / f"stream-{layer:04d}.safetensors"

    def layers_done(self) -> int:
        """Number of layers finished without a gap."""
        return next((i for i in range(self.layer_count) if not self.layer_file(i).is_file()), self.layer_count)

    @property
    def complete(self) -> bool:
        return self.layers_done() == self.layer_count

    def require_complete(self) -> None:
        """Raise StoreError unless every layer is there."""
        if not self.complete:
            raise StoreError(
                f"The store {self.path} is not finished: {self.layers_done()} of {self.layer_count} layers; "
                "run the same analyze command again to resume."
            )

    # -- writing ------------------------------------------------------------------------------------------------------

    def write_layer(
        self, layer: int, factors: Mapping[str, Factors], cosines: Mapping[str, CosineStat], streams: Streams
    ) -> None:
        """Add one finished layer; `streams`, what enters the next one, is on disk before the layer counts as done."""
        if layer + 1 < self.layer_count:
            tensors = {f"batch.{i:06d}": hidden for i, hidden in enumerate(streams.batches)}
            write_tensors(self._stream_file(layer + 1), tensors | {"probe": streams.probe}, {"layer": layer + 1})
        tensors = {}
        for name, factor in factors.items():
            tensors |= {f"{name}.energy": factor.energy, f"{name}.left": factor.left, f"{name}.right": factor.right}
        header = {
            "layer": layer,
            "cosines": {key: asdict(stat) for key, stat in cosines.items()},
            "damping": {name: factor.damping for name, factor in factors.items()},
        }
        write_tensors(self.layer_file(layer), tensors, header)
        self._stream_file(layer).unlink(missing_ok=True)

    def has_streams(self, layer: int) -> bool:
        """Whether the hidden states that enter `layer` are on disk; they are while `layer` is the next to do."""
        return self._stream_file(layer).is_file()

    def remove_leftovers(self) -> None:
        """Delete what a killed run left: half-written files, and hidden states that are not those of the next layer."""
        needed = self._stream_file(self.layers_done()).name
        _remove(self.path, rf"{_LEFTOVER}|(?!{re.escape(needed)})stream-\d{{4}}\.safetensors")

    def read_streams(self, layer: int, device: torch.device) -> Streams:
        """The hidden states that enter `layer`, as a killed run left them; raises StoreError when they are missing."""
        file = self._stream_file(layer)
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise _damaged(file, error) from error
        probe = tensors.pop("probe").to(device)
        return Streams([tensors[key].to(device) for key in sorted(tensors)], probe)

    # -- reading ------------------------------------------------------------------------------------------------------

    def cosines(self) -> list[dict[str, CosineStat]]:
        """Per layer: the cosine statistics of "attention", "mlp" and "block"."""
        return [
            {key: CosineStat(**stat) for key, stat in self._header(layer)["cosines"].items()}
            for layer in range(self.layer_count)
        ]

    def energies(self) -> dict[str, torch.Tensor]:
        """Energy spectrum `[K]` (float64, descending) of every linear, in the order of `linears`."""
        energies = {}
        for layer in range(self.layer_count):
            file = self.layer_file(layer)
            try:
                with safe_open(file, framework="pt") as tensors:
                    for spec in self.linears:
                        if spec.layer == layer:
                            energies[spec.name] = tensors.get_tensor(f"{spec.name}.energy")
            except (OSError, SafetensorError) as error:
                raise _damaged(file, error) from error
        return energies

    def factors(self, spec: LinearSpec, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`left [M, R]` and `right [R, N]` of the first `rank` components. Raises StoreError beyond what is stored."""
        file = self.layer_file(spec.layer)
        try:
            with safe_open(file, framework="pt") as tensors:
                left = tensors.get_tensor(f"{spec.name}.left")
                right = tensors.get_tensor(f"{spec.name}.right")
        except (OSError, SafetensorError) as error:
            raise _damaged(file, error) from error
        if rank > left.shape[1]:
            raise StoreError(f"{file} holds {left.shape[1]} components of {spec.name}, the plan asks for {rank}.")
        return left[:, :rank].contiguous(), right[:rank].contiguous()

    def _header(self, layer: int) -> dict[str, Any]:
        file = self.layer_file(layer)
        try:
            with safe_open(file, framework="pt") as tensors:
                return json.loads(tensors.metadata()["unirank"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise _damaged(file, error) from error


def create_or_resume(
    path: Path, identity: Mapping[str, Any], linears: tuple[LinearSpec, ...], *, overwrite: bool = False
) -> AnalysisStore:
    """Open the store at `path` for writing: a new one, or the unfinished or finished one of the same identity.

    Raises:
        InputError: the directory exists and is not a store.
        StoreError: it is a store of something else; says what differs.
    """
    if path.is_dir() and all(re.fullmatch(_LEFTOVER, file.name) for file in path.iterdir()):
        _remove(path, _LEFTOVER)  # of a run that was killed while it wrote the manifest
    check_output(path, marker=MANIFEST, overwrite=True)
    store = AnalysisStore(path, identity, linears)
    if (path / MANIFEST).is_file():
        try:
            found = open_store(path)
        except StoreError:
            if not overwrite:
                raise
        else:
            differs = _differences(found.identity, identity)
            if not differs and found.linears == linears:
                store.remove_leftovers()
                return store
            if not overwrite:
                raise StoreError(
                    f"The store {path} belongs to another analysis; it differs in "
                    f"{'; '.join(differs) or 'its linears'}. "
                    "Choose another directory, or pass --overwrite to replace it."
                )
        # The old manifest goes last, when the new one takes its place: without one this would be no store of ours.
        _remove(path, rf"{_LEFTOVER}|{_TENSORS}")
    make_directory(path)
    manifest = {"format": _FORMAT, "identity": identity, "linears": [asdict(spec) for spec in linears]}
    write_json(path / MANIFEST, manifest)
    return store


def open_store(path: str | Path) -> AnalysisStore:
    """Open a store for reading. Raises StoreError when `path` is none, or its manifest is damaged."""
    path = Path(path)
    file = path / MANIFEST
    if not file.is_file():
        raise StoreError(
            f"{path} is not an analysis store: it has no {MANIFEST}; make one with: unirank analyze MODEL -o STORE."
        )
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT:
            raise ValueError(f"format {manifest['format']!r}, this version reads format {_FORMAT}")
        linears = tuple(LinearSpec(**spec) for spec in manifest["linears"])
        return AnalysisStore(path, manifest["identity"], linears)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(file, error, "replace the store with: unirank analyze --overwrite") from error


def _remove(folder: Path, pattern: str) -> None:
    for file in list(folder.iterdir()):
        if re.fullmatch(pattern, file.name):
            file.unlink()


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """What differs, in words; hashes only where nothing that can be read differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = sorted(old.keys() | new.keys())
        lines = [line for key in keys for line in _differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))]
        return [line for line in lines if "sha256" not in line] or lines
    short = [value[:12] if "sha256" in path and isinstance(value, str) else value for value in (old, new)]
    return [] if old == new else [f"{path} (store: {short[0]!r}, now: {short[1]!r})"]


def _damaged(
    file: Path, error: Exception, remedy: str = "delete it and run the same analyze command again"
) -> StoreError:
    return StoreError(f"{file} is missing or damaged ({error}); {remedy}.")
