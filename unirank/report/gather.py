"""Everything that the report shows, read from a checkpoint, its analysis store and a grid; no model runs here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from unirank.analysis.deficient import Deficient, deficient
from unirank.analysis.scheme import schemes
from unirank.analysis.store import AnalysisStore
from unirank.compression.checkpoint import Record, read_record
from unirank.disk.files import bytes_on_disk
from unirank.disk.strictjson import Damaged, entry, number, read_object
from unirank.errors import InputError
from unirank.evaluation.measured_curve import Curve
from unirank.models.folder import CONFIG
from unirank.rank_plan import RankPlan
from unirank.types import DENSE, effective_rank, stack_of

_LAYER = re.compile(r"^(?P<path>.*?)\.(?P<layer>\d+)\.(?P<kind>.+)$")
POINTS = 60  # a spectrum is drawn through so many of its components


@dataclass(frozen=True)
class Linear:
    """One target and what became of it."""

    name: str
    layer: int
    kind: str
    m: int
    n: int
    rank: int | str
    kept: float  # fraction of its parameters
    sublayer: str = ""  # needs the store, as what follows
    energy_kept: float | None = None
    effective_rank: float | None = None


@dataclass(frozen=True)
class Spectrum:
    """Share of the energy beyond rank r, of the middle layer of a kind, and of the layers that lose least and most."""

    kind: str
    curves: Mapping[str, list[tuple[float, float]]]  # label -> (r / K, share beyond)


@dataclass(frozen=True)
class ReportData:
    """What a page shows.

    Attributes:
        cosines: layer -> "attention", "mlp", "block" -> mean; empty without a store.
        samples: prompts, and how the dense and the compressed model go on, of `unirank report --against`.
        dtype: of the checkpoint's weights; "" where nothing says it.
        bytes_before, bytes_after: of the dense weights in that dtype, and of the checkpoint's files of weights; None is
            not known.
        curve: perplexities of the same model at other fractions.
        damping: of every linear, see `Factors.damping`; empty without a store.
        deficient: linears whose calibration tokens show too few directions; empty without a store.
    """

    name: str
    record: Record
    linears: tuple[Linear, ...]
    cosines: tuple[Mapping[str, float], ...]
    spectra: tuple[Spectrum, ...]
    grid: tuple[Mapping[str, Any], ...]
    samples: tuple[tuple[str, str, str], ...]
    dtype: str = ""
    bytes_before: int | None = None
    bytes_after: int | None = None
    curve: Curve | None = None
    damping: Mapping[str, float] = field(default_factory=dict)
    deficient: tuple[Deficient, ...] = ()

    @property
    def plan(self) -> RankPlan:
        return self.record.plan


def gather(
    checkpoint: Path,
    store: AnalysisStore | None,
    grid: Path | None,
    samples: tuple[tuple[str, str, str], ...] = (),
    *,
    curve: Path | None = None,
    trust_remote_code: bool = False,
) -> ReportData:
    """Read what the report needs; `trust_remote_code` as in `open_compressed`.

    Raises InputError when the checkpoint, store, grid or curve is not what it should be, the store is of another
    analysis, or the curve of another model.
    """
    record = read_record(checkpoint, trust_remote_code=trust_remote_code)
    if store is not None and record.identity is None:
        raise InputError(f"{checkpoint} does not say which analysis it was made from; leave the store out.")
    if store is not None and store.digest != record.plan.analysis:
        raise InputError(f"The store {store.path} is not the one that {checkpoint} was made from; leave it out.")
    energies = store.energies() if store is not None else {}
    sublayers = {spec.name: spec.sublayer for spec in store.linears} if store is not None else {}
    linears = []
    for name, rank in record.plan.ranks.items():
        found = _LAYER.match(stack_of(name) or name)
        if found is None:
            raise InputError(f"The plan names {name!r}, which is no linear of a decoder layer.")
        m, n = record.plan.shapes[name]
        energy, share, effective = energies.get(name), None, None
        if energy is not None:
            share = 1.0 if rank == DENSE else float(energy[: int(rank)].sum() / energy.sum())
            effective = effective_rank(energy)
        linears.append(
            Linear(
                name,
                int(found["layer"]),
                found["kind"],
                m,
                n,
                rank,
                record.plan.rank_cost(name) / (m * n),
                sublayers.get(name, ""),
                share,
                effective,
            )
        )
    cosines = () if store is None else tuple({k: s.mean for k, s in layer.items()} for layer in store.cosines())
    spectra = tuple(_spectra(linears, energies)) if energies else ()
    dtype = _dtype(checkpoint, record)
    return ReportData(
        checkpoint.name or checkpoint.resolve().name,
        record,
        tuple(linears),
        cosines,
        spectra,
        _rows(grid),
        samples,
        dtype=dtype,
        bytes_before=record.report.model_before * getattr(torch, dtype).itemsize if dtype else None,
        bytes_after=bytes_on_disk(checkpoint) or None,
        curve=_curve(curve, checkpoint, record),
        damping={} if store is None else store.damping(),
        # A store of a scheme that this version does not have is shown all the same.
        deficient=deficient(store) if store is not None and store.identity.scheme in schemes() else (),
    )


def _dtype(checkpoint: Path, record: Record) -> str:
    """That of the weights by config.json, or of the analysis; "" where neither names one."""
    config: Mapping[str, Any] = {}
    if (checkpoint / CONFIG).is_file():
        try:
            config = read_object(checkpoint / CONFIG)
        except Damaged as error:
            raise InputError(f"{checkpoint / CONFIG} is damaged: {error}.") from error
    told = (config.get("dtype"), config.get("torch_dtype"), record.identity and record.identity.model.dtype)
    return next((n for n in told if isinstance(n, str) and isinstance(getattr(torch, n, None), torch.dtype)), "")


def _curve(file: Path | None, checkpoint: Path, record: Record) -> Curve | None:
    if file is None:
        return None
    try:
        curve = Curve.from_json(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The curve {file} cannot be read: {error}.") from error
    before = record.report.model_before
    if curve.dense.parameters != before:
        raise InputError(
            f"The curve {file} is of a model of {curve.dense.parameters:,} parameters; {checkpoint} was made from one "
            f"of {before:,}; leave the curve out."
        )
    return curve


def _spectra(linears: list[Linear], energies: Mapping[str, Any]) -> list[Spectrum]:
    found = []
    for kind in dict.fromkeys(linear.kind for linear in linears):
        members = sorted((x for x in linears if x.kind == kind), key=lambda x: x.effective_rank or 0.0)
        chosen = {"least effective rank": members[0], "median": members[len(members) // 2]}
        chosen["largest effective rank"] = members[-1]
        curves = {}
        for label, linear in chosen.items():
            energy = energies[linear.name]
            total = float(energy.sum())
            steps = sorted({round(i * len(energy) / POINTS) for i in range(POINTS + 1)})
            beyond = energy.flip(0).cumsum(0).flip(0)
            shares = [float(beyond[r]) / total if r < len(energy) and total else 0.0 for r in steps]
            points = [(r / len(energy), share) for r, share in zip(steps, shares, strict=True)]
            curves[f"{label} (layer {linear.layer})"] = points
        found.append(Spectrum(kind, curves))
    return found


def _rows(grid: Path | None) -> tuple[Mapping[str, Any], ...]:
    if grid is None:
        return ()
    try:
        return tuple(_row(row) for row in entry(read_object(grid), "rows", list))
    except Damaged as error:
        raise InputError(f"{grid} is no result of bench_quality.py or `unirank demo`: {error}.") from error


def _row(row: Any) -> dict[str, Any]:
    allocator = entry(row, "allocator", str)
    return {
        "label": entry(row, "preset", str) if row.get("preset") else f"{entry(row, 'scheme', str)} + {allocator}",
        "remove": number(row.get("remove"), "remove"),
        "text": entry(row, "text", str),
        "perplexity": number(row.get("perplexity"), "perplexity"),
        "dense": allocator == "dense",
    }
