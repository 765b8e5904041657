"""Put the ranks of a plan into a module of stacked experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from unirank.analysis.store import AnalysisStore
from unirank.errors import NonFiniteError
from unirank.models.low_rank import lost_output
from unirank.models.low_rank_experts import LowRankExperts, RaggedFactors, make_low_rank_experts
from unirank.models.targets import target_weight
from unirank.rank_plan import RankPlan
from unirank.types import DENSE, ExpertSpec, LoadedModel, Paging


@torch.no_grad()
def put_experts(loaded: LoadedModel, store: AnalysisStore, specs: Sequence[ExpertSpec], plan: RankPlan) -> int:
    """Replace the module whose matrices are `specs`, all of one module, where the plan gives any of them a rank.

    A scheme with means gives a bias to each matrix that has a rank, zeros to the others of its stack.

    Returns how many matrices have a rank.

    Raises NonFiniteError where such a bias does not fit the dtype; names the matrix.
    """
    cut = [spec for spec in specs if plan.ranks[spec.name] != DENSE]
    if not cut:
        return 0
    path = cut[0].module
    lost: dict[str, torch.Tensor] = {}
    for spec in cut:
        mean = store.input_mean(spec)
        if mean is not None:
            weight = target_weight(loaded.model, spec)
            lost[spec.name] = lost_output(weight, *store.factors(spec, int(plan.ranks[spec.name])), mean)
            if not lost[spec.name].isfinite().all():
                raise NonFiniteError(f"The bias of {spec.name} is NaN or infinity in {weight.dtype}.")
    ranks: dict[str, dict[int, int]] = {}
    for spec in cut:
        ranks.setdefault(spec.parameter, {})[spec.expert] = int(plan.ranks[spec.name])
    biased = {spec.parameter for spec in cut if spec.name in lost}
    experts = make_low_rank_experts(loaded.model, path, ranks, biased=biased, form=plan.form)
    for spec in cut:
        if spec.name in lost:
            getattr(experts, f"{spec.parameter}_bias")[spec.expert] += lost[spec.name]
    for name in experts.stacks:
        factors = experts.factors(name)
        members = [spec for spec in cut if spec.parameter == name]
        if loaded.pages is None:
            _fill(factors, store, members)
        elif factors is None:
            setattr(experts, name, nn.Parameter(getattr(experts, name).to("meta"), requires_grad=False))
        else:
            _leave(loaded.pages, f"{path}.{name}", experts, factors, store, members)
    return len(cut)


def _fill(factors: RaggedFactors | None, store: AnalysisStore, specs: Sequence[ExpertSpec]) -> None:
    for spec in specs:
        assert factors is not None
        factors.put(spec.expert, *store.factors(spec, factors.ranks[spec.expert] or 0))


def _leave(
    pages: Paging,
    name: str,
    experts: LowRankExperts,
    factors: RaggedFactors,
    store: AnalysisStore,
    specs: Sequence[ExpertSpec],
) -> None:
    """Take the tensors of a stack out of memory; when read they are made from the store, and dense ones of the file."""
    ranks, form, dtype, device = factors.ranks, factors.form, factors.right.dtype, factors.right.device
    m, n, turned = factors.m, factors.n, experts.turned
    whole = pages.reader(name)
    factors.to("meta")
    waiting: dict[str, torch.Tensor] = {}  # of one reading, until each was taken

    def take(leaf: str) -> torch.Tensor:
        if leaf not in waiting:
            made = RaggedFactors(m, n, ranks, form=form, device=device, dtype=dtype)
            if made.dense is not None:
                made.take_dense(whole(), turned=turned)
            _fill(made, store, specs)
            waiting.update(made.state_dict())
        return waiting.pop(leaf)

    for leaf in factors.state_dict():
        pages.put(f"{name}_factors.{leaf}", lambda leaf=leaf: take(leaf))
