"""A compressed checkpoint that another tool saved again: what its config.json and its class say of ranks and sizes.

`save_pretrained` of transformers and peft keeps the ranks, by which the model is built, and nothing else of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from unirank.compression.card import PLAN_FILE, UNKNOWN
from unirank.compression.quantize_report import QuantizeReport
from unirank.compression.truncation import TruncateReport
from unirank.errors import InputError
from unirank.models.folder import ADAPTER, CONFIG, adapter_message
from unirank.models.low_rank import count_parameters
from unirank.models.places import places_of
from unirank.models.quantizer import METHOD, UniRankConfig
from unirank.models.quantizing import put_empty
from unirank.models.sources import read_config, skeleton_of
from unirank.models.structure import find_linears
from unirank.models.targets import count_of_target, make_all_low_rank
from unirank.rank_plan import RankPlan
from unirank.types import DENSE, Rank


def read_resaved(
    path: Path, plan: RankPlan | None = None, *, trust_remote_code: bool = False
) -> tuple[RankPlan, TruncateReport, QuantizeReport | None]:
    """The plan and the sizes of a checkpoint that lacks one of our records. No weight is read.

    Args:
        plan: where it is there; otherwise the budget is what the ranks cost, scheme and allocator are "unknown".

    Raises InputError when config.json names no low-rank layers, names what its class does not have, or says something
    else than `plan`.
    """
    if (path / ADAPTER).is_file():
        raise InputError(adapter_message(str(path), alone=not (path / CONFIG).is_file()))
    told, config = None, None
    if (path / CONFIG).is_file():
        config = read_config(str(path), str(path), {"revision": None, "trust_remote_code": trust_remote_code})
        told = getattr(config, "quantization_config", None)
    named = UniRankConfig(**told) if isinstance(told, Mapping) and told.get("quant_method") == METHOD else None
    if named is None or not named.ranks:
        raise InputError(
            f"{path} is not a compressed checkpoint: it has no {PLAN_FILE}, and no config.json that names low-rank "
            "layers; make one with: unirank compress."
        )
    model = skeleton_of(str(path), config, trust_remote_code)
    _, linears = find_linears(model)
    before = count_parameters(model)
    named.rename(places_of(model, named.names))
    make_all_low_rank(model, named.ranks, biased=named.biased, form=named.form)
    ranks: dict[str, Rank] = {spec.name: named.ranks.get(spec.name, DENSE) for spec in linears}
    used = sum(spec.rank_cost(ranks[spec.name], named.form) for spec in linears)
    total = sum(spec.params for spec in linears)
    if used != sum(count_of_target(model, name) for name in ranks) or not named.ranks.keys() <= ranks.keys():
        raise InputError(
            f"The ranks in {path / CONFIG} are none of unirank's: one costs more than the dense matrix, or is "
            "of a linear outside the decoder layers."
        )
    shapes = {spec.name: (spec.m, spec.n) for spec in linears}
    found = RankPlan(ranks, shapes, 1 - used / total, used, used, None, UNKNOWN, UNKNOWN, form=named.form)
    if plan is not None:
        _check_agreement(path, plan.renamed(places_of(model, plan.ranks)), found)
    low = len(named.ranks)
    report = TruncateReport(total, used, before, count_parameters(model), low, len(linears) - low)
    quantized = None
    if named.bits is not None:
        put_empty(model, named.names, named.bits, named.group_size)
        quantized = QuantizeReport.of(model, named.bits, named.group_size)
    return plan or found, report, quantized


def _check_agreement(path: Path, plan: RankPlan, resaved: RankPlan) -> None:
    for name, rank in resaved.ranks.items():
        if plan.ranks.get(name) != rank or plan.form != resaved.form:
            raise InputError(
                f"{path / PLAN_FILE} does not belong to the weights beside it: {name} has rank {plan.ranks.get(name)} "
                f"({plan.form}) there, and {rank} ({resaved.form}) in config.json; delete {PLAN_FILE} to go by "
                "config.json."
            )
