"""Loading a causal language model and finding its targets by structure, never by the model's name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from unirank.disk.strictjson import Damaged, entry, read_object
from unirank.errors import InputError, NonFiniteError, UnirankError, first_line
from unirank.models import embedded
from unirank.models.embeddings import embedding_rows
from unirank.models.low_rank import LowRankLinear
from unirank.models.streamed import Pages, page_map, take_pages
from unirank.models.structure import find_linears, refuse_experts, stated_experts
from unirank.provenance import default_device
from unirank.types import LoadedModel, Paging

_DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    name_or_path: str | Path,
    *,
    dtype: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    stream: bool = False,
) -> LoadedModel:
    """Load a model and its tokenizer, check them, and list the targets.

    Args:
        name_or_path: a local directory, a hub name, or "smollm2-135m" (the embedded default).
        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
        device: a torch device; None takes the GPU when there is one.
        revision: hub revision; None is the default branch.
        trust_remote_code: run modelling code that the checkpoint brings; off unless asked for.
        stream: leave the decoder layers in the checkpoint's files, for models larger than memory. `analyze`,
            `truncate` and `CompressedModel.save` then read one at a time; what runs the whole model refuses.

    Raises:
        InputError: unknown model, no tokenizer, no linears in the decoder layers, a mixture of experts, a compressed
            model, no matrix of token embeddings.
        NonFiniteError: a weight holds NaN or infinity; names it.
    """
    source = _find(name_or_path, dtype, device, revision, trust_remote_code)
    model, pages = _read_paged(source) if stream else (_read(source), None)
    return describe(model, source.tokenizer, source=source.name, pages=pages)


def load_pretrained(
    name_or_path: str | Path,
    *,
    dtype: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load any causal language model, dense or compressed, with its tokenizer. Arguments and errors as in `load`."""
    source = _find(name_or_path, dtype, device, revision, trust_remote_code)
    return _read(source), source.tokenizer


def load_paged(
    name_or_path: str | Path, *, dtype: str = "auto", device: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Pages]:
    """Like `load_pretrained`, but the decoder layers stay in the checkpoint's files."""
    source = _find(name_or_path, dtype, device, None, False)
    model, pages = _read_paged(source)
    return model, source.tokenizer, pages


@dataclass(frozen=True)
class _Source:
    """A checkpoint that was found, before its weights are read."""

    name: str  # as the user gave it
    path: str
    config: Any
    tokenizer: PreTrainedTokenizerBase
    dtype: Any
    device: torch.device
    common: Mapping[str, Any]


def _find(
    name_or_path: str | Path, dtype: str, device: str | None, revision: str | None, trust_remote_code: bool
) -> _Source:
    if dtype not in _DTYPES:
        raise InputError(f"dtype = {dtype!r} is not legal; legal values: {', '.join(_DTYPES)}.")
    target = _usable_device(device or default_device())
    name = str(name_or_path)
    path = str(embedded.embedded_model()) if name == embedded.NAME else name
    common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if not path:
        raise InputError("The model's name is empty; give a directory, a hub name, or smollm2-135m.")
    if path.startswith(("/", "./", "../", "~")) and not Path(path).is_dir():
        raise InputError(f"The model directory {path} does not exist.")
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise InputError(f"The model directory {path} holds no config.json, so it is not a Hugging Face checkpoint.")
    _check_index(Path(path))
    try:
        config = AutoConfig.from_pretrained(path, **common)
        tokenizer = AutoTokenizer.from_pretrained(path, **common)
    except (OSError, ValueError) as error:
        raise InputError(
            f"Cannot load the model {name!r}: it is neither a local directory with a checkpoint nor reachable "
            f"on the hub ({first_line(error)})."
        ) from error
    except Exception as error:  # what transformers raises for a damaged config is anybody's guess
        raise InputError(f"The config or tokenizer of {name!r} is damaged: {first_line(error)}.") from error
    if stated_experts(config) is not None:  # tens of gigabytes that need not be read
        refuse_experts(_skeleton(name, config, trust_remote_code), config)
    return _Source(name, path, config, tokenizer, _DTYPES[dtype], target, common)


def _check_index(folder: Path) -> None:
    """Refuse a local checkpoint whose index names files outside its directory."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        places = entry(read_object(index), "weight_map", dict)
    except Damaged as error:
        raise InputError(f"{index} is damaged: {error}.") from error
    for place in places.values():
        if not isinstance(place, str) or Path(place).name != place:
            raise InputError(f"{index} names {place!r}, which is no file of its directory.")


def _read(source: _Source, **options: Any) -> PreTrainedModel:
    try:
        # Safetensors only: other weight files are pickles.
        read: Any = AutoModelForCausalLM.from_pretrained(
            source.path,
            config=source.config,
            dtype=source.dtype,
            use_safetensors=True,
            output_loading_info=True,
            **source.common,
            **options,
        )
    except UnirankError:
        raise
    except Exception as error:  # OSError, SafetensorError, or anything that a config made transformers do
        how = " layer by layer (stream=True)" if options else ""
        raise InputError(f"Cannot load the weights of {source.name!r}{how}: {first_line(error)}.") from error
    model, found = read
    if missing := sorted(found["missing_keys"]):  # transformers would go on with random ones
        raise InputError(f"The checkpoint {source.name!r} lacks the weights {', '.join(missing)}.")
    if not options:
        model.to(source.device)
    return model.eval()


def _skeleton(name: str, config: Any, trust_remote_code: bool) -> PreTrainedModel:
    """The model of a configuration, without memory for its weights."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a config makes transformers, or a checkpoint's own code, do
        raise InputError(
            f"transformers cannot build the causal language model {name!r}: {first_line(error)}."
        ) from error


def _read_paged(source: _Source) -> tuple[PreTrainedModel, Pages]:
    skeleton = _skeleton(source.name, source.config, bool(source.common["trust_remote_code"]))
    layers, _ = find_linears(skeleton)
    logger = getLogger("accelerate.big_modeling")
    level = logger.level
    logger.setLevel(ERROR)  # it warns of what is meant here: parameters on the disk
    try:
        model = _read(source, device_map=page_map(skeleton, layers, source.device))
    finally:
        logger.setLevel(level)
    return model, take_pages(model, layers, source.device)


def _usable_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises the latter where it was built without the backend
        raise InputError(f"The device {name!r} cannot be used here: {first_line(error)}.") from error
    return device


def _check_width(model: PreTrainedModel) -> None:
    """Raise InputError unless the configuration tells of one text decoder with one width (Blt has three stacks)."""
    name = type(model).__name__
    try:
        width = getattr(model.config.get_text_config(), "hidden_size", None)
    except (ValueError, RuntimeError) as error:  # several text models; a value that differs by layer
        raise InputError(f"The configuration of {name} does not tell of one decoder: {first_line(error)}.") from error
    if not isinstance(width, int):
        raise InputError(
            f"The configuration of {name} states no hidden_size; unirank needs decoder layers of one width."
        )


def describe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: str = "",
    pages: Paging | None = None,
) -> LoadedModel:
    """Check a model that is already in memory (but for its `pages`) and list its targets. Raises like `load`."""
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"A causal language model of transformers is needed, got {type(model).__name__}.")
    model.eval()
    refuse_experts(model, model.config)
    if any(isinstance(module, LowRankLinear) for module in model.modules()):
        raise InputError(f"The model {source} is compressed already; compress the dense model it came from.")
    if getattr(model.config, "quantization_config", None) is not None:
        raise InputError(f"The model {source} is quantized; compress the unquantized one it came from.")
    if model.main_input_name != "input_ids":
        raise InputError(
            f"{type(model).__name__} reads {model.main_input_name}, not token ids; unirank needs input_ids."
        )
    _check_width(model)
    layers, linears = find_linears(model)
    embedding_rows(model)  # which tokens have one is asked of the texts: a tokenizer may have more than occur
    loaded = LoadedModel(model, tokenizer, layers, linears, source or str(model.config.name_or_path), pages)
    for name, tensor in loaded.state():
        # A sum is one pass without a mask in memory; it is finite unless an entry is not (or it overflows: look then).
        if tensor.is_floating_point() and not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise NonFiniteError(f"The weight {name} holds NaN or infinity; the checkpoint is damaged.")
    return loaded
