"""Loading a causal language model and finding its targets by structure, never by the model's name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from unirank import embedded
from unirank.errors import InputError, NonFiniteError, UnirankError
from unirank.files import sha256_tensors, sha256_text
from unirank.modules import LowRankLinear
from unirank.pages import Pages, page_map, take_pages
from unirank.provenance import default_device
from unirank.strictjson import parse_object
from unirank.types import SUBLAYERS, LinearSpec, LoadedModel, Paging

_DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Config keys by which transformers' mixture-of-experts models give their number of experts.
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


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
            model, a tokenizer with more tokens than the model has embeddings.
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
            f"on the hub ({_first_line(error)})."
        ) from error
    except Exception as error:  # what transformers raises for a damaged config is anybody's guess
        raise InputError(f"The config or tokenizer of {name!r} is damaged: {_first_line(error)}.") from error
    _refuse_experts(config)
    return _Source(name, path, config, tokenizer, _DTYPES[dtype], target, common)


def _check_index(folder: Path) -> None:
    """Refuse a local checkpoint whose index names files outside its directory."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        places = set(parse_object(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index} is damaged: {error}.") from error
    for place in places:
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
        raise InputError(f"Cannot load the weights of {source.name!r}: {_first_line(error)}.") from error
    model, found = read
    if missing := sorted(found["missing_keys"]):  # transformers would go on with random ones
        raise InputError(f"The checkpoint {source.name!r} lacks the weights {', '.join(missing)}.")
    if not options:
        model.to(source.device)
    return model.eval()


def _read_paged(source: _Source) -> tuple[PreTrainedModel, Pages]:
    code = bool(source.common["trust_remote_code"])
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(source.config, trust_remote_code=code)
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
        raise InputError(f"The device {name!r} cannot be used here: {_first_line(error)}.") from error
    return device


def embedding_rows(model: PreTrainedModel) -> int:
    """How many tokens the model has embeddings for."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0]


def describe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: str = "",
    pages: Paging | None = None,
) -> LoadedModel:
    """Check a model that is already in memory (but for its `pages`) and list its targets. Raises like `load`."""
    model.eval()
    _refuse_experts(model.config)
    if any(isinstance(module, LowRankLinear) for module in model.modules()):
        raise InputError(f"The model {source} is compressed already; compress the dense model it came from.")
    if getattr(model.config, "quantization_config", None) is not None:
        raise InputError(f"The model {source} is quantized; compress the unquantized one it came from.")
    layers, linears = find_linears(model)
    rows = embedding_rows(model)
    if len(tokenizer) > rows:
        raise InputError(
            f"The tokenizer does not fit the model: it has {len(tokenizer)} tokens and the model {rows} embeddings."
        )
    loaded = LoadedModel(model, tokenizer, layers, linears, source or str(model.config.name_or_path), pages)
    for name, tensor in loaded.state():
        # A sum is one pass without a mask in memory; it is finite unless an entry is not (or it overflows: look then).
        if tensor.is_floating_point() and not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise NonFiniteError(f"The weight {name} holds NaN or infinity; the checkpoint is damaged.")
    return loaded


def find_linears(model: nn.Module) -> tuple[str, tuple[LinearSpec, ...]]:
    """Path of the decoder's layer list, and every linear inside its layers, by structure.

    The layers are the outermost ModuleList with the most linear weights. Inside a layer, the linears fall into two
    groups by the child module that holds them (linears that hang on the layer itself form a group of their own, as
    in OPT); the first group is the attention sublayer, the second the MLP. Calibration checks that they run in that
    order.

    Raises InputError when there is no such list, when a layer has other than two groups, or when it holds experts.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not (best and path.startswith(best[1] + ".")):
            size = sum(linear.weight.numel() for _, linear in _linears_in(module))
            if size and (best is None or size > best[0]):
                best = (size, path, module)
    if best is None:
        raise InputError(
            f"{type(model).__name__} has no decoder layers with linear maps (nn.Linear or Conv1D), "
            "so there is nothing to compress."
        )
    _, layers_path, layers = best
    specs: list[LinearSpec] = []
    for index, layer in enumerate(layers):
        specs.extend(_linears_of_layer(f"{layers_path}.{index}", index, layer))
    return layers_path, tuple(specs)


def _linears_of_layer(path: str, index: int, layer: nn.Module) -> Iterator[LinearSpec]:
    for name, parameter in layer.named_parameters():
        if parameter.dim() == 3:
            raise InputError(
                f"Mixture-of-experts models are not supported: {path}.{name} stacks {parameter.shape[0]} experts."
            )
    for name, module in layer.named_modules():
        if isinstance(module, nn.ModuleList) and any(True for _ in _linears_in(module)):
            raise InputError(f"Mixture-of-experts models are not supported: {path}.{name} is a list of sub-networks.")
    groups: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, linear in _linears_in(layer):
        groups.setdefault(name.split(".")[0] if "." in name else "", []).append((name, linear))
    if len(groups) != len(SUBLAYERS):
        found = ", ".join(repr(group or "the layer itself") for group in groups) or "none"
        raise InputError(
            f"{path} must hold its linears in two groups, attention and MLP; found {len(groups)}: {found}."
        )
    for sublayer, members in zip(SUBLAYERS, groups.values(), strict=True):
        for name, linear in members:
            m, n = weight_of(linear).shape
            yield LinearSpec(f"{path}.{name}", index, sublayer, name, m, n)


def _linears_in(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear | Conv1D):
            yield name, child


def weight_of(linear: nn.Module) -> torch.Tensor:
    """The weight as `[M, N]`, whichever way the module stores it (GPT-2's Conv1D keeps the transpose)."""
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    return weight.T if isinstance(linear, Conv1D) else weight


def weights_hash(loaded: LoadedModel) -> str:
    """SHA-256 over every tensor of the model, in name order: the identity of what was analysed."""
    return sha256_tensors(loaded.state(by_name=True))


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over the vocabulary and the special tokens."""
    vocabulary = "\n".join(f"{index} {token!r}" for token, index in sorted(tokenizer.get_vocab().items()))
    return sha256_text(f"{vocabulary}\n{tokenizer.special_tokens_map}")


def _refuse_experts(config: Any) -> None:
    text = config.get_text_config()
    for key in _EXPERT_KEYS:
        count = getattr(text, key, None)
        if isinstance(count, int) and count > 1:
            raise InputError(
                f"Mixture-of-experts models are not supported: {text.model_type} has {key} = {count}; "
                "unirank compresses dense decoders."
            )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
