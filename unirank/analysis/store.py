"""The analysis store: everything expensive about a model, once, for every ratio and every allocator.

A directory with `analysis.json` (what was analysed, how, by which versions) and one safetensors file per decoder layer
(energies, factors, cosines, damping). Files appear whole or not at all; a killed run resumes at the first missing layer
from the hidden states that entered it; equal inputs give equal bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from unirank.analysis import layer_file, shown
from unirank.analysis.identity import Identity
from unirank.analysis.kept_numbers import kept_numbers
from unirank.analysis.manifest import MANIFEST, Weights, identity_differences, read_manifest, write_manifest
from unirank.disk.files import check_output, delete, delete_matching, leftover, link_or_copy, make_directory
from unirank.disk.hashing import sha256_text
from unirank.disk.strictjson import Damaged
from unirank.disk.tensorfile import TensorFile, open_tensors, read_tensors, write_tensors
from unirank.errors import StoreError
from unirank.layerwise.recording import Streams
from unirank.queues import PageLocked
from unirank.types import CosineStat, ExpertSpec, Factors, Form, Gradient, LinearSpec, ListedSpec

Scratch = Literal["forward", "backward"]
_TENSORS = r"(layer|stream|forward|backward|gradient)-\d{4}\.safetensors"
_MEASURED = r"measured-[a-z0-9-]+\.json"
_PASSING = r"(stream|forward|backward)-\d{4}\.safetensors"  # only there while a later step needs them
# What a run that was killed while it wrote leaves behind (see `write_atomically` and `mapped_copy`).
_LEFTOVER = rf"{leftover(f'{re.escape(MANIFEST)}|{_TENSORS}|{_MEASURED}')}|\.hidden\.\d+\.tmp"


@dataclass(frozen=True)
class AnalysisStore:
    """An open store. `identity` says what the numbers depend on; two stores with one identity hold the same bytes.

    Attributes:
        full: factors are kept up to K; those of formats up to 4 end at ceil(r*), which the pivoted form goes beyond.
    """

    path: Path
    identity: Identity
    linears: tuple[LinearSpec, ...]
    full: bool = True

    def __repr__(self) -> str:
        return shown.as_lines(self)

    def _repr_html_(self) -> str:
        return shown.as_html(self)

    @property
    def layer_count(self) -> int:
        return self.linears[-1].layer + 1

    @property
    def digest(self) -> str:
        """SHA-256 of the identity."""
        return sha256_text(json.dumps(self.identity.as_dict(), sort_keys=True))

    def _file(self, kind: str, layer: int) -> Path:
        return self.path / f"{kind}-{layer:04d}.safetensors"

    def layer_file(self, layer: int) -> Path:
        return self._file("layer", layer)

    def _stream_file(self, layer: int) -> Path:
        return self._file("stream", layer)

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

    def require_form(self, form: Form) -> None:
        """Raise StoreError where the factors that are kept do not reach as far as ranks of that form."""
        if form == "pivoted" and not self.full:
            raise StoreError(
                f"The store {self.path} was made by an earlier version, whose factors end at break-even, and the form "
                "pivoted goes beyond it; make the store again with: unirank analyze --overwrite, or plan with "
                "form='factors'."
            )

    def write_layer(
        self,
        layer: int,
        factors: Mapping[str, Factors],
        cosines: Mapping[str, CosineStat],
        streams: Streams | None,
        shares: Mapping[str, float] | None = None,
    ) -> None:
        """Add one finished layer; `streams`, what enters the next one, is on disk before the layer counts as done.

        None keeps none: a killed run then makes them again. `shares` are those of the router's weight, by the matrices
        of experts.
        """
        if streams is not None and layer + 1 < self.layer_count:
            tensors = {f"batch.{i:06d}": hidden for i, hidden in enumerate(streams.batches)}
            write_tensors(self._stream_file(layer + 1), tensors | {"probe": streams.probe}, {"layer": layer + 1})
        write_tensors(self.layer_file(layer), *layer_file.contents(layer, factors, cosines, shares))
        self._stream_file(layer).unlink(missing_ok=True)

    def has_streams(self, layer: int) -> bool:
        """Whether the hidden states that enter `layer` are on disk; they are while `layer` is the next to do."""
        return self._stream_file(layer).is_file()

    def remove_leftovers(self) -> None:
        """Delete what a killed run left: half-written files, and streams and gradients that no step reads again."""
        needed = {self._stream_file(self.layers_done())}
        remaining = self.layers_without_gradients()
        if remaining and self.has_scratch("backward", remaining):
            needed |= {self._file("backward", remaining), *(self._file("forward", i) for i in range(remaining))}
        elif remaining:
            needed |= {self._file("forward", i) for i in range(self.layer_count + 1)}
        for file in list(self.path.iterdir()):
            if re.fullmatch(_LEFTOVER, file.name) or (re.fullmatch(_PASSING, file.name) and file not in needed):
                delete(file)

    def read_streams(
        self, layer: int, device: torch.device, scratch: Path | None = None, host: PageLocked | None = None
    ) -> Streams:
        """The hidden states that enter `layer`, kept as in `Streams`; raises StoreError when they are missing."""
        file = self._stream_file(layer)
        tensors = _load(file)
        if "probe" not in tensors:
            raise _damaged(file, Damaged("it has no probe"))
        streams, away = Streams([], tensors.pop("probe").to(device), scratch, host), scratch or host
        for position, key in enumerate(sorted(tensors)):
            streams.put(position, tensors.pop(key) if away else tensors.pop(key).to(device))
        return streams

    def layers_without_gradients(self) -> int:
        """Layers whose gradients are still to do; they are made from the last layer to the first."""
        return next((i + 1 for i in reversed(range(self.layer_count)) if not self._file("gradient", i).is_file()), 0)

    def write_gradients(self, layer: int, gradients: Mapping[str, Gradient]) -> None:
        """Keep the gradients of one layer, matrices in float32."""
        tensors = {}
        for name, gradient in gradients.items():
            tensors |= {f"{name}.g": gradient.g.float(), f"{name}.weight": gradient.weight.float()}
            tensors[f"{name}.rows"] = gradient.rows
        write_tensors(self._file("gradient", layer), tensors, {"layer": layer})

    def check_shared(self, identity: Identity, weights: Weights) -> None:
        """Raise StoreError unless the gradients here are finished and those of an analysis of `identity`.

        `weights` as in `create_or_resume`.
        """
        if remaining := self.layers_without_gradients():
            raise StoreError(
                f"The gradients of the store {self.path} are not finished: {remaining} layers are missing."
            )

        def plain(of: Identity) -> Identity:  # without what gradients do not depend on
            return replace(of, scheme="", calibration=replace(of.calibration, clip=None, shrink=None, precision=None))

        differs = identity_differences(plain(self.identity), plain(identity), weights)
        if differs:
            raise StoreError(f"The gradients of the store {self.path} are of another analysis: {'; '.join(differs)}.")

    def share_gradients(self, source: AnalysisStore) -> None:
        """Take the gradient files of `source` that are missing here: one file under two names where the disk can."""
        for layer in range(self.layer_count):
            if not self._file("gradient", layer).is_file():
                link_or_copy(source._file("gradient", layer), self._file("gradient", layer))

    def has_scratch(self, kind: Scratch, layer: int) -> bool:
        """Whether what enters (`forward`) or arrives backward at the input of (`backward`) `layer` is on disk."""
        return self._file(kind, layer).is_file()

    def write_scratch(self, kind: Scratch, layer: int, batches: Sequence[torch.Tensor]) -> None:
        """Keep one tensor `[B, T, D]` a batch until `remove_scratch`."""
        tensors = {f"batch.{i:06d}": batch for i, batch in enumerate(batches)}
        write_tensors(self._file(kind, layer), tensors, {"layer": layer})

    def read_scratch(self, kind: Scratch, layer: int, device: torch.device) -> list[torch.Tensor]:
        """What `write_scratch` kept; raises StoreError when it is missing or damaged."""
        tensors = _load(self._file(kind, layer))
        return [tensors[key].to(device) for key in sorted(tensors)]

    def remove_scratch(self, kind: Scratch, layer: int) -> None:
        self._file(kind, layer).unlink(missing_ok=True)

    def measured(
        self,
        rule: str,
        settings: Mapping[str, Any],
        measure: Callable[[], Mapping[str, float]],
        keys: Collection[str] | None = None,
    ) -> dict[str, float]:
        """One number for each of `keys` (None: the linears) that `measure()` finds by running the model, kept.

        It is measured again only for other `settings`, which must name all that it depends on besides this store. A
        store that may not be written to keeps nothing. Raises StoreError when what was kept is damaged, and what
        `measure` raises.
        """
        key = sha256_text(json.dumps([self.digest, settings], sort_keys=True))
        file = self.path / f"measured-{rule}-{key[:12]}.json"
        names = [spec.name for spec in self.linears] if keys is None else list(keys)
        try:
            return kept_numbers(file, settings, names, measure)
        except Damaged as error:
            raise _damaged(file, error, "delete it and plan again") from error

    # -- reading ------------------------------------------------------------------------------------------------------

    def cosines(self) -> list[dict[str, CosineStat]]:
        """Per layer: the cosine statistics of each of its sublayers ("attention", "mlp", ...) and of "block"."""
        found = []
        for layer in range(self.layer_count):
            with self._open(layer) as file:
                found.append(layer_file.cosines_in(file.header, self._members(layer)))
        return found

    def shares(self) -> dict[str, float]:
        """Of stacked experts' matrices the share of the router's weight, of listed ones' linears that of the tokens."""
        found = {}
        for layer in sorted({spec.layer for spec in self.linears if isinstance(spec, ExpertSpec | ListedSpec)}):
            with self._open(layer) as file:
                found |= layer_file.shares_in(file.header, self._members(layer))
        return found

    def energies(self) -> dict[str, torch.Tensor]:
        """Energy spectrum `[K]` (float64, descending) of every linear, in the order of `linears`."""
        return self._vectors("energy")

    @property
    def has_gradients(self) -> bool:
        """Whether a backward pass was part of the analysis."""
        return bool(self.identity.calibration.gradient_windows)

    def curvatures(self) -> dict[str, torch.Tensor]:
        """`Factors.curvature` `[R]` of every linear. Raises StoreError in a store without gradients."""
        return self._vectors("curvature")

    def slopes(self) -> dict[str, torch.Tensor]:
        """`Factors.slope` `[R]` of every linear. Raises StoreError in a store without gradients."""
        return self._vectors("slope")

    def damping(self) -> dict[str, float]:
        """`Factors.damping` of every linear."""
        found = {}
        for layer in range(self.layer_count):
            with self._open(layer) as file:
                found |= layer_file.damping_in(file.header)
        return found

    def gradients(self, layer: int, device: torch.device | str = "cpu") -> dict[str, Gradient]:
        """The gradients of one layer, float64, on `device`. Raises StoreError in a store without gradients."""
        self.require_gradients()
        file = self._file("gradient", layer)
        tensors = _load(file)
        found = {}
        for spec in self._members(layer):
            names = [f"{spec.name}.{key}" for key in ("g", "rows", "weight")]
            if missing := [name for name in names if name not in tensors]:
                raise _damaged(file, Damaged(f"it has no {missing[0]}"))
            found[spec.name] = Gradient(*(tensors[name].to(device).double() for name in names))
        return found

    def input_mean(self, spec: LinearSpec) -> torch.Tensor | None:
        """`Factors.mean` `[N]`, or None where the scheme gives no bias."""
        with self._open(spec.layer) as file:
            return file.get(f"{spec.name}.mean")

    def _vectors(self, key: str) -> dict[str, torch.Tensor]:
        if key in ("curvature", "slope"):
            self.require_gradients()
        vectors = {}
        for layer in range(self.layer_count):
            with self._open(layer) as file:
                for spec in self._members(layer):
                    vectors[spec.name] = file[f"{spec.name}.{key}"]
        return vectors

    def _members(self, layer: int) -> list[LinearSpec]:
        return [spec for spec in self.linears if spec.layer == layer]

    def require_gradients(self) -> None:
        """Raise StoreError unless a backward pass was part of the analysis."""
        if not self.has_gradients:
            raise StoreError(
                f"The store {self.path} was analyzed without gradients; make one that has them with: "
                "unirank analyze MODEL -o STORE --gradients N."
            )

    def factors(self, spec: LinearSpec, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`left [M, R]` and `right [R, N]` of the first `rank` components. Raises StoreError beyond what is stored."""
        with self._open(spec.layer) as file:
            left, right = file[f"{spec.name}.left"], file[f"{spec.name}.right"]
        if rank > left.shape[1]:
            raise StoreError(
                f"{self.layer_file(spec.layer)} holds {left.shape[1]} components of {spec.name}, "
                f"the plan asks for {rank}."
            )
        return left[:, :rank].contiguous(), right[:rank].contiguous()

    @contextmanager
    def _open(self, layer: int) -> Iterator[TensorFile]:
        """The file of a layer; what is wrong with it raises StoreError."""
        file = self.layer_file(layer)
        try:
            with open_tensors(file) as tensors:
                yield tensors
        except Damaged as error:
            raise _damaged(file, error) from error


def create_or_resume(
    path: Path,
    identity: Identity,
    linears: tuple[LinearSpec, ...],
    *,
    overwrite: bool = False,
    weights: Weights | None = None,
) -> AnalysisStore:
    """Open the store at `path` for writing: a new one, or the unfinished or finished one of the same identity.

    Args:
        weights: the hash of the model's weights of the kind of a recorded one, for stores that an older version began;
            None knows the one in `identity` alone.

    Raises:
        InputError: the directory exists and is not a store.
        StoreError: it is a store of something else; says what differs.
    """
    if path.is_dir() and all(re.fullmatch(_LEFTOVER, file.name) for file in path.iterdir()):
        delete_matching(path, _LEFTOVER)  # of a run that was killed while it wrote the manifest
    check_output(path, marker=MANIFEST, overwrite=True)
    store = AnalysisStore(path, identity, linears)
    if (path / MANIFEST).is_file():
        try:
            found = open_store(path)
        except StoreError:
            if not overwrite:
                raise
        else:
            differs = identity_differences(found.identity, identity, weights)
            if not differs and found.linears == linears:
                found.remove_leftovers()
                return found
            if not overwrite:
                raise StoreError(
                    f"The store {path} belongs to another analysis; it differs in "
                    f"{'; '.join(differs) or 'its linears'}. "
                    "Choose another directory, or pass --overwrite to replace it."
                )
        # The old manifest goes last, when the new one takes its place: without one this would be no store of ours.
        delete_matching(path, rf"{_LEFTOVER}|{_TENSORS}|{_MEASURED}")
    make_directory(path)
    write_manifest(path, identity, linears)
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
        return AnalysisStore(path, *read_manifest(path))
    except Damaged as error:
        raise _damaged(file, error, "replace the store with: unirank analyze --overwrite") from error


def _load(file: Path) -> dict[str, torch.Tensor]:
    try:
        return read_tensors(file)
    except Damaged as error:
        raise _damaged(file, error) from error


def _damaged(
    file: Path, error: Exception, remedy: str = "delete it and run the same analyze command again"
) -> StoreError:
    return StoreError(f"{file} is missing or damaged ({error}); {remedy}.")
