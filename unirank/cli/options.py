"""Options that several commands share, the groups of `--help` that they stand in, and the texts that explain them.

Nothing here may import torch or transformers: `--help` shows it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unirank.analysis.scheme import schemes
from unirank.cli.amounts import read_fraction
from unirank.errors import capitalised
from unirank.planning.allocator import allocators
from unirank.recipes import presets

# Names of texts and of the embedded model, which live in modules that import transformers. A test compares them.
BUILTIN, BUILTIN_HELD_OUT, EMBEDDED, NAMED = "builtin", "builtin-held-out", "smollm2-135m", ("wikitext2", "c4", "ptb")

# Groups of --help. What has none comes first, under "Options".
_CALIBRATION, _RECIPE, _RANKS, _MODEL, _OUTPUT = "Calibration", "Recipe", "Ranks", "Model", "Output"


def option(text: str, *names: str, group: str | None = None, metavar: str | None = None) -> typer.models.OptionInfo:
    """An option with its help, in a group of --help."""
    return typer.Option(*names, help=text, rich_help_panel=group, metavar=metavar)


def fraction(text: str, *names: str) -> typer.models.OptionInfo:
    """An option that is a fraction, or a percentage."""
    return typer.Option(*names, help=text, parser=_read_fraction, metavar="<float>")


def _read_fraction(given: str) -> float:
    try:
        return read_fraction(given)
    except ValueError:
        raise typer.BadParameter(f"{given!r} is no number; it is a fraction such as 0.2, or 20%.") from None


REMOVE_HELP = (
    "Fraction of the decoder linears' weight parameters to remove: at least 0, less than 1; 0.2 or 20% removes a "
    "fifth. "
    "Embeddings and lm_head are neither touched nor counted."
)
TEXT_HELP = (
    f"{BUILTIN!r} (Python's documentation), a UTF-8 file, records as .jsonl, .json, .csv or .parquet, "
    f"{', '.join(NAMED)}, or a dataset's directory or hub name, where needed as NAME:CONFIGURATION"
)

# -- what to compress, and how much: the first group ------------------------------------------------------------------
Model = Annotated[str, typer.Argument(help=f"Directory, hub name, or {EMBEDDED!r} (embedded).")]
Store = Annotated[Path, typer.Argument(help="Directory that `unirank analyze` made.")]
Compressed = Annotated[
    str, typer.Argument(metavar="COMPRESSED", help="Checkpoint that `unirank compress` made.", show_default=False)
]
Remove = Annotated[float | None, fraction(REMOVE_HELP, "--remove", "-r")]
RanksFile = Annotated[
    Path | None,
    option(
        "Instead of --remove: ranks from this JSON file, a plan (also of another store) or names and ranks.", "--ranks"
    ),
]
_INSTEAD = "Instead of --remove: "
_INCREASE = (
    "the most that can be removed with so much more perplexity than the dense model's on --text, such as 10%. Found by "
    "measuring."
)
_PARAMS = "at most so many parameters in the whole model, such as 100M."
_SIZE = "at most so many bytes of weights on disk, in the model's dtype, such as 200MB."
MaxPerplexityIncrease = Annotated[str | None, option(_INSTEAD + _INCREASE)]
Params = Annotated[str | None, option(_INSTEAD + _PARAMS)]
Size = Annotated[str | None, option(_INSTEAD + _SIZE)]
# Of a command that has no --remove.
GoalIncrease = Annotated[str | None, option(capitalised(_INCREASE), "--max-perplexity-increase")]
GoalParams = Annotated[str | None, option(capitalised(_PARAMS), "--params")]
GoalSize = Annotated[str | None, option(capitalised(_SIZE), "--size")]
Bits = Annotated[
    int | None, option("With --size: as many as after `unirank quantize OUT --bits` 8 or 4, which comes afterwards.")
]
TargetText = Annotated[
    str | None,
    option(
        f"With --max-perplexity-increase: perplexity on this text: {TEXT_HELP}. Default: the part of the calibration "
        "text that did not calibrate."
    ),
]
TextLimit = Annotated[
    int | None, option("With --max-perplexity-increase: the first so many windows of the text. Default: all.")
]
TextWindow = Annotated[
    int | None, option("Tokens a window of the text that is measured. Default: 1024, or the model's positions.")
]
Evaluations = Annotated[
    int | None, option("With --max-perplexity-increase: the most fractions that are measured. Default: 6.")
]
Preset = Annotated[
    str | None,
    option(
        f"A recipe that sets scheme, allocator, form and what follows: {', '.join(presets())}. unirank is the paper, "
        "and takes seconds after the analysis; fast is better and takes minutes; best is better still and needs "
        "gradients; healed trains it layer by layer, distilled then the whole model a little. Default: unirank."
    ),
]
Calib = Annotated[
    str | None, option(f"Calibration text: {TEXT_HELP}; or several, with commas between them. Default: {BUILTIN}.")
]
Against = Annotated[str | None, option("The dense model: directory or hub name.")]

# -- calibration ------------------------------------------------------------------------------------------------------
CalibShares = Annotated[
    str | None,
    option(
        "Of several calibration texts, how many of the windows each gives: --calib a.txt,b.txt --calib-shares 3,1. "
        "Default: as many each.",
        group=_CALIBRATION,
    ),
]
Windows = Annotated[int | None, option("Calibration windows. Default: 64.", group=_CALIBRATION)]
Window = Annotated[int | None, option("Tokens a calibration window. Default: 512.", group=_CALIBRATION)]
Seed = Annotated[int | None, option("Seed of the window positions. Default: 0.", group=_CALIBRATION)]
Batch = Annotated[
    int | None, option("Windows that run together; fewer need less memory. Default: 8.", group=_CALIBRATION)
]
Gradients = Annotated[
    int | None,
    option(
        "How many calibration windows also run backward. Default: 0, or 32 where gradients are needed.",
        group=_CALIBRATION,
    ),
]
Clip = Annotated[
    float | None,
    option(
        "Tokens that are longer than this many times the median count with that length; 0 is off. Default: 2, or that "
        "of a store that is gone on with.",
        group=_CALIBRATION,
    ),
]
Shrink = Annotated[
    float | None,
    option(
        "Share by which what two channels of an input do together counts less than what each does, for the sake of "
        "texts that did not calibrate; 0 is off. Default: 0.1 with afm and kfac, else 0; or that of a store that is "
        "gone on with.",
        group=_CALIBRATION,
    ),
]
Precision = Annotated[
    str | None,
    option(
        "Of the decomposition: float64, or float32 for GPUs whose float64 is slow, at the price of rounding. Default: "
        "float64.",
        group=_CALIBRATION,
    ),
]
Split = Annotated[str | None, option("Split of a calibration dataset. Default: train.", group=_CALIBRATION)]
TextRevision = Annotated[str | None, option("Revision of a calibration dataset on the hub.", group=_CALIBRATION)]

# -- recipe: how matrices are decomposed and what follows -------------------------------------------------------------
Scheme = Annotated[
    str | None,
    option(
        f"Decomposition scheme: {', '.join(schemes())}. Default: the preset's, or a finished store's, or whiten.",
        group=_RECIPE,
    ),
]
Refine = Annotated[
    float | None,
    option(
        "A second pass fits every linear again to what really enters it: 1 aims at the dense model's outputs, 0 at the "
        "dense weights, 0.5 is a good start. Takes about as long as the analysis.",
        metavar="MIX",
        group=_RECIPE,
    ),
]
RefineShrink = Annotated[
    float | None,
    option("With --refine: as --shrink, of the second pass; 0 is off. Default: 0.3.", group=_RECIPE),
]
RefineDamping = Annotated[float | None, option("With --refine: damping of the inputs. Default: 0.01.", group=_RECIPE)]
RefineMetric = Annotated[
    bool, option("With --refine: fit in the output metric of kfac; needs gradients.", "--refine-metric", group=_RECIPE)
]
RefineMetricDamping = Annotated[
    float | None, option("With --refine-metric: its damping. Default: 0.01.", group=_RECIPE)
]
RefineCentred = Annotated[
    bool, option("With --refine: restore the mean output with a bias.", "--refine-centred", group=_RECIPE)
]
RefineDense = Annotated[
    bool, option("With --refine: also fit the linears that stay dense.", "--refine-dense", group=_RECIPE)
]
Heal = Annotated[
    bool,
    option(
        "Then train every layer a little on the calibration text, as `unirank heal` does by itself with more options.",
        "--heal",
        group=_RECIPE,
    ),
]

# -- ranks: how the budget is shared out ------------------------------------------------------------------------------
Allocator = Annotated[
    str | None, option(f"Allocator: {', '.join(allocators())}. Default: the preset's, or unirank.", group=_RANKS)
]
Set = Annotated[
    list[str] | None,
    option("An option of the allocator; repeatable.", "--set", metavar="NAME=VALUE", group=_RANKS),
]
MinRank = Annotated[int, option("Least rank of a matrix.", group=_RANKS)]
MultipleOf = Annotated[
    int | None,
    option(
        "Ranks are multiples of this. Default: 16 with a preset but unirank, less where the budget has no room for it, "
        "else 1.",
        group=_RANKS,
    ),
]
Form = Annotated[
    str | None,
    option(
        "How low-rank matrices are stored, and so what a rank costs: factors, R (M + N), or pivoted, R (M + N - R). "
        "Default: the preset's, or the plan's, or factors.",
        group=_RANKS,
    ),
]
Importance = Annotated[
    str | None, option("Where importance is measured: sublayer, block, none. Default: sublayer.", group=_RANKS)
]
Distance = Annotated[
    str | None,
    option("Importance from the cosine: cosine (1 - cos), angular (arccos / pi). Default: cosine.", group=_RANKS),
]
Gamma = Annotated[float | None, option("Importance to this power. Default: 1.", group=_RANKS)]
Local = Annotated[
    str | None, option("Local score: energy, sigma, absolute, global-only. Default: energy.", group=_RANKS)
]
PerParameter = Annotated[bool, option("Divide scores by M + N.", "--per-parameter", group=_RANKS)]

# -- model: how it is loaded ------------------------------------------------------------------------------------------
Dtype = Annotated[str, option("auto (the checkpoint's), float32, bfloat16, float16.", group=_MODEL)]
Device = Annotated[str | None, option("Torch device. Default: a GPU when there is one.", group=_MODEL)]
ModelRevision = Annotated[str | None, option("Revision of the model on the hub.", group=_MODEL)]
TrustRemoteCode = Annotated[
    bool,
    option(
        "Run modelling code that the checkpoint brings. Only for code that you have read.",
        "--trust-remote-code",
        group=_MODEL,
    ),
]
Stream = Annotated[
    bool,
    option(
        "For models larger than memory: decoder layers stay in the checkpoint's files and are read one at a time.",
        "--stream",
        group=_MODEL,
    ),
]

# -- output -----------------------------------------------------------------------------------------------------------
DryRun = Annotated[
    bool,
    option(
        "Work on one layer only, and print what all of them will need: memory, disk and time.",
        "--dry-run",
        group=_OUTPUT,
    ),
]
Overwrite = Annotated[bool, option("Replace an output that unirank made before.", "--overwrite", group=_OUTPUT)]
Json = Annotated[bool, option("Print one JSON object for machines.", "--json", group=_OUTPUT)]


def out(text: str) -> typer.models.OptionInfo:
    """`--out`, with what stands there."""
    return option(text, "--out", "-o")
