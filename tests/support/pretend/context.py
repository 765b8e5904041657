"""Puts the pretend GPU in place, for all threads that start meanwhile, and takes it away."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode  # the documented way to see every op

from tests.support.pretend.journal import Journal
from tests.support.pretend.runtime import FREE, replacements
from tests.support.pretend.tensor import DEVICE, PretendTensor, State, run
from unirank import reference
from unirank.models import structure


class _Dispatch(TorchDispatchMode):
    """Ops without an operand on the GPU that may have a result there: factories, copies, pinned memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def _is_cuda(device: object) -> bool:
    return isinstance(device, str | int | torch.device) and torch.device(device).type == "cuda"


def _functions() -> dict[tuple[object, str], Any]:
    """What torch does in C++ before any op: tensors made of Python values, devices without a number, streams."""
    tensor_to = torch.Tensor.to

    def maker(made: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make(*args: Any, **kwargs: Any) -> Tensor:
            if any(isinstance(value, PretendTensor) for value in args):  # a copy of a tensor
                return made(*args, **kwargs)
            if not _is_cuda(kwargs.get("device")):
                return made(*args, **kwargs)
            return made(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)

        return make

    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args and _is_cuda(args[0]):
            kwargs["device"], args = args[0], args[1:]
        if args and "device" in kwargs:  # .to(device, dtype)
            kwargs["dtype"], args = args[0], args[1:]
            kwargs |= dict(zip(("non_blocking", "copy"), args, strict=False))
            args = ()
        if _is_cuda(kwargs.get("device")):
            if isinstance(tensor, PretendTensor):
                del kwargs["device"]
                return tensor_to(tensor, *args, **kwargs) if args or kwargs else tensor
            kwargs["device"] = DEVICE
        return tensor_to(tensor, *args, **kwargs)

    def new_tensor(tensor: Tensor, data: Any, **kwargs: Any) -> Tensor:
        return torch.tensor(data, **{"dtype": tensor.dtype, "device": tensor.device, **kwargs})

    def record_stream(tensor: Tensor, stream: Any) -> None:
        if State.journal is not None:
            State.journal.note("record_stream", f"stream {stream.stream_id}")

    makers = {(torch, name): maker(getattr(torch, name)) for name in ("tensor", "as_tensor", "asarray")}
    methods = {"to": to, "cuda": lambda tensor, *_, **__: to(tensor, DEVICE), "new_tensor": new_tensor}
    return makers | {(torch.Tensor, name): made for name, made in {**methods, "record_stream": record_stream}.items()}


def _type(value: object) -> type:
    return torch.nn.Parameter if isinstance(value, PretendTensor) else type(value)


@contextmanager
def _in_this_thread() -> Iterator[None]:
    with _Dispatch():
        yield


def _import_what_names_streams() -> None:
    """Annotations in transformers need the class `torch.cuda.Stream` when generation is first imported."""
    with suppress(ModuleNotFoundError):  # an older release has no such module
        importlib.import_module("transformers.generation.continuous_batching.utils")


@contextmanager
def pretend_gpu(*, free: int = FREE, bf16: bool = True, compositions: bool = False) -> Iterator[Journal]:
    """There is one GPU, `cuda:0`, while this is open; what happens on it is in the journal.

    Args:
        free: bytes that the driver says are free.
        bf16: the GPU multiplies in bfloat16; without, training runs in float32 as on a CPU, to be compared with it.
        compositions: run unirank's ops as the torch compositions of `unirank.reference`, not as the CPU's kernels.
    """
    if torch.cuda.is_available():
        torch.cuda.init()  # what stands for it below would leave it half done
    # Dynamo keeps tables of torch's functions, made when it is first imported: not with those that stand here.
    importlib.import_module("torch._dynamo")
    _import_what_names_streams()
    # `torch.device(...)` as a context keeps a table of torch's makers of tensors, made at its first use: likewise.
    with torch.device("meta"):
        torch.empty(0)
    journal = Journal()
    plain_run: Callable[[threading.Thread], None] = threading.Thread.run

    def run_thread(thread: threading.Thread) -> None:
        with _in_this_thread():
            plain_run(thread)

    names = ("cosine_accumulate_", "gram_accumulate_", "batched_eigh", "batched_svd") if compositions else ()
    with ExitStack() as stack:
        for name, value in replacements(journal, free=free, bf16=bf16).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value, create=True))
            if hasattr(torch.cuda.random, name):
                stack.enter_context(mock.patch.object(torch.cuda.random, name, value))
        for (owner, name), value in _functions().items():
            stack.enter_context(mock.patch.object(owner, name, value))
        # A model's weights must be torch's own tensors, not quantised or sharded ones: these count as such.
        stack.enter_context(mock.patch.object(structure, "type", _type, create=True))
        stack.enter_context(mock.patch.object(threading.Thread, "run", run_thread))
        stack.enter_context(mock.patch.object(State, "journal", journal))
        stack.enter_context(
            mock.patch.object(State, "compositions", {f"unirank::{n}": getattr(reference, n) for n in names})
        )
        # A parameter that moves keeps its object, as on a real device: what is tied stays tied.
        swaps = torch.__future__.get_swap_module_params_on_conversion()
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        torch.__future__.set_swap_module_params_on_conversion(True)
        stack.enter_context(_in_this_thread())
        yield journal
