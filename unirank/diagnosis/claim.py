"""Does a high cosine between a sublayer's input and output go with a low effective rank? In numbers, for every reading.

UniRank (arXiv 2606.21847) rests on that claim without saying whose effective rank is meant. Here it is measured for
(a) the weights, (b) the spectra of the store's scheme, (c) the sublayer's outputs and (d) the stream that leaves the
sublayer, and correlated with the store's cosines. docs/method.md has the geometry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean, median
from typing import Any

import torch

from unirank import looks
from unirank.analysis.redraw import check_model, redrawn_windows
from unirank.analysis.store import AnalysisStore
from unirank.diagnosis.correlation import LEAST, LEVEL, Correlation, spearman
from unirank.diagnosis.spectra import SECOND_MOMENT, Geometry, Group, stream_spectra, weight_energies
from unirank.display import shows_progress, told
from unirank.errors import InputError, NonFiniteError
from unirank.progress import Progress
from unirank.types import BLOCK, LinearSpec, LoadedModel, Sublayer, effective_rank

_WINDOWS = 8
GROUPS: dict[Group, str] = {
    "weights": "(a) weights",
    "scheme": "(b) spectra of the scheme",
    "outputs": "(c) sublayer outputs f(x)",
    "stream": "(d) stream leaving the sublayer",
}


@dataclass(frozen=True)
class Point:
    """One sublayer in a reading: its mean cosine, and effective ranks from `sigma²` and from `sigma`.

    The effective ranks are counts of dimensions, except in readings named "of K", where they are fractions of `K`.
    """

    layer: int
    sublayer: Sublayer
    cosine: float
    energy: float
    sigma: float


@dataclass(frozen=True)
class Reading:
    """One meaning of "effective rank", over the sublayers where it exists.

    A reading over both kinds of sublayer is `mixed`: attention differs from MLP in cosine and in rank, and that alone
    correlates them, whatever happens from layer to layer.
    """

    group: Group
    name: str
    points: tuple[Point, ...]
    energy: Correlation  # with the effective rank of p = sigma² / Σ sigma² (method 2)
    sigma: Correlation  # with that of p = sigma / Σ sigma (Roy and Vetterli 2007)
    of_k: bool = False  # whether ranks are fractions of K, so that matrices of several shapes can be averaged

    @property
    def mixed(self) -> bool:
        return len({point.sublayer for point in self.points}) > 1


@dataclass(frozen=True)
class Missing:
    """A reading that could not be made from what was given, and why."""

    group: Group
    reason: str


@dataclass(frozen=True)
class KindSpectra:
    """The store's spectra of one kind of projection: effective ranks (of `sigma²`) and shares, over the layers."""

    kind: str
    k: int
    least: float
    median: float
    most: float
    first_share: float  # median of sigma_1² / Σ sigma²
    rank_99: int  # median rank that holds 99 % of the energy


@dataclass(frozen=True)
class Damping:
    """How many matrices the scheme damped, and the largest damping, relative to the mean diagonal."""

    damped: int
    matrices: int
    largest: float
    largest_of: str | None


@dataclass(frozen=True)
class Diagnosis:
    """Everything `diagnose` found; `about` says from which store, model, windows, permutations and seed."""

    readings: tuple[Reading, ...]
    missing: tuple[Missing, ...]
    spectra: tuple[KindSpectra, ...]
    damping: Damping
    geometry: tuple[Geometry, ...]
    about: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        firm = [f"{reading.name}: {reading.energy.verdict}" for reading in self.readings if not reading.mixed]
        return looks.lines(
            f"Diagnosis: {len(self.readings)} readings of the claim, {len(self.missing)} missing",
            *firm[:4],
            f"{self.damping.damped} of {self.damping.matrices} matrices damped",
            "next: .summary(), .readings, .as_dict()",
        )

    def summary(self) -> str:
        """The claim in two sentences: over one kind of sublayer, and over both."""
        inside = [reading.energy for reading in self.readings if not reading.mixed]
        mixed = [reading.energy for reading in self.readings if reading.mixed]
        return (
            f"High cosine, low effective rank: {_count(inside)} over one kind of sublayer (chance alone would give "
            f"{LEVEL * len(inside) / 2:.1f} of either). {_count(mixed).capitalize()} over attention and MLP together, "
            "which also see how these two differ."
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, with the verdicts."""
        rows = [asdict(r) | {"n": len(r.points), "mixed": r.mixed, "verdict": r.energy.verdict} for r in self.readings]
        return asdict(self) | {"readings": rows, "summary": self.summary(), "about": dict(self.about)}


def _count(correlations: Sequence[Correlation]) -> str:
    confirm = sum(c.significant and c.rho < 0 for c in correlations)
    deny = sum(c.significant and c.rho > 0 for c in correlations)
    rest = len(correlations) - confirm - deny
    return f"of {len(correlations)} readings {confirm} confirm it, {deny} deny it and {rest} show no relation"


@shows_progress
def diagnose(
    store: AnalysisStore,
    loaded: LoadedModel | None = None,
    *,
    text: str | None = None,
    windows: int | None = None,
    permutations: int = 10_000,
    seed: int = 0,
    progress: Progress = None,
) -> Diagnosis:
    """Correlate every reading of effective rank that can be made with the store's cosines; list those that cannot.

    Args:
        store: a finished store. Its energies give reading (b) (whitened spectra for the scheme `whiten`), and (a) for
            the scheme `svd`.
        loaded: the model that was analysed, for (a), (c) and (d). None: these are listed as missing.
        text: the calibration text, for (c) and (d), as `Calibration.text` named it; None takes a builtin or named one
            from the store, and lists (c) and (d) as missing, with the reason, where that does not give the store's
            windows.
        windows: how many of the store's calibration windows run for (c) and (d); None takes 8, or all of fewer.
            Their ranks are biased low unless these hold many more tokens than the stream is wide.
        permutations: of the permutation tests, see `spearman`.
        seed: of the same.

    Raises:
        StoreError: the store is unfinished or damaged.
        InputError: the model or the text is not the one of the store; `windows` or `permutations` is not legal.
        NonFiniteError: a spectrum is NaN or infinite; names the linear or the sublayer.
    """
    store.require_complete()
    calibration = store.identity.calibration
    windows = min(_WINDOWS, calibration.windows) if windows is None else windows
    if not 1 <= windows <= calibration.windows:
        raise InputError(f"windows = {windows} is not legal; the store was made from {calibration.windows}.")
    if permutations < 1:
        raise InputError(f"permutations = {permutations} is not legal; at least 1 is needed.")
    if text is not None and loaded is None:
        raise InputError("text= is of use only together with the model that was analyzed.")
    if loaded is not None:
        loaded.require_whole("A diagnosis of weights and streams")
        check_model(loaded, store)
    token_windows, no_windows = (None, _NO_MODEL) if loaded is None else _windows(store, loaded, text)

    cosines: dict[tuple[int, Sublayer], float] = {
        (i, key): stat.mean for i, stats in enumerate(store.cosines()) for key, stat in stats.items() if key != BLOCK
    }
    table = _Readings(cosines, permutations, seed)
    energies = store.energies()
    scheme = store.identity.scheme
    last = _last_linears(store)
    about: dict[str, Any] = {
        "store": str(store.path),
        "analysis": store.digest,
        "scheme": scheme,
        "model": None if loaded is None else loaded.source,
        "permutations": permutations,
        "seed": seed,
    }

    if scheme == "svd":
        table.add_linears("weights", store.linears, energies, last)
    elif loaded is not None:
        table.add_linears("weights", store.linears, weight_energies(loaded, told(progress)), last)
    else:
        table.miss("weights", _NO_MODEL)
    if scheme == "svd":
        table.miss("scheme", "the scheme svd has no spectra but the weights' own; analyze with the scheme whiten")
    else:
        table.add_linears("scheme", store.linears, energies, last)
        if scheme != "whiten":
            table.miss("scheme", f"whitened spectra: the scheme is {scheme}; analyze with the scheme whiten")
    geometry: list[Geometry] = []
    if loaded is None or token_windows is None:
        for group in ("outputs", "stream"):
            table.miss(group, no_windows)
    else:
        chosen = token_windows[:windows]
        spectra: dict[tuple[Group, str], dict[tuple[int, Sublayer], torch.Tensor]] = {}
        for layer, found in stream_spectra(loaded, chosen, calibration.batch, told(progress)):
            for sublayer, seen in found.items():
                geometry.append(seen.geometry)
                for key, spectrum in seen.spectra.items():
                    spectra.setdefault(key, {})[layer, sublayer] = spectrum
        for (group, name), members in spectra.items():
            table.add_sublayers(group, name, members)
        width = len(next(iter(spectra["stream", SECOND_MOMENT].values())))
        about |= {"windows": windows, "tokens": chosen.numel(), "width": width}
    return Diagnosis(
        tuple(table.readings),
        tuple(table.missing),
        _spectra(store.linears, energies),
        _damping(store),
        tuple(geometry),
        about,
    )


_NO_MODEL = "needs the model that was analyzed"


def _windows(store: AnalysisStore, loaded: LoadedModel, text: str | None) -> tuple[torch.Tensor | None, str]:
    """The store's calibration windows, int64 `[W, T]`; or None and why the recorded text does not give them here."""
    try:
        return redrawn_windows(loaded, store, text=text), ""
    except InputError as error:
        if text is not None:
            raise
        return None, str(error).removesuffix(".")


def _last_linears(store: AnalysisStore) -> set[str]:
    """The output projection of every sublayer: the last of its linears, in module order (**choice**)."""
    return {spec.name for spec in {(spec.layer, spec.sublayer): spec for spec in store.linears}.values()}


class _Readings:
    """Collects readings; one that cannot be correlated goes to the missing ones, with the reason."""

    def __init__(self, cosines: Mapping[tuple[int, Sublayer], float], permutations: int, seed: int) -> None:
        self.readings: list[Reading] = []
        self.missing: list[Missing] = []
        self._cosines, self._permutations, self._seed = cosines, permutations, seed

    def miss(self, group: Group, reason: str) -> None:
        self.missing.append(Missing(group, reason))

    def add_linears(
        self, group: Group, linears: Sequence[LinearSpec], energies: Mapping[str, torch.Tensor], last: set[str]
    ) -> None:
        """A reading for each kind of projection, for the output projections, and for the mean over a sublayer."""
        points = {spec: self._point(spec.name, spec.layer, spec.sublayer, energies[spec.name]) for spec in linears}
        for kind in dict.fromkeys(spec.kind for spec in linears):
            self._add(group, kind, [point for spec, point in points.items() if spec.kind == kind])
        self._add(group, "output projections", [point for spec, point in points.items() if spec.name in last])
        shares: dict[tuple[int, Sublayer], list[Point]] = {}
        for spec, point in points.items():
            share = replace(point, energy=point.energy / spec.k, sigma=point.sigma / spec.k)
            shares.setdefault((spec.layer, spec.sublayer), []).append(share)
        means = [
            replace(members[0], energy=fmean(p.energy for p in members), sigma=fmean(p.sigma for p in members))
            for members in shares.values()
        ]
        self._add_by_sublayer(group, "mean over the sublayer, of K", means, of_k=True)

    def add_sublayers(self, group: Group, name: str, spectra: Mapping[tuple[int, Sublayer], torch.Tensor]) -> None:
        """All sublayers together, and each kind of sublayer by itself."""
        points = [self._point(f"the {s} of layer {i}", i, s, energy) for (i, s), energy in spectra.items()]
        self._add_by_sublayer(group, name, points)

    def _add_by_sublayer(self, group: Group, name: str, points: Sequence[Point], *, of_k: bool = False) -> None:
        self._add(group, f"{name}, all", points, of_k=of_k)
        for sublayer in dict.fromkeys(sublayer for _, sublayer in self._cosines):
            members = [point for point in points if point.sublayer == sublayer]
            self._add(group, f"{name}, {sublayer}", members, of_k=of_k)

    def _point(self, name: str, layer: int, sublayer: Sublayer, energy: torch.Tensor) -> Point:
        if not energy.isfinite().all():
            raise NonFiniteError(f"The spectrum of {name} is NaN or infinite.")
        cosine = self._cosines[layer, sublayer]
        return Point(layer, sublayer, cosine, effective_rank(energy), effective_rank(energy.sqrt()))

    def _add(self, group: Group, name: str, points: Sequence[Point], *, of_k: bool = False) -> None:
        cosines = [p.cosine for p in points]
        columns = [[p.energy for p in points], [p.sigma for p in points]]
        if len(points) < LEAST:
            self.miss(group, f"{name}: {len(points)} sublayers are too few for a correlation, {LEAST} are needed")
        elif any(len(set(column)) == 1 for column in (cosines, *columns)):
            self.miss(group, f"{name}: all cosines or all effective ranks are equal")
        else:
            energy, sigma = (
                spearman(cosines, column, permutations=self._permutations, seed=self._seed) for column in columns
            )
            self.readings.append(Reading(group, name, tuple(points), energy, sigma, of_k))


def _spectra(linears: Sequence[LinearSpec], energies: Mapping[str, torch.Tensor]) -> tuple[KindSpectra, ...]:
    rows = []
    for kind in dict.fromkeys(spec.kind for spec in linears):
        members = [spec for spec in linears if spec.kind == kind]
        ranks, firsts, holds = [], [], []
        for spec in members:
            energy = energies[spec.name]
            total = float(energy.sum())
            ranks.append(effective_rank(energy))
            firsts.append(float(energy[0]) / total if total > 0 else 0.0)
            holds.append(1 + int((energy.cumsum(0) < 0.99 * total).sum()) if total > 0 else 0)
        row = (min(ranks), median(ranks), max(ranks), median(firsts), int(median(holds)))
        rows.append(KindSpectra(kind, members[0].k, *row))
    return tuple(rows)


def _damping(store: AnalysisStore) -> Damping:
    damping = store.damping()
    worst = max(damping, key=lambda name: damping[name])
    damped = sum(eps > 0 for eps in damping.values())
    return Damping(damped, len(damping), damping[worst], worst if damped else None)
