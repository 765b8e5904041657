"""Options of the command line that several commands share, and the texts that explain them."""

from __future__ import annotations

from typing import Annotated

import typer

from unirank.analysis.scheme import schemes
from unirank.models.embedded import NAME
from unirank.planning.allocator import allocators
from unirank.recipes import presets
from unirank.text.records import NAMED
from unirank.text.windows import BUILTIN

REMOVE_HELP = (
    "Fraction of the decoder linears' weight parameters to remove: at least 0, less than 1; 0.2 removes 20 %. "
    "Embeddings and lm_head are neither touched nor counted."
)

PRESET_HELP = (
    f"A recipe in the place of scheme, allocator and their options: {', '.join(presets())}. unirank is the paper, "
    "fast the best without gradients, best the best."
)
REFINE_HELP = (
    "A second pass fits every linear again to what really enters it: 1 aims at the dense model's outputs, 0 at the "
    "dense weights, 0.5 is a good start. Takes about as long as the analysis."
)
Model = Annotated[str, typer.Argument(help=f"Directory, hub name, or {NAME!r} (embedded, no network).")]
Remove = Annotated[float | None, typer.Option("--remove", "-r", help=REMOVE_HELP)]
RANKS_HELP = "Ranks from this JSON file in the place of --remove: a plan (also of another store), or names and ranks."
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that unirank made before.")]
Scheme = Annotated[str, typer.Option(help=f"Decomposition scheme: {', '.join(schemes())}.")]
AllocatorName = Annotated[str, typer.Option("--allocator", help=f"Allocator: {', '.join(allocators())}.")]
CALIB_HELP = (
    f"Calibration text: {BUILTIN!r} (Python's documentation), a UTF-8 file, .jsonl or .parquet records, "
    f"{', '.join(NAMED)}, or a dataset's directory or hub name, where needed as NAME:CONFIGURATION."
)
SPLIT_HELP = "Split of a calibration dataset. Default: train."
Split = Annotated[str | None, typer.Option(help=SPLIT_HELP)]
Revision = Annotated[str | None, typer.Option(help="Revision of a calibration dataset on the hub.")]
Calib = Annotated[str, typer.Option(help=CALIB_HELP)]
Windows = Annotated[int, typer.Option(help="Calibration windows.")]
Window = Annotated[int, typer.Option(help="Tokens a calibration window.")]
Seed = Annotated[int, typer.Option(help="Seed of the window positions.")]
Batch = Annotated[int, typer.Option(help="Windows that run together; fewer need less memory.")]
GRADIENTS_HELP = "How many calibration windows also run backward; default: 0, or 32 for schemes that need gradients."
Gradients = Annotated[int | None, typer.Option(help=GRADIENTS_HELP)]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16, float16.")]
Device = Annotated[str | None, typer.Option(help="Torch device; default: a GPU when there is one.")]
MinRank = Annotated[int, typer.Option(help="Least rank of a matrix.")]
MultipleOf = Annotated[int, typer.Option(help="Ranks are multiples of this (8, 16 or 64 suit tensor cores).")]
Importance = Annotated[str, typer.Option(help="Where importance is measured: sublayer, block, none.")]
Distance = Annotated[str, typer.Option(help="Importance from the cosine: cosine (1 - cos), angular (arccos / pi).")]
Gamma = Annotated[float, typer.Option(help="Importance to this power.")]
Local = Annotated[str, typer.Option(help="Local score: energy, sigma, absolute, global-only.")]
PerParameter = Annotated[bool, typer.Option("--per-parameter", help="Divide scores by M + N.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="An option of the allocator; repeatable.")
]
Stream = Annotated[
    bool,
    typer.Option(
        "--stream",
        help="For models larger than memory: decoder layers stay in the checkpoint's files and are read one at a time.",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Work on one layer only, and print what all of them will need: memory, disk and time."
    ),
]
