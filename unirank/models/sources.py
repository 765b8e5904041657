"""A checkpoint that is found and looked at, before its weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.peft_utils import find_adapter_config_file

from unirank.errors import InputError, first_line, is_out_of_memory
from unirank.models import embedded
from unirank.models.configurations import auto_class, text_part
from unirank.models.folder import adapter_message, check_folder
from unirank.models.structure import refuse_experts, stated_experts
from unirank.provenance import default_device

_DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Source:
    """A checkpoint that was found, before its weights are read."""

    name: str  # as the user gave it
    path: str
    config: Any
    tokenizer: PreTrainedTokenizerBase
    dtype: Any
    device: torch.device
    common: Mapping[str, Any]

    @property
    def stored(self) -> str:
        """The dtype that the checkpoint says its weights have; without a word they are float32."""
        return str(getattr(self.config, "dtype", None) or "float32").removeprefix("torch.")


def find_source(
    name_or_path: str | Path, dtype: str, device: str | None, revision: str | None, trust_remote_code: bool
) -> Source:
    """Find the checkpoint, and read its configuration and tokenizer. Arguments and InputErrors as in `unirank.load`."""
    if dtype not in _DTYPES:
        raise InputError(f"dtype = {dtype!r} is not legal; legal values: {', '.join(_DTYPES)}.")
    target = _usable_device(device or default_device())
    name = str(name_or_path)
    path = str(embedded.embedded_model()) if name == embedded.NAME else name
    common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if not path:
        raise InputError("The model's name is empty; give a directory, a hub name, or smollm2-135m.")
    if path.startswith(("/", "./", "../", "~")) and not Path(path).exists():
        raise InputError(f"The model directory {path} does not exist.")
    if local := Path(path).exists():
        check_folder(Path(path))
    config = read_config(name, path, common)
    if not local and _is_adapter(path, revision):
        raise InputError(adapter_message(name, alone=False))
    tokenizer = _read_tokenizer(name, path, common)
    if stated_experts(config) is not None:  # tens of gigabytes that need not be read
        refuse_experts(skeleton_of(name, config, trust_remote_code), config)
    return Source(name, path, config, tokenizer, _DTYPES[dtype], target, common)


def read_config(name: str, path: str, common: Mapping[str, Any]) -> Any:
    """The configuration of a causal language model, whose code is there or trusted. InputErrors as in `unirank.load`.

    Args:
        name: what errors call it.
        common: `revision` and `trust_remote_code`.
    """
    try:
        config = AutoConfig.from_pretrained(path, **common)
    except (OSError, ValueError) as error:
        _refuse_code(name, error, common)
        if Path(path).exists():
            raise InputError(f"The config.json of {name!r} cannot be read: {first_line(error)}.") from error
        if _is_adapter(path, common["revision"]):
            raise InputError(adapter_message(name, alone=True)) from error
        raise InputError(
            f"Cannot load the model {name!r}: it is neither a local directory with a checkpoint nor reachable "
            f"on the hub ({first_line(error)})."
        ) from error
    except Exception as error:  # what transformers raises for a damaged config is anybody's guess
        if is_out_of_memory(error):
            raise
        raise InputError(f"The config.json of {name!r} is damaged: {first_line(error)}.") from error
    opens = auto_class(config)
    kind = config.model_type or type(config).__name__
    if opens is None:
        raise InputError(
            f"{name!r} is of type {kind}, of which transformers has no causal language model (AutoModelForCausalLM, or "
            "AutoModelForImageTextToText with towers beside it), and that is what unirank compresses; where it holds a "
            "text decoder, save that by itself, and give it."
        )
    if type(config) not in opens._model_mapping and not common["trust_remote_code"]:
        raise InputError(_untrusted(name))
    if opens is not AutoModelForCausalLM and (config.is_encoder_decoder or text_part(config).is_encoder_decoder):
        raise InputError(
            f"{name!r} is of type {kind}, which writes text by an encoder and a decoder; unirank compresses decoders "
            "that read the text themselves."
        )
    return config


def _read_tokenizer(name: str, path: str, common: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(path, **common)
    except Exception as error:  # what a damaged or missing file, or a missing library, makes it raise
        if is_out_of_memory(error):
            raise
        _refuse_code(name, error, common)
        raise InputError(
            f"The model {name!r} has no tokenizer that can be read ({first_line(error)}); put the tokenizer's files of "
            "the model it comes from beside its config.json: AutoTokenizer.from_pretrained(THAT).save_pretrained(THIS)."
        ) from error


def _refuse_code(name: str, error: Exception, common: Mapping[str, Any]) -> None:
    """Raise InputError where transformers stopped at code that it was not asked to run."""
    if not common["trust_remote_code"] and isinstance(error, ValueError) and "trust_remote_code" in str(error):
        raise InputError(_untrusted(name)) from error


def _untrusted(name: str) -> str:
    return (
        f"{name!r} brings code of its own (trust_remote_code), which is not run unless that is asked for; read it, and "
        "pass trust_remote_code=True where you trust it."
    )


def _is_adapter(path: str, revision: str | None) -> bool:
    """Whether the hub's repository holds an adapter, which transformers would add to the model unseen."""
    try:
        return find_adapter_config_file(path, revision=revision) is not None
    except (OSError, ValueError):  # no such repository; whoever reads the configuration says so
        return False


def skeleton_of(name: str, config: Any, trust_remote_code: bool) -> PreTrainedModel:
    """The model of a configuration, without memory for its weights."""
    try:
        with torch.device("meta"):
            return auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a config makes transformers, or a checkpoint's own code, do
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"transformers cannot build the causal language model {name!r}: {first_line(error)}."
        ) from error


def _usable_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises the latter where it was built without the backend
        if is_out_of_memory(error):  # a GPU that others fill has no room for us to begin
            raise
        raise InputError(f"The device {name!r} cannot be used here: {first_line(error)}.") from error
    return device
