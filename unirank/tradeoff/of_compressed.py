"""`CompressedModel.curve`: the curve that a compressed model is a point of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unirank.analysis.store import MANIFEST, AnalysisStore, open_store
from unirank.errors import InputError
from unirank.recipes import preset as preset_of
from unirank.recipes import presets as preset_names
from unirank.tradeoff.sweep import curve
from unirank.types import LoadedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from unirank.compression.checkpoint import CompressedModel
    from unirank.evaluation.measured_curve import Curve
    from unirank.rank_plan import RankPlan


def curve_of(
    compressed: CompressedModel,
    texts: str | Path | Sequence[str | Path],
    against: str | Path | PreTrainedModel | LoadedModel | None,
    store: AnalysisStore | str | Path | None,
    presets: str | Sequence[str] | None,
    **options: Any,
) -> Curve:
    """See `CompressedModel.curve`."""
    place = compressed.store if store is None else store
    if place is None or (not isinstance(place, AnalysisStore) and not (Path(place) / MANIFEST).is_file()):
        raise InputError(
            "The analysis that the model was made from is not known, or gone; name its directory with store=, or make "
            "another one for a curve: unirank.curve(model)."
        )
    found = place if isinstance(place, AnalysisStore) else open_store(place)
    if found.digest != compressed.plan.analysis:
        raise InputError(f"The store {found.path} is not the one that the model was made from; name that with store=.")
    dense = compressed.dense_name() if against is None else against
    options = {"tokenizer": compressed.tokenizer} | options  # for a model in memory; others bring their own
    return curve(dense, store=found, texts=texts, presets=presets or _preset(compressed.plan), **options)


def _preset(plan: RankPlan) -> str:
    """The cheapest preset of the plan's scheme and allocator, else the cheapest of its scheme, else "unirank"."""
    of = {name: preset_of(name) for name in preset_names()}
    both = [name for name, one in of.items() if (one.scheme, one.allocator) == (plan.scheme, plan.allocator)]
    return next(iter([*both, *(name for name, one in of.items() if one.scheme == plan.scheme)]), "unirank")
