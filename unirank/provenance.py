"""What a number depends on besides its inputs: versions, device, threads."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import Any

import torch


def versions() -> dict[str, str]:
    """Versions of Python and of every package that the numbers depend on."""
    packages = ("unirank", "torch", "transformers", "safetensors", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def device_name(device: torch.device | str) -> str:
    """The GPU's name, or "cpu": results differ in rounding between kinds of device, not between two of a kind."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def default_device() -> str:
    """ "cuda" when a GPU is present, else "cpu"; of processes that torchrun started, each its own GPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"


def meta(device: torch.device | str, **more: Any) -> dict[str, Any]:
    """The `meta` object of a result file; `more` adds seeds and hashes."""
    return {
        "versions": versions(),
        "device": device_name(device),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    } | more
