"""What the file of one analysed layer holds: tensors of every linear, and a header with cosines, damping and shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from unirank.disk.strictjson import entry, number
from unirank.types import BLOCK, CosineStat, ExpertSpec, Factors, LinearSpec, ListedSpec, sublayers_of

_OPTIONAL = ("mean", "curvature", "slope")


def contents(
    layer: int, factors: Mapping[str, Factors], cosines: Mapping[str, CosineStat], shares: Mapping[str, float] | None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the header of the file; arguments as of `AnalysisStore.write_layer`."""
    tensors = {}
    for name, factor in factors.items():
        tensors |= {f"{name}.energy": factor.energy, f"{name}.left": factor.left, f"{name}.right": factor.right}
        for key in _OPTIONAL:
            if (tensor := getattr(factor, key)) is not None:
                # Linears that read one input share its mean, and safetensors refuses shared memory.
                tensors[f"{name}.{key}"] = tensor.clone()
    header: dict[str, Any] = {
        "layer": layer,
        "cosines": {key: asdict(stat) for key, stat in cosines.items()},
        "damping": {name: factor.damping for name, factor in factors.items()},
    }
    if shares:
        header["shares"] = dict(shares)
    return tensors, header


def cosines_in(header: Mapping[str, Any], members: Sequence[LinearSpec]) -> dict[str, CosineStat]:
    """By sublayer of the layer's linears, and of the block. Raises Damaged for what is not there or not legal."""
    stats = entry(header, "cosines", dict)
    return {key: CosineStat.from_dict(entry(stats, key, dict)) for key in (*sublayers_of(members), BLOCK)}


def shares_in(header: Mapping[str, Any], members: Sequence[LinearSpec]) -> dict[str, float]:
    """Of every expert's matrix, and of every listed linear that has one. Raises Damaged like `cosines_in`."""
    told = entry(header, "shares", dict) if "shares" in header else {}
    return {
        spec.name: number(told.get(spec.name), f"the share of {spec.name}")
        for spec in members
        if isinstance(spec, ExpertSpec) or (isinstance(spec, ListedSpec) and spec.name in told)
    }


def damping_in(header: Mapping[str, Any]) -> dict[str, float]:
    """Of every linear. Raises Damaged like `cosines_in`."""
    return {name: number(eps, name) for name, eps in entry(header, "damping", dict).items()}
