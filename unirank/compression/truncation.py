"""Put a rank plan into a model: factors instead of weights, and a recount from the modules."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from unirank import looks
from unirank.analysis.redraw import check_model
from unirank.analysis.store import AnalysisStore
from unirank.compression.expert_truncation import put_experts
from unirank.disk.strictjson import Damaged, entry
from unirank.display import shows_progress, told
from unirank.errors import InputError, NonFiniteError, UnirankError
from unirank.models.file_names import keep_apart
from unirank.models.low_rank import (
    align_weights,
    count_parameters,
    lost_output,
    make_low_rank,
    stored_tensors,
)
from unirank.models.quantizer import UniRankConfig
from unirank.models.structure import weight_of
from unirank.models.targets import count_of_target, has_added_bias
from unirank.progress import Progress
from unirank.rank_plan import RankPlan
from unirank.types import DENSE, ExpertSpec, Form, LinearSpec, LoadedModel

_MOST = 2**63  # parameters that a record can count


@dataclass(frozen=True)
class TruncateReport:
    """Parameters counted from the modules, biases aside.

    Attributes:
        targets_before: of the target matrices, dense.
        targets_after: of the same, as they are now; equals the plan's `used`.
        model_before: of the whole model, tied weights once.
        model_after: the same now.
        low_rank: matrices that became factors; `dense` stayed.
    """

    targets_before: int
    targets_after: int
    model_before: int
    model_after: int
    low_rank: int
    dense: int

    def __repr__(self) -> str:
        return looks.lines(
            f"TruncateReport: {self.removed_of_targets:.2%} of the decoder linears removed",
            f"decoder linears: {self.targets_before:,} to {self.targets_after:,} parameters",
            f"whole model: {self.model_before:,} to {self.model_after:,} parameters ({self.removed_of_model:.2%} less)",
            f"{self.low_rank} matrices low-rank, {self.dense} dense",
        )

    @property
    def removed_of_targets(self) -> float:
        return 1 - self.targets_after / self.targets_before

    @property
    def removed_of_model(self) -> float:
        return 1 - self.model_after / self.model_before

    def as_dict(self) -> dict[str, float]:
        return asdict(self) | {
            "removed_of_targets": self.removed_of_targets,
            "removed_of_model": self.removed_of_model,
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> TruncateReport:
        """Read `as_dict`'s result. Raises Damaged for anything else."""
        report = cls(**{field.name: entry(record, field.name, int) for field in fields(cls)})
        for name, count in asdict(report).items():
            least = 1 if name.endswith("_before") else 0
            if not least <= count < _MOST:
                raise Damaged(f"{name} is {str(count)[:80]}")
        return report


@shows_progress
@torch.no_grad()
def truncate(loaded: LoadedModel, store: AnalysisStore, plan: RankPlan, *, progress: Progress = None) -> TruncateReport:
    """Replace, in place, every linear that `plan` gives a rank by the first components of `store`.

    Linears that the plan keeps dense are not touched, bit for bit; biases are kept. Of a model that was loaded with
    `stream`, factors are read from `store` when a layer is, so the store has to stay where it is.

    Raises:
        InputError: the plan or the store was made for another model.
        NonFiniteError: a bias that restores a mean output does not fit the dtype; names the linear.
        UnirankError: the recount from the modules differs from the plan.
    """
    check_plan(loaded, store, plan)
    model_before = count_parameters(loaded.model)
    done = 0
    for layer, specs in itertools.groupby(loaded.linears, key=lambda spec: spec.layer):
        with loaded.resident(layer):
            stacked: dict[str, list[ExpertSpec]] = {}
            for spec in specs:
                rank = plan.ranks[spec.name]
                if isinstance(spec, ExpertSpec):
                    stacked.setdefault(spec.module, []).append(spec)
                elif rank != DENSE:
                    put_factors(loaded, store, spec, int(rank), plan.form)
                done += 1
                told(progress)("truncate", done, len(loaded.linears))
            for members in stacked.values():
                put_experts(loaded, store, members, plan)
    return settle(loaded, plan, model_before)


@torch.no_grad()
def put_factors(loaded: LoadedModel, store: AnalysisStore, spec: LinearSpec, rank: int, form: Form) -> None:
    """Put the first components of one linear in its place; where layers are paged, they stay in the store.

    Where the linear has a bias, that goes along, and is what a scheme with means adds to.

    Raises NonFiniteError like `truncate`.
    """
    mean = store.input_mean(spec)
    weight = weight_of(loaded.model.get_submodule(spec.name))
    low = make_low_rank(loaded.model, spec.name, rank, add_bias=mean is not None, form=form)
    left, right = store.factors(spec, rank)
    bias = low.output_bias
    if mean is not None and bias is not None:
        bias.add_(lost_output(weight, left, right, mean))
        if not bias.isfinite().all():
            raise NonFiniteError(f"The bias of {spec.name} is NaN or infinity in {weight.dtype}.")
    if loaded.pages is None:
        low.set_product(left, right)
        return
    for inner in (low.left, low.right):
        inner.weight = nn.Parameter(inner.weight.to("meta"))
    keys = ["left.weight", "right.weight"]
    if form == "pivoted":
        low.place = low.place.to("meta")
        keys.append("place")
    stored = _Stored(store, spec, rank, form)
    for key in keys:
        where: dict[str, Any] = {"device": weight.device} | ({} if key == "place" else {"dtype": weight.dtype})
        loaded.pages.put(f"{spec.name}.{key}", lambda key=key, where=where: stored.take(key).to(**where))


class _Stored:
    """What one linear stores, read from the store and brought to its form when the first tensor of it is asked for."""

    def __init__(self, store: AnalysisStore, spec: LinearSpec, rank: int, form: Form) -> None:
        self._store, self._spec, self._rank = store, spec, rank
        self._form: Form = form
        self._waiting: dict[str, torch.Tensor] = {}  # of one reading, until each was taken

    def take(self, key: str) -> torch.Tensor:
        if key not in self._waiting:
            left, right = self._store.factors(self._spec, self._rank)
            self._waiting = stored_tensors(left, right, self._form)
        return self._waiting.pop(key)


def check_plan(loaded: LoadedModel, store: AnalysisStore, plan: RankPlan) -> None:
    """Raise InputError where `plan` was not made from `store`, or `store` from another model than `loaded`.

    StoreError where its factors do not reach as far as the plan's form.
    """
    if plan.analysis != store.digest:
        raise InputError(f"The plan was not made from the store {store.path}; make one with: unirank plan.")
    store.require_form(plan.form)
    check_model(loaded, store)


def settle(loaded: LoadedModel, plan: RankPlan, model_before: int) -> TruncateReport:
    """Finish a model whose linears were replaced by `plan`: align it, configure it, and recount it.

    Raises UnirankError when the recount from the modules differs from the plan.
    """
    model = loaded.model
    align_weights(model)
    low_rank: Mapping[str, int] = {name: int(rank) for name, rank in plan.ranks.items() if rank != DENSE}
    biased = [name for name in low_rank if has_added_bias(model, name)]
    if low_rank:
        keep_apart(model)
        model.config.quantization_config = UniRankConfig(ranks=low_rank, biased=biased, form=plan.form)
    targets_after = sum(count_of_target(model, spec.name) for spec in loaded.linears)
    if targets_after != plan.used:
        raise UnirankError(f"The modules hold {targets_after} target parameters, the plan says {plan.used}.")
    return TruncateReport(
        sum(spec.params for spec in loaded.linears),
        targets_after,
        model_before,
        count_parameters(model),
        len(low_rank),
        len(loaded.linears) - len(low_rank),
    )
