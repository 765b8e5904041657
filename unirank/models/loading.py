"""Loading a causal language model and finding its targets by structure, never by the model's name."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Mapping
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from unirank.errors import InputError, NonFiniteError, UnirankError, first_line, is_out_of_memory
from unirank.experts import experts_in
from unirank.models.companions import companions_in_memory, companions_of, companions_of_processor, tokenizer_of
from unirank.models.configurations import auto_class, text_part
from unirank.models.embeddings import embedding_rows
from unirank.models.folder import RESAVE
from unirank.models.irregular import irregular_linears
from unirank.models.low_rank import LowRankLinear
from unirank.models.low_rank_experts import LowRankExperts
from unirank.models.quantizer import METHOD
from unirank.models.sources import Source, find_source, skeleton_of
from unirank.models.streamed import Pages, page_map, take_pages
from unirank.models.structure import find_linears, refuse_experts
from unirank.models.wrappers import check_target, refuse_additions, refuse_foreign, shortened, unwrapped
from unirank.types import LoadedModel, Paging


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
        InputError: unknown model, no tokenizer, no weights in safetensors, modelling code that is not trusted, an
            adapter, a compressed or quantized model, no linears in the decoder layers, a mixture of experts, no matrix
            of token embeddings.
        NonFiniteError: a weight holds NaN or infinity, in the checkpoint or after the cast to `dtype`; names it.
    """
    source = find_source(name_or_path, dtype, device, revision, trust_remote_code)
    _refuse_converted(source.config, source.name)
    companions = companions_of(source)
    model, pages = _read_paged(source) if stream else (_read(source), None)
    stored = None if dtype == "auto" else source.stored
    loaded = _describe(model, source.tokenizer, source.name, pages, stored=stored)
    return dataclasses.replace(loaded, companions=companions)


def load_pretrained(
    name_or_path: str | Path,
    *,
    dtype: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load any causal language model, dense or compressed, with its tokenizer. Arguments and errors as in `load`."""
    source = find_source(name_or_path, dtype, device, revision, trust_remote_code)
    return _read(source), source.tokenizer


def load_paged(
    name_or_path: str | Path, *, dtype: str = "auto", device: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Pages]:
    """Like `load_pretrained`, but the decoder layers stay in the checkpoint's files."""
    source = find_source(name_or_path, dtype, device, None, trust_remote_code)
    model, pages = _read_paged(source)
    return model, source.tokenizer, pages


def _method(config: Any) -> str | None:
    """How the weights of a checkpoint were quantized, by its configuration; None where they were not."""
    found = getattr(config, "quantization_config", None) or getattr(text_part(config), "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, Mapping) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method) or "unknown")


def _refuse_converted(config: Any, source: str) -> None:
    """Raise InputError where a configuration is a compressed or quantized model's."""
    method = _method(config)
    if method == METHOD:
        raise InputError(f"The model {source} is compressed already; compress the dense model it came from.")
    if method is not None:
        raise InputError(f"The model {source} is quantized ({method[:40]}); compress the unquantized one it came from.")


def _read(source: Source, **options: Any) -> PreTrainedModel:
    try:
        # Safetensors only: other weight files are pickles.
        read: Any = auto_class(source.config).from_pretrained(
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
        if is_out_of_memory(error):
            raise
        if isinstance(error, OSError) and not Path(source.path).exists() and "safetensors" in str(error):
            raise InputError(f"{source.name!r} holds no weights in safetensors; {RESAVE}.") from error
        if "ignore_mismatched_sizes" in str(error):  # transformers' own sentence is about a report that it logged
            raise InputError(
                f"Cannot load the weights of {source.name!r}: they have other shapes than its config.json says; one of "
                "the two is another model's."
            ) from error
        if options and "offload_folder" in str(error):
            raise InputError(
                f"The files of {source.name!r} hold matrices in another form than the model runs (joined, or cut) and "
                "cannot be read layer by layer; load it as a whole, without stream=True."
            ) from error
        how = " layer by layer (stream=True)" if options else ""
        raise InputError(f"Cannot load the weights of {source.name!r}{how}: {first_line(error)}.") from error
    model, found = read
    missing, unknown = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if missing:  # transformers would go on with random ones
        instead = f"; it holds others, such as {unknown[0]}" if unknown else ""
        raise InputError(f"The checkpoint {source.name!r} lacks the weights {shortened(missing)}{instead}.")
    if _method(source.config) in (None, METHOD):  # another method's tensors are its own matter
        refuse_additions(model, unknown)  # transformers would go on without them
    if not options:
        model.to(source.device)
    return model.eval()


def _read_paged(source: Source) -> tuple[PreTrainedModel, Pages]:
    skeleton = skeleton_of(source.name, source.config, bool(source.common["trust_remote_code"]))
    _check_width(skeleton)  # before the layers are looked for, as of a model that is loaded as a whole
    layers, _ = find_linears(skeleton)
    options: dict[str, Any] = {"device_map": page_map(skeleton, layers, source.device)}
    converted = None
    if any(True for _ in experts_in(skeleton)):
        # Files often have a matrix for each expert, and the model a stack of all, which has to be on the disk then.
        converted = options["offload_folder"] = tempfile.mkdtemp(prefix="unirank-")
    logger = getLogger("accelerate.big_modeling")
    level = logger.level
    logger.setLevel(ERROR)  # it warns of what is meant here: parameters on the disk
    try:
        model = _read(source, **options)
    except BaseException:
        if converted is not None:
            shutil.rmtree(converted, ignore_errors=True)
        raise
    finally:
        logger.setLevel(level)
    return model, take_pages(model, layers, source.device, converted)


def _check_width(model: PreTrainedModel) -> None:
    """Raise InputError unless the configuration tells of one text decoder with one width (Blt has three stacks)."""
    name = type(model).__name__
    try:
        width = getattr(model.config.get_text_config(), "hidden_size", None)
    except (ValueError, RuntimeError) as error:  # several text models; a value that differs by layer
        if is_out_of_memory(error):
            raise
        raise InputError(f"The configuration of {name} does not tell of one decoder: {first_line(error)}.") from error
    if not isinstance(width, int):
        raise InputError(
            f"The configuration of {name} states no hidden_size; unirank needs decoder layers of one width."
        )


def describe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    *,
    source: str = "",
    pages: Paging | None = None,
) -> LoadedModel:
    """Check a model that is already in memory (but for its `pages`) and list its targets.

    What torch.compile, DataParallel or DistributedDataParallel wraps is taken out. What cannot be taken out is refused:
    adapters that are not merged, weights that are sharded or offloaded. Raises like `load`.

    Args:
        tokenizer: or the processor of a model with towers, which holds one; it then goes into the checkpoint too.
    """
    processor = tokenizer if isinstance(tokenizer, ProcessorMixin) else None
    if isinstance(tokenizer, ProcessorMixin):
        tokenizer = tokenizer_of(tokenizer)
    loaded = _describe(unwrapped(model), tokenizer, source, pages)
    beside = companions_in_memory(loaded.model, tokenizer)
    if processor is not None:
        beside = companions_of_processor(processor, tokenizer, beside)
    return dataclasses.replace(loaded, companions=beside)


def _describe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    pages: Paging | None,
    *,
    stored: str | None = None,
) -> LoadedModel:
    """As `describe`; `stored` is the dtype in the checkpoint, where another one was asked for."""
    model.eval()
    refuse_experts(model, model.config)
    if any(isinstance(module, LowRankLinear | LowRankExperts) for module in model.modules()):
        raise InputError(f"The model {source} is compressed already; compress the dense model it came from.")
    _refuse_converted(model.config, source)
    refuse_foreign(model, paged=pages is not None)
    if model.main_input_name != "input_ids":
        raise InputError(
            f"{type(model).__name__} reads {model.main_input_name}, not token ids; unirank needs input_ids."
        )
    _check_width(model)
    layers, linears = find_linears(model)
    if idle := irregular_linears(model, layers, linears):
        layers, linears = find_linears(model, idle=idle)
    for spec in linears:
        check_target(model, spec)
    embedding_rows(model)  # which tokens have one is asked of the texts: a tokenizer may have more than occur
    loaded = LoadedModel(model, tokenizer, layers, linears, source or str(model.config.name_or_path), pages)
    for name, tensor in loaded.state():
        # A sum is one pass without a mask in memory; it is finite unless an entry is not (or it overflows: look then).
        if tensor.is_floating_point() and not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise NonFiniteError(_non_finite(name, tensor, stored))
    return loaded


def _non_finite(name: str, tensor: torch.Tensor, stored: str | None) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if stored not in (None, dtype) and not tensor.isnan().any():
        most = torch.finfo(tensor.dtype).max
        return (
            f"The weight {name} does not fit into {dtype}, which ends at {most:g}; the checkpoint's own is wider, so "
            "load it with another dtype=, such as auto or bfloat16."
        )
    return f"The weight {name} holds NaN or infinity; the checkpoint is damaged."
