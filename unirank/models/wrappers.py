"""What others put around a model or into it: taken off where nothing is lost by that, refused with the way out else."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unirank.errors import InputError
from unirank.models.structure import require_plain
from unirank.types import ExpertSpec, LinearSpec

# The child by which a wrapper holds what it wraps, and who wraps so. Its name would stand in every name of a weight.
_WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "torch's checkpoint_wrapper",
}
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def unwrapped(model: object) -> PreTrainedModel:
    """The model of transformers inside torch.compile, DataParallel and DistributedDataParallel, in any order.

    They hold the model as it is, so that what is done to it shows through them.

    Raises InputError for what is no such model, and tells where there is one inside.
    """
    while not isinstance(model, PreTrainedModel):
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif isinstance(model, nn.Module) and "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]
        else:
            raise InputError(_no_model(model))
    return model


def _no_model(model: object) -> str:
    name = type(model).__name__
    if isinstance(model, _peft("peft", "PeftModel", "PeftMixedModel")):
        return (
            f"The model is a {name}, whose adapters are not merged; merge them with model.merge_and_unload(), and give "
            "what that returns."
        )
    children = dict(model.named_children()) if isinstance(model, nn.Module) else {}
    if "_fsdp_wrapped_module" in children:
        return _sharded(f"The model is a {name}")
    inside = [child for child, module in children.items() if isinstance(module, PreTrainedModel)]
    if not inside and isinstance(getattr(model, "model", None), PreTrainedModel):  # a Trainer, a pipeline, our records
        inside = ["model"]
    more = f"; its part {inside[0]} is one: give that" if inside else ""
    return f"A causal language model of transformers is needed, got {name}{more}."


def _sharded(what: str) -> str:
    return (
        f"{what}: its weights are spread over several processes. Save the whole model, and give the directory instead."
    )


def _peft(module: str, *names: str) -> tuple[type, ...]:
    """Classes of peft by name. None where nobody imported peft: then no object is of it."""
    found = sys.modules.get(module)
    return tuple(getattr(found, name) for name in names if hasattr(found, name))


def runnable(model: object) -> PreTrainedModel:
    """What runs as a model of transformers: itself, also compiled or with adapters; else what `unwrapped` finds."""
    runs: Any = model
    return runs if isinstance(model, nn.Module) and hasattr(model, "config") else unwrapped(model)


def require_in_memory(model: nn.Module, instead: str) -> None:
    """Raise InputError where a weight of `model` is not in memory; `instead` is the sentence on what to give."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise InputError(f"{name} is not in memory: it was offloaded, or never loaded. {instead}.")


def refuse_foreign(model: PreTrainedModel, *, done: str = "compressed", paged: bool = False) -> None:
    """Raise InputError where the model holds what a checkpoint of its class cannot, or does not hold its weights.

    Unmerged adapters; parts that are compiled or wrapped; weights that are spread over processes, are not in memory, or
    are in a dtype of another library. Before any work, for the error would come after all of it, if at all.

    Args:
        done: what is to be done with the model, as in "the model must be compressed before".
        paged: weights that are not in memory are read when they are needed.
    """
    if "_original_forward" in vars(model):
        raise InputError(
            "The model's forward is one of accelerate's, for mixed precision; give "
            "accelerator.unwrap_model(model, keep_fp32_wrapper=False) instead."
        )
    for name, module in model.named_modules():
        if isinstance(module, _peft("peft.tuners.tuners_utils", "BaseTunerLayer") + _adapted_otherwise()):
            raise InputError(
                f"The model has adapters that are not merged, such as at {name}; merge them into its weights with "
                "peft.PeftModel.from_pretrained(BASE, ADAPTER).merge_and_unload(), and give what that returns."
            )
        for child, who in _WRAPPERS.items():
            if child in module._modules:
                raise InputError(
                    f"The model's part {name} is wrapped by {who}, so that its weights have other names; the model "
                    f"must be {done} before that, or its checkpoint be given by name."
                )
        if name and module._compiled_call_impl is not None:
            raise InputError(
                f"The model's part {name} is compiled, where nothing can be observed inside of it; the model must be "
                f"{done} before that, or its checkpoint be given by name."
            )
    for name, weight in model.named_parameters():
        if type(weight).__name__ == "DTensor" or hasattr(weight, "ds_id"):  # FSDP2, tensor parallel; DeepSpeed's ZeRO-3
            raise InputError(_sharded(f"The weight {name} is sharded"))
    require_plain(model, done)
    if not paged:
        more = "instead of the model, with stream=True where it is larger than memory"
        require_in_memory(model, f"Give the checkpoint's name or directory {more}")


def _adapted_otherwise() -> tuple[type, ...]:
    """Modules of peft that hold a trained copy (modules_to_save, token embeddings) beside the original."""
    return _peft("peft.utils.other", "AuxiliaryTrainingWrapper", "ModulesToSaveWrapper")


def shortened(names: Sequence[str], most: int = 3) -> str:
    """Names for a message: the first ones, and how many more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def refuse_additions(model: nn.Module, unknown: Iterable[str]) -> None:
    """Raise InputError where a file holds more of a linear than its weight and bias: an adapter's, a quantiser's.

    Args:
        unknown: names of the tensors in the files that `model` has no place for.
    """
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    for key in unknown:
        place, _, rest = key.partition(".")
        while rest and place not in linears:
            step, _, rest = rest.partition(".")
            place = f"{place}.{step}"
        if rest not in ("", "bias"):
            raise InputError(
                f"The checkpoint holds {key}, which {place} has no place for: an adapter that is not merged, or a "
                "quantized weight's; merge it, or take the plain model."
            )


def check_linear(name: str, linear: nn.Module) -> None:
    """Raise InputError where a target is more than a weight matrix and a bias, which is all that is compressed of it.

    Adapters of other libraries, parametrizations and pruning hang on linears. Or its weight is no float of 16 bits up.
    """
    own = [child for child, module in linear.named_children() if any(True for _ in module.parameters())]
    own += [leaf for leaf, _ in linear.named_parameters(recurse=False) if leaf not in ("weight", "bias")]
    if own:
        raise InputError(
            f"{name} is a {type(linear).__name__} that also holds {', '.join(own)}; unirank compresses linears of a "
            "weight and a bias, so merge or remove what was added to it first."
        )
    weight: Any = linear.weight
    _check_dtype(name, weight.dtype)


def check_target(model: nn.Module, spec: LinearSpec) -> None:
    """Raise InputError where a linear is none that `check_linear` passes, or a weight no float of 16 bits up."""
    if isinstance(spec, ExpertSpec):
        _check_dtype(spec.name, spec.stored_in(model).dtype)
    else:
        check_linear(spec.name, model.get_submodule(spec.name))


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in _DTYPES:
        legal = ", ".join(str(legal).removeprefix("torch.") for legal in _DTYPES)
        raise InputError(
            f"The weight of {name} is {str(dtype).removeprefix('torch.')}, and {legal} can be compressed; load the "
            "model in one of them."
        )
