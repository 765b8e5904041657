"""The tensor of the pretend GPU, and how an op runs on it: checked by the rules, done by the CPU, wrapped again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree  # private, but what torch's pages on tensor subclasses use

from tests.support.pretend.journal import Journal
from tests.support.pretend.rules import check_devices, check_generator

DEVICE = torch.device("cuda", 0)
# What C++ takes for the device: autograd runs a graph of CUDA tensors in threads and streams that need a driver, and
# one of the meta device in the thread that asks. A number tells it from the meta device that is meant.
_CARRIER = torch.device("meta", 0)


class State:
    """What holds for ops while there is a pretend GPU; tensors may outlive it.

    Attributes:
        compositions: what runs in the place of an op, by its name.
        pinned: storages of page-locked memory, by address.
    """

    journal: Journal | None = None
    compositions: ClassVar[Mapping[str, Callable[..., Any]]] = {}
    pinned: ClassVar[weakref.WeakValueDictionary[int, torch.UntypedStorage]] = weakref.WeakValueDictionary()


class PretendTensor(Tensor):
    """Says that it is on `cuda:0`; its numbers are in `raw`, a CPU tensor of the same shape, strides and dtype.

    A wrapper subclass: autograd, hooks and parameters are torch's own, above `__torch_dispatch__`.
    """

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor, requires_grad: bool = False) -> PretendTensor:
        # The one way to a tensor of another device without its memory; FakeTensor and torchao are made like this.
        made = Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=_CARRIER,
            requires_grad=requires_grad,
        )
        made.raw = raw
        return made

    @property
    def device(self) -> torch.device:
        return DEVICE

    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    # Results keep the class by `__torch_dispatch__`; torch's default would turn host results into it as well.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"PretendTensor({list(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copy = PretendTensor(self.raw.clone(), self.requires_grad)
            copy.__dict__ |= {key: value for key, value in self.__dict__.items() if key != "raw"}
            memo[id(self)] = copy
        return memo[id(self)]

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    # C++ would make a tensor of a list on the carrier, below every mode.
    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(_as_tensors(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_as_tensors(index), value)

    # The numbers have an address, which C++ would not find in a wrapper.
    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.raw.untyped_storage()

    def tolist(self) -> Any:
        _note("read", "tolist")
        return self.raw.tolist()

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        """Takes over the content of `value`, of either device; torch would take all but `raw`."""
        torch.utils.swap_tensors(self, torch.nn.Parameter(value.detach(), self.requires_grad))


def _as_tensors(index: Any) -> Any:
    """An index with its lists as tensors, as torch makes them."""
    if isinstance(index, tuple):
        return tuple(_as_tensors(part) for part in index)
    return torch.tensor(index) if isinstance(index, list) else index


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an op of which an operand is on the pretend GPU, or a result is to be."""
    name = func._schema.name
    flat = pytree.tree_leaves((args, kwargs))
    held = [value for value in flat if isinstance(value, PretendTensor)]
    device = kwargs.get("device")
    asked = None if device is None else torch.device(device)
    to_device = asked is not None and (asked.type == "cuda" or asked == _CARRIER)
    if not held and not to_device:
        return func(*args, **kwargs) if name not in _HOST else _HOST[name](func, args, kwargs)
    if name in _FIXED:
        return _FIXED[name]
    if held:
        check_devices(func, args, kwargs, flat, PretendTensor)
    if to_device or (held and asked is None):
        check_generator(name, flat)
    if name in State.compositions:
        return State.compositions[name](*args, **kwargs)
    _note_copies(name, args, held, None if asked is None else to_device)
    inner, named = pytree.tree_map(lambda v: v.raw if isinstance(v, PretendTensor) else v, (args, kwargs))
    if to_device:
        named["device"] = torch.device("cpu")
    if "pin_memory" in named:
        named["pin_memory"] = None
    result = _product(*inner, **named) if _wide(func) else func(*inner, **named)
    if name == "aten::copy_":
        on_device = isinstance(args[0], PretendTensor)
    elif asked is not None:
        on_device = to_device
    else:
        on_device = True
    known = {id(tensor.raw): tensor for tensor in held}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in known:
            same = known[id(value)]
            if same.shape != value.shape:
                raise NotImplementedError(f"The pretend GPU cannot change a tensor's shape in place ({name}).")
            return same
        return PretendTensor(value) if on_device else value

    return pytree.tree_map(wrapped, result)


def _wide(func: Any) -> bool:
    """Whether a product is asked for in a wider dtype than its factors', which a CPU has no kernel for."""
    return func._schema.name in ("aten::mm", "aten::bmm") and func._schema.overload_name == "dtype"


def _product(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Products of 16-bit numbers are exact in float32, as on tensor cores; in which order a device adds them is its own
    affair, and a CPU's BLAS has another for another size, so the sum is rounded once."""
    return (left.double() @ right.double()).to(out_dtype)


def _note(kind: str, detail: str = "") -> None:
    if State.journal is not None:
        State.journal.note(kind, detail)


def _note_copies(name: str, args: Any, held: list[PretendTensor], to_device: bool | None) -> None:
    if name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal"):
        _note("read", name)
    elif name == "aten::_to_copy" and to_device is not None and bool(held) != to_device:
        _note("to device" if not held else "to host", _size(args[0]))
    elif name == "aten::copy_" and isinstance(args[0], PretendTensor) != isinstance(args[1], PretendTensor):
        _note("to device" if isinstance(args[0], PretendTensor) else "to host", _size(args[0]))


def _size(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _pinned(tensor: Tensor) -> Tensor:
    storage = tensor.untyped_storage()
    State.pinned[storage.data_ptr()] = storage
    _note("pinned", _size(tensor))
    return tensor


def _is_pinned(func: Any, args: Any, kwargs: Any) -> bool:
    return args[0].untyped_storage().data_ptr() in State.pinned


def _pin(func: Any, args: Any, kwargs: Any) -> Tensor:
    return _pinned(args[0].clone())


def _made(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """A host tensor, pinned where that was asked for."""
    wanted = kwargs.pop("pin_memory", None)
    made = func(*args, **kwargs)
    return _pinned(made) if wanted else made


# No memory of the GPU is pinned; a GPU has none of the CPU's attention kernels, and both have `math` (0).
_FIXED = {"aten::is_pinned": False, "aten::_fused_sdp_choice": 0}
# Ops between host tensors that are other than the CPU's own while there is a GPU: pinned memory.
_HOST = {
    "aten::is_pinned": _is_pinned,
    "aten::_pin_memory": _pin,
    "aten::pin_memory": _pin,
    "aten::empty": _made,
    "aten::empty_strided": _made,
    "aten::empty_like": _made,
}
