"""What a job is given in several ways, read: ranks, and a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from unirank import costs
from unirank.errors import InputError
from unirank.planning.imported_ranks import read_rank_file
from unirank.progress import OnProgress, expect, silent
from unirank.rank_plan import RankPlan
from unirank.types import LoadedModel, Rank

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def ranks_text(ranks: RankPlan | Mapping[str, Rank] | str | Path) -> str:
    """Ranks as JSON text, as `import_plan` reads it."""
    if isinstance(ranks, RankPlan):
        return ranks.to_json()
    if isinstance(ranks, Mapping):
        return json.dumps({"ranks": dict(ranks)})
    return read_rank_file(Path(ranks))


def loaded_from(
    model: str | Path | PreTrainedModel | LoadedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    dtype: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    stream: bool = False,
    progress: OnProgress = silent,
) -> LoadedModel:
    if isinstance(model, LoadedModel):
        return model
    from unirank.models.loading import describe, load

    if isinstance(model, str | Path):
        expect(progress, [costs.load(costs.Sizes.of(None))])  # what it costs is known when it is there
        progress("load", 0, 1)
        loaded = load(
            str(model),
            dtype=dtype,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            stream=stream,
        )
        progress("load", 1, 1)
        return loaded
    if tokenizer is None:
        raise InputError("A model in memory needs its tokenizer=: unirank.compress(model, remove, tokenizer=...).")
    return describe(model, tokenizer)
