"""Models larger than memory: decoder layers stay in the checkpoint's files, and are in memory one at a time.

The next one is read meanwhile, where whoever goes through the layers says which it is: on a CPU into its own memory,
beside a GPU into the host's page-locked memory, from which it comes to the GPU without a stop.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from accelerate.hooks import AlignDevicesHook, remove_hook_from_module
from torch import nn
from transformers import PreTrainedModel

from unirank.queues import CALLS, has_queues


class Pages:
    """What the meta tensors of a model's decoder layers stand for, by name.

    A tensor is read when it is asked for, and forgotten by this object at once; those of one layer may be read ahead.
    """

    def __init__(
        self, layers: str, weights: Mapping[str, torch.Tensor], device: torch.device, folder: str | None = None
    ) -> None:
        """`folder` is a temporary one of some of the weights, which is deleted with this object."""
        self._layers, self._weights, self._device = layers, weights, device
        if folder is not None:
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._makers: dict[str, Callable[[], torch.Tensor]] = {}
        self._ahead: _Ahead | None = None

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
    def resident(self, model: nn.Module, index: int, then: int | None = None) -> Iterator[None]:
        """Layer `index` of `model` is in memory inside; nested calls read it once.

        Args:
            then: the layer that will be asked for next. It is read by a thread meanwhile, unless it is more than a
                quarter of the host's free memory. What that thread raises is raised where the layer is asked for.
        """
        absent = list(self._absent(model, index))
        try:
            read = self._read(index) if absent else {}
            for name, tensors, leaf, tensor in absent:
                there = read.pop(name, None)
                found: Any = self.tensor(name) if there is None or name in self._makers else self._brought(there)
                if isinstance(tensor, nn.Parameter):
                    found = nn.Parameter(found, requires_grad=tensor.requires_grad)
                tensors[leaf] = found
            if then is not None:
                self._begin(model, then)
            yield
        except BaseException:
            self._forget()
            raise
        finally:
            for _, tensors, leaf, tensor in absent:
                tensors[leaf] = tensor
            absent.clear()
            trim()

    def _absent(self, model: nn.Module, index: int) -> Iterator[tuple[str, dict[str, Any], str, torch.Tensor]]:
        """What of layer `index` is not in memory: its name, and where it stands in its module."""
        path = f"{self._layers}.{index}"
        for prefix, module in model.get_submodule(path).named_modules():
            groups: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for tensors in groups:
                for leaf, tensor in tensors.items():
                    if tensor is not None and tensor.is_meta:
                        yield ".".join(filter(None, (path, prefix, leaf))), tensors, leaf, tensor

    def _begin(self, model: nn.Module, index: int) -> None:
        """Begin to read layer `index`, unless that has begun."""
        if self._ahead is not None and self._ahead.index == index:
            return
        self._forget()
        wanted = {name: t for name, _, _, t in self._absent(model, index) if name not in self._makers}
        if wanted and 4 * sum(t.nbytes for t in wanted.values()) <= psutil.virtual_memory().available:
            self._ahead = _Ahead(index, list(wanted), self._into_host)

    def _read(self, index: int) -> dict[str, torch.Tensor]:
        """What was read ahead of layer `index`; of another one it is forgotten."""
        ahead = self._ahead
        if ahead is None or ahead.index != index:
            self._forget()
            return {}
        found = ahead.result()  # before it is let go, so that an interrupt here can stop it
        self._ahead = None
        return found

    def _forget(self) -> None:
        if self._ahead is not None:
            ahead, self._ahead = self._ahead, None
            ahead.stop()

    def _into_host(self, name: str) -> torch.Tensor:
        """The tensor `name`, in memory of the host from which it goes to the model's device."""
        tensor = self._weights[name]
        if not has_queues(self._device):
            return tensor.to(self._device, copy=True)
        return CALLS.page_locked(tensor.nbytes).view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def _brought(self, tensor: torch.Tensor) -> torch.Tensor:
        # torch lets page-locked memory go when the copies out of it are made.
        return tensor.to(self._device, non_blocking=True)


class _Ahead:
    """A thread that reads tensors by name, one after the other."""

    def __init__(self, index: int, names: Sequence[str], read: Callable[[str], torch.Tensor]) -> None:
        self.index = index
        self._stopped = threading.Event()
        pool = ThreadPoolExecutor(1)
        self._future = pool.submit(self._run, names, read)
        pool.shutdown(wait=False)  # its thread ends with the work

    def _run(self, names: Sequence[str], read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {}
        for name in names:
            if self._stopped.is_set():
                break
            found[name] = read(name)
        return found

    def result(self) -> dict[str, torch.Tensor]:
        """What was read, when all is there. Raises what reading raised."""
        return self._future.result()

    def stop(self) -> None:
        """The thread reads the tensor at hand, and ends; what it raises is of no interest any more."""
        self._stopped.set()
        wait([self._future])


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
