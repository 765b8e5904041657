"""The recipes of docs/experiments.md: what was tried on the way to the presets, by the name of its row."""

from __future__ import annotations

from unirank.compression.refine import Refine
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
