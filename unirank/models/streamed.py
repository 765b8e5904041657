"""Models larger than memory: decoder layers stay in the checkpoint's files, and are in memory one at a time."""

from __future__ import annotations

import ctypes
import os
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, remove_hook_from_module
from torch import nn
from transformers import PreTrainedModel


class Pages:
    """What the meta tensors of a model's decoder layers stand for, by name.

    A tensor is read when it is asked for, and forgotten by this object at once.
    """

    def __init__(
        self, layers: str, weights: Mapping[str, torch.Tensor], device: torch.device, folder: str | None = None
    ) -> None:
        """`folder` is a temporary one of some of the weights, which is deleted with this object."""
        self._layers, self._weights, self._device = layers, weights, device
        if folder is not None:
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._makers: dict[str, Callable[[], torch.Tensor]] = {}

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor `name`, in memory of its own on the model's device."""
        return self.reader(name)()

    def reader(self, name: str) -> Callable[[], torch.Tensor]:
        """What reads `tensor(name)` as it is now, whatever is put there later."""
        return self._makers.get(name) or (lambda: self._weights[name].to(self._device, copy=True))

    def put(self, name: str, make: Callable[[], torch.Tensor]) -> None:
        """From now on `tensor(name)` is what `make()` gives."""
        self._makers[name] = make

    def stamp(self, name: str) -> tuple[Any, ...] | None:
        """The file that `tensor(name)` is read from, and its last change; None where it comes from elsewhere."""
        told = getattr(self._weights, "index", {}).get(name, {})
        file = told.get("safetensors_file")
        if file is None or name in self._makers or name in getattr(self._weights, "state_dict", {}):
            return None
        status = os.stat(file)
        place = (file, told.get("weight_name", name), self._device)
        return *place, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

    @contextmanager
    def resident(self, model: nn.Module, index: int) -> Iterator[None]:
        """Layer `index` of `model` is in memory inside; nested calls read it once."""
        path = f"{self._layers}.{index}"
        layer = model.get_submodule(path)
        absent: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        for prefix, module in layer.named_modules():
            groups: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for tensors in groups:
                for leaf, tensor in tensors.items():
                    if tensor is not None and tensor.is_meta:
                        found: Any = self.tensor(".".join(filter(None, (path, prefix, leaf))))
                        if isinstance(tensor, nn.Parameter):
                            found = nn.Parameter(found, requires_grad=tensor.requires_grad)
                        tensors[leaf] = found
                        absent.append((tensors, leaf, tensor))
        try:
            yield
        finally:
            for tensors, leaf, tensor in absent:
                tensors[leaf] = tensor
            absent.clear()
            trim()


def trim() -> None:
    """Give freed memory back to the system: what layers and shards leave in holes would add up over them."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def page_map(model: nn.Module, layers: str, device: torch.device) -> dict[str, str]:
    """A `device_map` that leaves every layer of the list at the path `layers` on the disk, and nothing else."""
    ancestors = {""} | {layers[:i] for i, letter in enumerate(layers) if letter == "."}
    places = {}
    for path in ancestors:
        module = model.get_submodule(path)
        for kind in (
            module.named_children(),
            module.named_parameters(recurse=False),
            module.named_buffers(recurse=False),
        ):
            for name, _ in kind:
                full = f"{path}.{name}".lstrip(".")
                if full == layers:
                    places |= {f"{layers}.{i}": "disk" for i, _ in enumerate(model.get_submodule(layers).children())}
                elif full not in ancestors:
                    places[full] = str(device)
    return places


def take_pages(model: PreTrainedModel, layers: str, device: torch.device, folder: str | None = None) -> Pages:
    """The pages of a model that `from_pretrained` left on the disk by a `page_map`; it is then free of hooks.

    `folder` is where some of them are, if it is a temporary one.
    """
    weights: Any = None
    for module in model.get_submodule(layers).modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if isinstance(one, AlignDevicesHook) and one.weights_map is not None:
                weights = getattr(one.weights_map, "dataset", one.weights_map)
    remove_hook_from_module(model, recurse=True)
    if hasattr(model, "hf_device_map"):
        delattr(model, "hf_device_map")
    return Pages(layers, weights, device, folder)
