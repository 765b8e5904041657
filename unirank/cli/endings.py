"""How a command ends: the numbers that matter, and one line with the next command, which works as printed."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.text import Text

from unirank.errors import InputError
from unirank.types import stack_of

if TYPE_CHECKING:
    from unirank.compression.checkpoint import CompressedModel, Record

# A perplexity that is higher than this times the first one is worth training (**choice**).
_WORTH_TRAINING = 1.05
# Options of `plan` that say where things are, and not what is planned.
_PLACES = ("store", "out", "against", "as_json", "remove", "ranks")


def next_line(*command: object) -> Text:
    """ "Next: unirank ..."; one line, however long, so that it can be copied."""
    told = shlex.join(str(part) for part in command)
    return Text(f"Next: unirank {told}", no_wrap=True, overflow="ignore")


def beside_name(path: str | Path, end: str) -> str:
    """A name for what is made of `path`: `OUT-int8`; of a model that is no directory the last part, here."""
    known = Path(path)
    return f"{known if known.is_dir() else known.name}{end}"


def megabytes(size: float) -> str:
    """Bytes as MB of a million bytes, for people."""
    return f"{size / 1e6:,.1f} MB"


def saved_sizes(compressed: CompressedModel, out: Path) -> dict[str, Any]:
    """MB (a million bytes) of the weights: `mb_after` on the disk, `mb_before` of the dense ones in that dtype."""
    from unirank.disk.files import bytes_on_disk

    before = compressed.report.model_before * compressed.model.dtype.itemsize
    return {"mb_before": before / 1e6, "mb_after": bytes_on_disk(out) / 1e6}


def grown_sizes(compressed: Path, out: Path) -> dict[str, Any]:
    """The same of what was made plain again: `mb_before` is the compressed checkpoint."""
    from unirank.disk.files import bytes_on_disk

    return {"mb_before": bytes_on_disk(compressed) / 1e6, "mb_after": bytes_on_disk(out) / 1e6}


def sizes_line(sizes: Mapping[str, Any], removed: float | None = None, was: str = "dense") -> str:
    """ "Removed 20.00 % of the decoder's linears. On disk: 269.1 MB dense, 226.6 MB now, 15.8 % less."."""
    before, after = sizes["mb_before"], sizes["mb_after"]
    change = f", {abs(1 - after / before):.1%} {'less' if after <= before else 'more'}" if before else ""
    told = f"On disk: {before:,.1f} MB {was}, {after:,.1f} MB now{change}."
    return told if removed is None else f"Removed {removed:.2%} of the decoder's linears. {told}"


def with_ratio_and_size(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Records of `eval` with `ratio`, perplexity over that of the first, and `mb` of the weights.

    On the disk where the model is a directory with safetensors, else parameters in the dtype in which they ran.
    """
    import torch

    from unirank.disk.files import bytes_on_disk

    found = []
    for record in records:
        size = bytes_on_disk(Path(record["model"])) if Path(record["model"]).is_dir() else 0
        size = size or record["parameters"] * getattr(torch, record["dtype"]).itemsize
        found.append({**record, "ratio": record["perplexity"] / records[0]["perplexity"], "mb": size / 1e6})
    return found


def after_compress(out: Path, model: str, text: str | None = None, limit: int | None = None) -> Text:
    """
    Args:
        text: what a target was measured on, and its first `limit` windows.
    """
    more = [*(["--text", text] if text else []), *(["--limit", limit] if text and limit else [])]
    return next_line("eval", out, "--against", model, *more)


def after_analyze(out: Path, model: str, preset: str | None, calib: str | None) -> Text:
    """Ranks of the preset; where its allocator runs the dense model, that and its text are named."""
    from unirank.recipes import preset as preset_of

    command: list[object] = ["plan", out, "--remove", 0.2]
    if preset is not None:
        command += ["--preset", preset]
        if preset_of(preset).measures:
            command += ["--against", model, *(["--calib", calib] if calib else [])]
    return next_line(*command)


def after_plan(ctx: typer.Context, store: Path, file: Path | None) -> Text:
    """The checkpoint of these ranks, with all that the whole recipe of a preset does behind them.

    The model is what --against named; a store does not say what it was made from, and MODEL stands for it.
    """
    given = ctx.params
    command: list[object] = ["compress", given["against"] or "MODEL", "-o", f"{store.name}-compressed"]
    command += ["--store", store]
    if given["ranks"] is not None or (file is not None and given["preset"] is None):
        command += ["--ranks", given["ranks"] if file is None else file]
        shaping = ["calib", "device", "trust_remote_code"]
    else:
        command += ["--remove", f"{given['remove']:g}"]
        shaping = [name for name in given if name not in _PLACES]
    for parameter in ctx.command.params:
        source = ctx.get_parameter_source(parameter.name or "")
        if parameter.name in shaping and source is not None and source.name == "COMMANDLINE":
            value = given[parameter.name]
            for one in value if isinstance(value, list | tuple) else [value]:
                command += [parameter.opts[0]] if one is True else [parameter.opts[0], one]
    return next_line(*command)


def after_training(out: Path, source: str, model: str) -> Text:
    """Behind `heal` and `finetune`: against the dense model where it is to be found, else what it was before."""
    return next_line("eval", out, "--against", source if _is_there(source) else model)


def after_tasks(model: str, against: str | None) -> Text:
    """Perplexity, which tasks do not tell."""
    return next_line("eval", model, *(["--against", against] if against else []))


def after_looking(model: str, against: str | None, ratio: float | None) -> Text:
    """Of a model that was looked at: compress it, compare it, train it where that is worth it, quantise it, show it.

    Args:
        ratio: perplexity over that of `against`, where both were measured.
    """
    record = _record_of(Path(model))
    if record is None:
        return next_line("compress", model, "--remove", 0.2, "-o", beside_name(model, "-compressed"))
    dense = against or (record.source if _is_there(record.source) else None)
    beside = [] if dense is None else ["--against", dense]
    if ratio is None and not record.evaluations and dense is not None:
        return next_line("eval", model, *beside)
    if record.quantized is None and not any(map(stack_of, record.plan.ranks)):  # neither is for experts
        if ratio is not None and ratio > _WORTH_TRAINING and record.training is None and dense is not None:
            known = None if record.identity is None else record.identity.calibration.text
            text = ["--calib", known] if known and known != "builtin" else []  # of a file only its name is known
            return next_line("heal", model, "-o", beside_name(model, "-healed"), *beside, *text)
        if find_spec("torchao") is not None:
            return next_line("quantize", model, "-o", beside_name(model, "-int8"))
    return next_line("report", model, *beside, "--overwrite")


def _record_of(path: Path) -> Record | None:
    """What a checkpoint says of itself; None of what is none, or cannot be read."""
    from unirank.compression.card import PLAN_FILE
    from unirank.compression.checkpoint import read_record

    if not (path / PLAN_FILE).is_file():
        return None
    try:
        return read_record(path)
    except InputError:
        return None


def _is_there(source: str) -> bool:
    """Whether a checkpoint's source can be named: a directory that is here, the embedded model, or a hub's name."""
    if not source:
        return False
    looks_like_a_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    from unirank.models.embedded import NAME

    return Path(source).is_dir() or source == NAME or ("/" in source and not looks_like_a_path)
