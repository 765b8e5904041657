"""The recipes of docs/experiments.md: what was tried on the way to the presets, by the name of its row.

`PARTS` are the parts of the presets `fast` to `distilled`, each alone and together, in the pivoted form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unirank.compression.refine import Refine
from unirank.finetuning.settings import Heal
from unirank.recipes import Preset

_CENTRED = Refine(centred=True)
_METRIC = Refine(centred=True, metric=True)

RECIPES = {
    "whiten + unirank + pass": Preset("whiten", "unirank", refine=Refine()),
    "afm + unirank + pass": Preset("afm", "unirank", refine=_CENTRED),
    "afm + unirank + pass, mix 1": Preset("afm", "unirank", refine=Refine(mix=1.0, centred=True)),
    "afm + lems": Preset("afm", "lems"),
    "kfac + curvature": Preset("kfac", "curvature"),
    "kfac + curvature, cost_power 0.5": Preset("kfac", "curvature", options={"cost_power": 0.5}),
    "kfac + curvature + pass": Preset("kfac", "curvature", refine=_METRIC),
    "kfac + lems": Preset("kfac", "lems"),
}


def _pivoted(scheme: str = "whiten", allocator: str = "lems", *, lems: Mapping[str, float] | None = None, **more: Any):
    return Preset(scheme, allocator, options=lems or {}, form="pivoted", **more)


# What the code of LEMS measures (method 4.1), where the default is milder.
_TEMPERATURE = {"temperature": 0.6, "tokens": 256, "first": 256}
PARTS = {
    "uniform, pivoted": _pivoted(allocator="uniform"),  # PIFA's rank rule
    "uniform, pivoted + heal, mix 1": _pivoted(allocator="uniform", heal=Heal(mix=1.0)),  # AA-SVD's third pass
    "unirank, pivoted": _pivoted(allocator="unirank"),
    "lems, pivoted": _pivoted(),
    "lems, pivoted, temperature": _pivoted(lems=_TEMPERATURE),
    "lems, pivoted, depth": _pivoted(lems={"depth": 10}),
    "lems, pivoted, in-plan": _pivoted(lems={"rounds": 1}),
    "lems, pivoted, swaps": _pivoted(lems={"swaps": 200}),
    "lems, pivoted, complete": _pivoted(lems={"depth": 10, "rounds": 1, "swaps": 200}),
    "lems, pivoted + pass": _pivoted(refine=Refine()),
    "lems, pivoted + heal": _pivoted(heal=Heal()),
    "lems, pivoted + distil": _pivoted(heal=Heal(distill_steps=200)),
    "distilled, text alone": _pivoted("kfac", refine=_METRIC, heal=Heal(distill_steps=200, distill_sampled=0.0)),
    "afm + lems, pivoted": _pivoted("afm"),
    "kfac + lems, pivoted": _pivoted("kfac"),
}
RECIPES |= PARTS
