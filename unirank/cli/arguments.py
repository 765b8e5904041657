"""From what the command line says to what the library takes: options read together, and those that exclude others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from unirank.errors import InputError

if TYPE_CHECKING:
    from unirank.analysis.calibration import Calibration
    from unirank.tradeoff.target import Target
    from unirank.types import Form

# What shapes a plan, so that it has no meaning beside one that is read from a file.
PLANNING = (
    *("preset", "allocator", "set_", "min_rank", "multiple_of"),
    *("importance", "distance", "gamma", "local", "per_parameter"),
)


def read_calibration(
    text: str | None,
    shares: str | None,
    windows: int | None,
    window: int | None,
    seed: int | None,
    batch: int | None,
    gradients: int | None,
    clip: float | None,
    shrink: float | None,
    precision: str | None,
    split: str | None,
    revision: str | None,
) -> Calibration | str | None:
    """What was said about calibration; None where nothing was, so that a finished store is taken as it is."""
    from unirank.analysis.calibration import Calibration

    given = {"text": text, "windows": windows, "window": window, "seed": seed, "batch": batch}
    given["shares"] = None if shares is None else read_shares(shares)
    given |= {"gradient_windows": gradients, "clip": clip, "shrink": shrink, "precision": precision}
    given |= {"split": split, "revision": revision}
    given = {name: value for name, value in given.items() if value is not None}
    if given.keys() == {"text"}:
        return text  # a text alone goes with a finished store of it
    return Calibration(**given) if given else None  # pyright: ignore[reportArgumentType] - each has its own type


def read_form(name: str | None) -> Form | None:
    from unirank.rank_plan import check_form

    return None if name is None else check_form(name)


def read_shares(given: str) -> list[float]:
    """`"3,1"` -> `[3.0, 1.0]`; what a share may be is the library's matter."""
    try:
        return [float(part) for part in given.split(",")]
    except ValueError:
        raise InputError(f"--calib-shares {given} is not legal; it is a number for each text, such as 3,1.") from None


def read_settings(
    importance: str | None, distance: str | None, gamma: float | None, local: str | None, per_parameter: bool
) -> Any:
    """Score settings; None where all are UniRank's."""
    given = {"importance": importance, "distance": distance, "gamma": gamma, "local": local}
    given = {name: value for name, value in given.items() if value is not None}
    if not given and not per_parameter:
        return None
    from unirank.planning.score import ScoreSettings

    return ScoreSettings(**given, per_parameter=per_parameter)  # pyright: ignore[reportArgumentType] - it checks them


def read_refine(
    mix: float | None,
    damping: float | None,
    shrink: float | None,
    metric_damping: float | None,
    metric: bool,
    centred: bool,
    dense: bool,
) -> Any:
    """The second pass; None without --refine, which the others need."""
    more = {"damping": damping, "shrink": shrink, "metric_damping": metric_damping}
    more |= {"metric": metric or None, "centred": centred or None, "dense": dense or None}
    more = {name: value for name, value in more.items() if value is not None}
    if mix is None:
        if more:
            raise InputError(f"--refine-{next(iter(more)).replace('_', '-')} needs --refine MIX.")
        return None
    from unirank.compression.refine import Refine

    return Refine(mix=mix, **more)  # pyright: ignore[reportArgumentType] - it checks them


def read_options(given: list[str] | None) -> dict[str, float] | None:
    """`["ratio=3"]` -> `{"ratio": 3.0}`."""
    options = {}
    for item in given or ():
        name, _, value = item.partition("=")
        try:
            number = float(value)
        except ValueError:
            raise InputError(f"--set {item} is not legal; it must be NAME=NUMBER, such as ratio=3.") from None
        if name in options:
            raise InputError(f"--set gives {name} twice.")
        options[name] = number
    return options or None


def read_target(
    max_perplexity_increase: str | None,
    params: str | None,
    size: str | None,
    bits: int | None,
    text: str | None,
    window: int | None,
    limit: int | None,
    evaluations: int | None,
) -> Target | None:
    """What is to be reached; None where nothing was said about it."""
    from unirank.cli.amounts import read_bytes, read_count, read_share

    given: dict[str, Any] = {"bits": bits, "text": text, "window": window, "limit": limit}
    given["evaluations"] = evaluations
    if max_perplexity_increase is not None:
        given["max_perplexity_increase"] = read_share("--max-perplexity-increase", max_perplexity_increase)
    if params is not None:
        given["params"] = read_count("--params", params)
    if size is not None:
        given["size"] = read_bytes("--size", size)
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return None
    from unirank.tradeoff.target import Target

    return Target(**given)


def check_source(ctx: typer.Context, remove: float | None, file: Path | None, *targets: str | None) -> None:
    """Exactly one of --remove, --ranks and, where a command has them, the targets; and beside a file nothing that it
    makes meaningless.

    Args:
        targets: values of --max-perplexity-increase, --params, --size.
    """
    if sum(given is not None for given in (remove, file, *targets)) != 1:
        hint = "--remove, --max-perplexity-increase, --params, --size or --ranks" if targets else "--remove or --ranks"
        raise typer.BadParameter("exactly one of them must be given.", ctx=ctx, param_hint=hint)
    if file is not None:
        _check_alone(ctx, "--ranks: the file has the ranks", PLANNING)


def check_preset(ctx: typer.Context, preset: str | None, others: tuple[str, ...]) -> None:
    """Beside --preset nothing that it sets."""
    if preset is not None:
        free = ("preset", "min_rank", "multiple_of")
        _check_alone(ctx, "--preset", ("scheme", "refine", "heal", *(name for name in others if name not in free)))


def _check_alone(ctx: typer.Context, flag: str, others: tuple[str, ...]) -> None:
    """Refuse options of the command line that `flag` makes meaningless."""
    for name in others:
        source = ctx.get_parameter_source(name) if name in ctx.params else None
        if source is not None and source.name == "COMMANDLINE":
            hint = "--set" if name == "set_" else "--" + name.replace("_", "-")
            raise typer.BadParameter(f"it does not go with {flag}.", ctx=ctx, param_hint=hint)


def keep_source(out: Path, model: str | Path, what: str) -> None:
    """Raise InputError where a checkpoint would replace the one that it is made of; `what`: "that is healed"."""
    if out.resolve() == Path(model).resolve():
        raise InputError(f"The output {out} is the checkpoint {what}; choose another.")
