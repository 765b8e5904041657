"""Back to a plain checkpoint of the original class, for tools that know nothing of low-rank layers."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unirank.compression.checkpoint import PROVENANCE_FILE, CompressedModel
from unirank.disk.files import check_output, staged_directory, write_json
from unirank.display import shows_progress, told
from unirank.errors import InputError
from unirank.models.companions import write_companions
from unirank.models.configurations import text_part
from unirank.models.file_names import join_again
from unirank.models.low_rank import LowRankLinear, weight_product
from unirank.models.low_rank_experts import LowRankExperts
from unirank.models.quantizing import floats_of, quantized_linears
from unirank.models.shards import save_model
from unirank.models.wrappers import refuse_foreign, unwrapped
from unirank.progress import Progress
from unirank.types import Paging

_WORK = torch.float32


@shows_progress
@torch.no_grad()
def densify(model: PreTrainedModel, *, pages: Paging | None = None, progress: Progress = None) -> PreTrainedModel:
    """Replace, in place, every `LowRankLinear` by a dense linear that holds the product; returns the model.

    Its size is the original's, and so is its speed; only its outputs are the compressed model's, to rounding. The
    products are computed in float32 and stored in the model's dtype. Where compression added biases (scheme `afm`,
    presets `fast` and `best`), the class must have a switch in its configuration that gives its linears biases, as
    Llama's `attention_bias` and `mlp_bias`; it is set, and linears that got no bias have one of zeros.

    Weights that are quantised become floats, those that they stand for.

    Args:
        pages: of a compressed model that was opened with `stream`: products are then made when they are read.

    Raises InputError when the model is not compressed, or its class has no place for the biases; and for a model that
    `unirank.describe` would refuse: with adapters, or with weights that are not in memory.
    """
    model = unwrapped(model)
    refuse_foreign(model, done="densified", paged=pages is not None)
    low_rank = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    stacked = {name: module for name, module in model.named_modules() if isinstance(module, LowRankExperts)}
    if not low_rank and not stacked:
        raise InputError("The model has no low-rank layers, so there is nothing to densify.")
    for name, experts in stacked.items():
        if experts.added_bias:
            raise InputError(
                f"{type(model).__name__} has no place for the biases of the experts at {name}, which the scheme or "
                "preset added; compress with a scheme that adds none, such as whiten."
            )
    biased = {name for name, module in low_rank.items() if module.output_bias is not None}
    config, skeleton = _skeleton(model, biased)
    for name, linear in quantized_linears(model).items():
        whole = name.rpartition(".")[0] not in low_rank
        conv = whole and isinstance(skeleton.get_submodule(name), Conv1D)
        model.set_submodule(name, floats_of(linear, model.dtype, conv=conv))
    for position, (name, module) in enumerate(low_rank.items(), start=1):
        model.set_submodule(name, _dense(name, module, isinstance(skeleton.get_submodule(name), Conv1D), pages))
        told(progress)("densify", position, len(low_rank) + len(stacked))
    for position, (name, experts) in enumerate(stacked.items(), start=len(low_rank) + 1):
        model.set_submodule(name, _dense_experts(name, experts, pages))
        told(progress)("densify", position, len(low_rank) + len(stacked))
    for name, expected in skeleton.named_modules():
        linear = model.get_submodule(name)
        if isinstance(expected, nn.Linear) and expected.bias is not None and linear.bias is None:
            weight = linear.weight
            assert isinstance(weight, torch.Tensor)
            device = "cpu" if weight.is_meta else weight.device
            linear.bias = nn.Parameter(torch.zeros(expected.out_features, dtype=weight.dtype, device=device))
    model.config = config
    configs = {name: getattr(module, "config", None) for name, module in skeleton.named_modules()}
    for name, module in model.named_modules():
        if isinstance(configs.get(name), PretrainedConfig):  # each part its own: a vision tower, a decoder
            setattr(module, "config", configs[name])  # noqa: B010
    join_again(model)
    return model


def save_dense(compressed: CompressedModel, out: str | Path, *, overwrite: bool = False) -> Path:
    """Write a densified model as a plain checkpoint, with how it came about in `provenance.json`.

    Raises InputError when `out` exists and is not ours, or `overwrite` is off; WriteError when the disk refuses.
    """
    out = Path(out)
    check_output(out, marker=PROVENANCE_FILE, overwrite=overwrite)
    with staged_directory(out) as folder:
        save_model(compressed.model, compressed.pages, folder)
        compressed.tokenizer.save_pretrained(folder)
        write_companions(compressed.companions, folder, compressed.tokenizer)
        write_json(folder / PROVENANCE_FILE, {"densified": True} | compressed.provenance())
    return out


def _dense(name: str, module: LowRankLinear, conv: bool, pages: Paging | None) -> nn.Module:
    bias = module.output_bias
    own_bias = f"{name}.{module.bias_name()}"
    keys = ("left.weight", "right.weight", *(["place"] if module.form == "pivoted" else []))
    linear: Any
    with torch.device("meta"):
        if conv:
            linear = Conv1D(module.out_features, module.in_features)
        else:
            linear = nn.Linear(module.in_features, module.out_features, bias=bias is not None)
    if pages is None or not module.left.weight.is_meta:
        state = module.state_dict()
        linear.weight = nn.Parameter(_product([state[key] for key in keys], conv))
    else:
        linear.weight = nn.Parameter(linear.weight.to(module.left.weight.dtype))
        pages.put(f"{name}.weight", lambda: _product([pages.tensor(f"{name}.{key}") for key in keys], conv))
        if own_bias != f"{name}.bias":
            pages.put(f"{name}.bias", lambda: pages.tensor(own_bias))
    linear.bias = bias
    return linear.train(module.training)


def _dense_experts(path: str, experts: LowRankExperts, pages: Paging | None) -> nn.Module:
    stacks = {}
    for name in experts.stacks:
        factors = experts.factors(name)
        if factors is None:
            stacks[name] = getattr(experts, name)
        elif pages is None or not factors.right.is_meta:
            stacks[name] = nn.Parameter(experts.dense_stack(name))
        else:

            def read(leaf: str, name: str = name, pages: Paging = pages) -> torch.Tensor:
                return pages.tensor(f"{path}.{name}_factors.{leaf}")

            shape = experts.dense_shape(name)
            stacks[name] = nn.Parameter(torch.empty(shape, dtype=factors.right.dtype, device="meta"))
            pages.put(f"{path}.{name}", lambda name=name, read=read: experts.dense_stack(name, read))
    return experts.dense_module(stacks)


def _product(stored: Sequence[torch.Tensor], conv: bool) -> torch.Tensor:
    left, right, *place = stored
    weight = weight_product(left.to(_WORK), right.to(_WORK), place[0] if place else None).to(left.dtype)
    return (weight.T if conv else weight).contiguous()


def _skeleton(model: PreTrainedModel, biased: set[str]) -> tuple[PretrainedConfig, nn.Module]:
    """The original class, empty, with a configuration that has a place for the biases of the linears `biased`."""
    plain = copy.deepcopy(model.config)
    plain.__dict__.pop("quantization_config", None)
    switches = [key for key, value in text_part(plain).to_dict().items() if key.endswith("bias") and value is False]
    for count in range(len(switches) + 1):
        for chosen in itertools.combinations(switches, count):
            config = copy.deepcopy(plain)
            for key in chosen:
                setattr(text_part(config), key, True)
            with torch.device("meta"):
                skeleton = type(model)(config)
            if all(getattr(skeleton.get_submodule(name), "bias", None) is not None for name in biased):
                return config, skeleton
    raise InputError(
        f"{type(model).__name__} has no place for the biases of {len(biased)} linears, such as "
        f"{min(biased)}, which the scheme or preset added; compress with a scheme that adds none, such as whiten."
    )
