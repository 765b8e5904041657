"""LoRA on the factors themselves (method 6): adapters by peft, merged inside each factor, so that ranks stay."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from unirank.errors import InputError, NonFiniteError
from unirank.models.low_rank import LowRankLinear
from unirank.models.quantizing import refuse_quantized
from unirank.models.structure import require_plain

Factor = Literal["left", "right", "dense"]


def adapted(model: nn.Module, *, dense: Iterable[str] = ()) -> dict[str, Factor]:
    """The linears that adapters go to: both factors of every `LowRankLinear`, and `dense` by name.

    Raises InputError when the model is not compressed, or is quantised.
    """
    names: dict[str, Factor] = {}
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            names |= {f"{name}.left": "left", f"{name}.right": "right"}
    if not names:
        raise InputError("The model has no low-rank layers, so there are no factors to fine-tune; compress it first.")
    require_plain(model, "trained")
    refuse_quantized(model, "trained")
    for name in dense:
        names[name] = "dense"
    return names


def attach(
    model: PreTrainedModel, names: Iterable[str], *, rank: int, alpha: float, ranks: Mapping[str, int] | None = None
) -> Any:
    """A `peft.PeftModel` with LoRA `scale B A`, `scale = alpha / rank`, on the linears `names`; all else is frozen.

    A starts random, from torch's generator, and B at 0, so that nothing changes at first.

    Args:
        rank: of the adapters.
        ranks: other ranks by name; their alpha is adapted, so that the scale is the same everywhere.

    Raises InputError when peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError:
        raise InputError(
            "Fine-tuning needs peft and datasets; install the extra: pip install 'unirank[finetune]'."
        ) from None
    ranks = dict(ranks or {})
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType] - peft's annotation says int, its arithmetic is float
        target_modules=list(names),
        rank_pattern=ranks,
        alpha_pattern={name: alpha / rank * other for name, other in ranks.items()},
        bias="none",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft asks transformers by a name that transformers 5 deprecates.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, config)


def train_only(model: nn.Module, names: Iterable[str]) -> int:
    """Let the adapters on `names`, and no others, take gradients; returns the number of their parameters."""
    suffixes = tuple(f".{name}.lora_{part}." for name in names for part in "AB")
    count = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(suffix in name for suffix in suffixes))
        count += parameter.numel() if parameter.requires_grad else 0
    return count


def merge(model: Any) -> PreTrainedModel:
    """The model with `left' = left + scale B1 A1`, `right' = right + scale B2 A2`, and no adapters.

    Each factor keeps its shape, so the rank is what it was and nothing is truncated. Raises NonFiniteError when a
    merged factor is NaN or infinity.
    """
    try:
        merged: PreTrainedModel = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise NonFiniteError(f"An adapter cannot be merged: {error}") from error
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    return merged.eval()


@torch.no_grad()
def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference of two sets of logits, over the largest absolute value of the first."""
    return float((a - b).abs().max() / a.abs().max())


def get_state(model: Any) -> dict[str, torch.Tensor]:
    """The adapters' tensors by name."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model)


def set_state(model: Any, state: Mapping[str, torch.Tensor]) -> None:
    """Put back what `get_state` gave. Raises InputError where a name has no adapter."""
    from peft import set_peft_model_state_dict

    unknown = set_peft_model_state_dict(model, dict(state)).unexpected_keys
    if unknown:
        raise InputError(f"The adapters belong to another model: this one has no {unknown[0]}.")
