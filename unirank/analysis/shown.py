"""How a store looks: in a terminal what it is, in a notebook its cosines too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from unirank import looks
from unirank.errors import StoreError
from unirank.types import BLOCK, CosineStat, sublayers_of

if TYPE_CHECKING:
    from unirank.analysis.store import AnalysisStore


def as_lines(store: AnalysisStore) -> str:
    """A few lines; no layer's file is read for them."""
    model, used = store.identity.model, store.identity.calibration
    backward = f"gradients of {used.gradient_windows} windows" if store.has_gradients else "no gradients"
    done = f"{store.layers_done()} of {store.layer_count} layers"
    return looks.lines(
        f"AnalysisStore: {model.class_name} in {model.dtype}, {done}, {len(store.linears)} linears",
        f"in {store.path}",
        f"scheme {store.identity.scheme}; {used.windows} windows of {used.window} tokens of {used.text}; {backward}",
        "next: unirank.plan(store, 0.2)" if store.complete else "not finished: the same analyze resumes it",
    )


def as_html(store: AnalysisStore) -> str:
    """The lines, and the mean cosine of every sublayer and block."""
    said = looks.text(as_lines(store))
    if not store.complete:
        return said
    try:
        found = store.cosines()
    except StoreError as error:  # said, for a notebook would show a traceback in the place of the object
        return said + looks.text(str(error))
    columns, rows = cosine_rows(store, found)
    return said + looks.table(("layer", *columns), rows, "cosine between input and output")


def cosine_rows(
    store: AnalysisStore, cosines: Sequence[Mapping[str, CosineStat]]
) -> tuple[tuple[str, ...], list[list[str]]]:
    """The names of all sublayers and the block; and for each layer its number and mean cosines, empty for what others
    have."""
    columns = (*sublayers_of(store.linears), BLOCK)
    return columns, [
        [str(layer), *(f"{of[key].mean:.4f}" if key in of else "" for key in columns)]
        for layer, of in enumerate(cosines)
    ]
