"""What every command shares: where its output goes, the progress display, Ctrl-C, and how errors end it."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR, getLogger
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from unirank.cli.warned import warnings_in_yellow
from unirank.display import Lines, display, process_number
from unirank.errors import InputError, UnirankError, is_out_of_memory
from unirank.progress import OnProgress

_LONG = 120.0  # seconds


class Session:
    """Where a command's output goes."""

    def __init__(self, as_json: bool, progress: OnProgress) -> None:
        self.progress = progress
        self._json = as_json
        self._result: tuple[dict[str, Any], tuple[Any, ...]] | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What runs inside is a stage by itself, such as "load" or "save"."""
        self.progress(name, 0, 1)
        yield
        self.progress(name, 1, 1)

    def show(self, record: dict[str, Any], *renderables: Any) -> None:
        """The command's result: `record` under --json, else the renderables."""
        self._result = record, renderables

    def print(self) -> None:
        """Print the result. Only when the progress display is gone, whose last redraw would wipe lines out."""
        if self._result is None:
            return
        record, renderables = self._result
        if self._json:
            print(json.dumps(record, indent=1))
            return
        # A pipe has no width; tables should not be cut there.
        width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 140
        console = Console(width=width, highlight=False)
        for renderable in renderables:
            whole = isinstance(renderable, Text) and renderable.no_wrap  # a command, to be copied
            console.print(renderable, soft_wrap=whole)


@contextmanager
def _shown(errors: Console, *, as_json: bool, first: bool) -> Iterator[OnProgress]:
    """The display of a terminal; in a log, lines on stderr once it takes long, so that it does not look hung."""
    if as_json or errors.is_terminal or not first:
        with display(None if errors.is_terminal and not as_json else False, console=errors) as progress:
            yield progress
        return
    with Lines(sys.stderr, after=_LONG) as lines:
        yield lines


@contextmanager
def run_session(as_json: bool, *, parallel: bool = False, models: bool = True) -> Iterator[Session]:
    """A progress display while a command runs; Ctrl-C ends it with one sentence and code 130.

    Args:
        parallel: the command may be run by torchrun; process 0 shows progress and result.
        models: it loads models, so that transformers has to be kept quiet.

    Raises InputError under torchrun where the command is not `parallel`.
    """
    process = process_number()
    if process is not None and not parallel:
        raise InputError("torchrun is for `unirank analyze` and `unirank compress`; run this command by itself.")
    if models:
        from transformers.utils import logging

        logging.disable_progress_bar()
    getLogger("huggingface_hub").setLevel(ERROR)  # its retries without a network; the error itself is ours to tell
    errors = Console(stderr=True)
    try:
        with (
            _shown(errors, as_json=as_json, first=not process) as progress,
            warnings_in_yellow(errors, in_flags, enabled=not process),
        ):
            session = Session(as_json, progress)
            yield session
        if not process:
            session.print()
    except (KeyboardInterrupt, Exception) as error:
        if not _was_interrupted(error):
            raise
        errors.print("Interrupted. Nothing half-written is left; what was interrupted resumes with the same command.")
        raise typer.Exit(130) from None


@contextmanager
def exit_codes() -> Iterator[None]:
    """End the process with a sentence and a code for every error that is ours to tell; others keep their traceback."""
    try:
        yield
        return
    except (KeyboardInterrupt, Exception) as error:
        if _was_interrupted(error):  # before a session began, or after it
            raise SystemExit(130) from None
        if isinstance(error, UnirankError):
            sentence, code = in_flags(str(error)), error.exit_code
        elif is_out_of_memory(error):
            sentence, code = f"Out of memory: {(str(error).splitlines() or ['no room.'])[0]} {_LESS}", 1
        else:
            raise
    process = process_number()
    who = "" if process is None else f"process {process}: "
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {who}{escape(sentence)}")
    raise SystemExit(code)


# Arguments whose option is not their name. The library writes `name=`, `name=True`, `Calibration.name`,
# `Finetune.name` or `Heal.name`.
_FLAGS = {
    "Calibration.text": "--calib",
    "Calibration.shares": "--calib-shares",
    "Calibration.gradient_windows": "--gradients",
    "Calibration.revision": "--text-revision",
    "calibration=": "--calib",
    "text=": "--calib",
    "texts=": "--text",
    "presets=": "--preset",
    "options=": "--set",
    "refine=": "--refine",
    "workbench=": "--against",
    "tokenizer=": "a tokenizer",
}
_ARGUMENT = re.compile(r"\b(?:Calibration|Finetune|Heal)\.\w+|(?<![\w.(-])[a-z_]+=(?:True\b|(?=[\s,.;:)]|$))")


def in_flags(sentence: str) -> str:
    """A sentence of the library, with its arguments as the options of the command line."""

    def flag(found: re.Match[str]) -> str:
        name = found[0].removesuffix("True")
        return _FLAGS.get(name) or "--" + name.rpartition(".")[2].rstrip("=").replace("_", "-")

    return _ARGUMENT.sub(flag, sentence)


_LESS = (
    "A smaller --batch or --window needs less, --stream keeps one layer at a time (analyze, compress, heal), fewer "
    "--windows leave less between two layers, --micro-batch and --gradient-checkpointing help finetune; a GPU that "
    "others use too has less room (take another one with --device). What was finished is kept."
)


def _was_interrupted(error: BaseException | None) -> bool:
    """By Ctrl-C, also where leaving somebody's half-entered context manager replaced it by another error."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None
