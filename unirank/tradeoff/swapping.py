"""A dense model that is compressed for a while, and is then the same model with the same tensors again."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from unirank.analysis.store import AnalysisStore
from unirank.compression.expert_truncation import put_experts
from unirank.compression.truncation import TruncateReport, put_factors, settle
from unirank.experts import is_experts, stacks_of
from unirank.layerwise.lending import lent
from unirank.models.file_names import join_again
from unirank.models.low_rank import LowRankLinear, count_parameters
from unirank.models.targets import has_added_bias
from unirank.progress import OnProgress, silent
from unirank.rank_plan import RankPlan
from unirank.types import DENSE, ExpertSpec, Form, LinearSpec, LoadedModel


@contextmanager
def on_loan(loaded: LoadedModel) -> Iterator[None]:
    """The decoder's linears of `loaded` may be replaced inside, and are what they were afterwards.

    Their weights may be read and not written to; what is written to their biases is written to copies. Where tensors
    are moved to other memory (see `align_weights`), they are where they were afterwards too: BLAS adds in another order
    at another alignment, and a dense model that was measured twice would not give the same last bit.
    """
    model: Any = loaded.model
    holders = {spec.module if isinstance(spec, ExpertSpec) else spec.name for spec in loaded.linears}
    linears = {name: model.get_submodule(name) for name in holders}
    places = [(parameter, parameter.data) for parameter in model.parameters()]
    with lent(model):
        try:
            for name, linear in linears.items():
                model.set_submodule(name, _with_own_bias(linear))
            yield
        finally:
            for name, linear in linears.items():
                model.set_submodule(name, linear)
            for parameter, data in places:
                parameter.data = data
            if getattr(model.config, "quantization_config", None) is not None:  # a dense model has none
                del model.config.quantization_config
            join_again(model)


def _with_own_bias(linear: nn.Module) -> nn.Module:
    """A copy of a linear that shares its weight, or of stacked experts that shares theirs."""
    if is_experts(linear):
        return copy.deepcopy(linear, {id(stack): stack for stack in map(linear.get_parameter, stacks_of(linear))})
    return copy.deepcopy(linear, {id(linear.weight): linear.weight})


class Swapping:
    """Plans put into one model, one after the other, from the factors of their stores.

    Only matrices whose rank changed since the last plan are made again. Memory beside the dense model: the low-rank
    matrices of one plan, at most as much as the targets; and what is aligned for a point, at most the rest of the
    model.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._made: dict[str, tuple[tuple[str, int, Form], LowRankLinear]] = {}
        self.rebuilt = 0  # matrices that the last plan needed new

    def put(self, store: AnalysisStore, plan: RankPlan, *, progress: OnProgress = silent) -> TruncateReport:
        """Like `truncate`, inside of `on_loan`; `plan` must have been made from `store`, and that from this model.

        Raises NonFiniteError and UnirankError like it.
        """
        model, self.rebuilt = self._loaded.model, 0
        before = count_parameters(model)
        stacked: dict[str, list[ExpertSpec]] = {}
        for done, spec in enumerate(self._loaded.linears, start=1):
            rank = plan.ranks[spec.name]
            if isinstance(spec, ExpertSpec):
                stacked.setdefault(spec.module, []).append(spec)
            elif rank == DENSE:
                self._made.pop(spec.name, None)
            else:
                self._put_one(store, spec, int(rank), plan.form)
            progress("truncate", done, len(self._loaded.linears))
        for members in stacked.values():  # made again for every plan: their matrices share tensors
            self.rebuilt += put_experts(self._loaded, store, members, plan)
        return settle(self._loaded, plan, before)

    def _put_one(self, store: AnalysisStore, spec: LinearSpec, rank: int, form: Form) -> None:
        key = store.digest, rank, form
        known = self._made.get(spec.name)
        if known is not None and known[0] == key:
            self._loaded.model.set_submodule(spec.name, known[1])
            return
        self._made.pop(spec.name, None)  # its memory is free before the new one's is taken
        del known
        put_factors(self._loaded, store, spec, rank, form)
        made: Any = self._loaded.model.get_submodule(spec.name)
        self._made[spec.name] = key, made
        self.rebuilt += 1


def added_biases(model: nn.Module, names: Mapping[str, Any]) -> bool:
    """Whether a linear in `names` has a bias that the dense model has not."""
    return any(has_added_bias(model, name) for name in names)
