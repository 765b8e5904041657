"""The command line: thin, typed functions over the library. Results go to stdout, progress and errors to stderr."""

from __future__ import annotations

import os
from logging import ERROR, getLogger
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from unirank.cli.automatic import auto_command
from unirank.cli.compressed import densify_command, finetune_command, quantize_command, report_command
from unirank.cli.healing import heal_command
from unirank.cli.how_far import curve_command
from unirank.cli.looking import diagnose_command, evaluate_command, info_command
from unirank.cli.pipeline import analyze_command, compress_command, demo_command, plan_command
from unirank.cli.terminal import exit_codes

# Old spellings of options, by command; they work until 0.2 and stand in no --help.
_OLD = {
    "analyze": {"--revision": "--text-revision"},
    "plan": {"--model": "--against"},
    "compress": {"--plan": "--ranks", "--revision": "--text-revision"},
    "finetune": {"--data": "--text", "--teacher": "--against", "--dense": "--adapt-dense"},
    "report": {"--dense": "--against"},
    "diagnose": {"--model": "--against"},
}


class Command(TyperCommand):
    """A command that also knows the old spellings of its options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse `args`, old spellings as the new ones."""
        old = _OLD.get(self.name or "", {})
        return super().parse_args(ctx, [_renamed(argument, old) for argument in args])


def _renamed(argument: str, old: dict[str, str]) -> str:
    name, equals, value = argument.partition("=")
    return f"{old.get(name, name)}{equals}{value}"


app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make Hugging Face language models smaller by low-rank decomposition. "
    "`remove` always means the fraction of the decoder linears' weights that is removed.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"unirank {version('unirank')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options that stand before a command."""


for _name, _command in {
    "demo": demo_command,
    "analyze": analyze_command,
    "plan": plan_command,
    "compress": compress_command,
    "auto": auto_command,
    "curve": curve_command,
    "eval": evaluate_command,
    "report": report_command,
    "heal": heal_command,
    "finetune": finetune_command,
    "quantize": quantize_command,
    "densify": densify_command,
    "diagnose": diagnose_command,
    "info": info_command,
}.items():
    app.command(name=_name, cls=Command)(_command)


def main() -> None:
    """Entry point.

    Exit codes: 0 done, 1 failed, 2 bad input or usage, 3 store, 4 non-finite numbers, 5 writing, 130 interrupted.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # transformers imports torchao where it is; it warns of its libraries for GPUs that are not here, and torch of it.
    for name in ("torchao", "torch.utils._pytree"):
        getLogger(name).setLevel(ERROR)
    with exit_codes():
        app()
