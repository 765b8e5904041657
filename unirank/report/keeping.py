"""What `unirank eval` measured goes where it is looked for: into the checkpoint's record, and onto its page."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unirank.analysis.store import open_store
from unirank.compression.card import PLAN_FILE
from unirank.compression.checkpoint import add_evaluation, check_weights, read_record
from unirank.disk.strictjson import Damaged, read_object
from unirank.errors import InputError, StoreError, WriteError
from unirank.evaluation.side_by_side import Measured
from unirank.models.folder import CONFIG
from unirank.models.quantizer import METHOD
from unirank.report.page import page_inputs
from unirank.report.write import usual_curve, usual_page, usual_store, write_report


@dataclass(frozen=True)
class Kept:
    """What became of the figures.

    Attributes:
        recorded: whether they are in the checkpoint's record.
        page: the page that was written again; None where there is none, or it stays as it is.
        notes: whole sentences on what was left undone, and why.
    """

    recorded: bool = False
    page: Path | None = None
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        page = None if self.page is None else str(self.page)
        return {"recorded": self.recorded, "page": page, "notes": list(self.notes)}

    def lines(self, checkpoint: str) -> list[str]:
        """For people."""
        said = [f"Recorded in {checkpoint}."] if self.recorded else []
        return [*said, *([f"Report: {self.page}"] if self.page is not None else []), *self.notes]


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a directory with a compressed checkpoint, as far as its small files say."""
    if (path / PLAN_FILE).is_file():
        return True
    try:
        told = read_object(path / CONFIG).get("quantization_config")
    except Damaged:
        return False
    return isinstance(told, dict) and told.get("quant_method") == METHOD


def keep_evaluation(
    checkpoint: Path, measured: Measured, *, card: bool = False, trust_remote_code: bool = False
) -> Kept:
    """Record what was measured of a checkpoint, and refresh the page beside it (OUT.html) where unirank wrote one.

    The weights' files are read, for their hashes, and not written. What cannot be recorded is a note, never an error:
    the figures were shown. Nothing is done where `checkpoint` is no compressed checkpoint on this disk.

    Args:
        measured: of the checkpoint; of two models it is the second. The first counts as the dense model where it has
            as many parameters as that had; else only what is of the checkpoint is recorded.
        card: write the model card again too; then what cannot be written is an error.
        trust_remote_code: as in `open_compressed`.

    With `card`, raises what `add_evaluation` raises.
    """
    if not is_checkpoint(checkpoint):
        return Kept()
    notes: list[str] = []
    try:
        record = read_record(checkpoint, trust_remote_code=trust_remote_code)
        check_weights(checkpoint, record)
        dense, speed, sample = None, None, None
        if len(measured.reports) == 2:
            other, before = measured.reports[0], record.report.model_before
            if other.parameters == before:
                dense, speed, sample = other, measured.speed_pair, measured.sample
            else:
                notes.append(
                    f"Of the two, only the perplexity of {checkpoint} is recorded: the other model has "
                    f"{other.parameters:,} parameters, and the dense one had {before:,}."
                )
        kept: dict[str, Any] = {"dense": dense, "speed": speed, "sample": sample, "card": card}
        add_evaluation(checkpoint, measured.reports[-1], **kept, trust_remote_code=trust_remote_code)
    except (InputError, WriteError) as error:
        if card:
            raise
        return Kept(notes=(f"Not recorded in {checkpoint}: {error}",))
    refreshed = refresh_page(checkpoint, trust_remote_code=trust_remote_code)
    return replace(refreshed, recorded=True, notes=(*notes, *refreshed.notes))


def write_usual_page(checkpoint: Path, store: Path) -> Kept:
    """Write OUT.html about the checkpoint that was just made from `store`, with a curve that lies beside it.

    A page that unirank wrote before is replaced. What goes wrong is a note: the checkpoint is there.
    """
    place = usual_page(checkpoint)
    try:
        write_report(checkpoint, place, store=open_store(store), curve=usual_curve(checkpoint), overwrite=True)
    except (InputError, StoreError, WriteError) as error:
        return Kept(notes=(f"The page {place} was not written: {error}",))
    return Kept(page=place)


def refresh_page(checkpoint: Path, *, trust_remote_code: bool = False) -> Kept:
    """Write OUT.html again from the same files, unless something on it would be lost; notes say why not."""
    place = usual_page(checkpoint)
    if not place.is_file():
        return Kept()
    again = f"write it again with: unirank report {checkpoint}"
    try:
        inputs = page_inputs(place)
        if inputs is None:
            return Kept(notes=(f"{place} stays as it is: unirank did not write it.",))
        if inputs.get("side_by_side"):
            return Kept(
                notes=(f"{place} has texts side by side and stays as it is; {again} --against MODEL --overwrite.",)
            )
        found: dict[str, Path] = {}
        for kind in ("store", "grid", "curve"):
            if not isinstance(name := inputs.get(kind), str):
                continue
            found[kind] = place.parent / name
            if not found[kind].exists():
                return Kept(notes=(f"{place} stays as it is: its {kind} {found[kind]} is gone; {again} --overwrite.",))
        store = found.get("store") or usual_store(checkpoint)
        write_report(
            checkpoint,
            place,
            store=None if store is None else open_store(store),
            grid=found.get("grid"),
            curve=found.get("curve") or usual_curve(checkpoint),
            trust_remote_code=trust_remote_code,
            overwrite=True,
        )
    except (InputError, StoreError, WriteError) as error:
        return Kept(notes=(f"{place} stays as it is: {error}",))
    return Kept(page=place)
