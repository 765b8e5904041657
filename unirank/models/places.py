"""Where the linears that a checkpoint names are in a model of another class: the body alone, or under another head."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn

_PATH = re.compile(r"(?P<path>.+?)\.\d+\.")


def places_of(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The names as `model` has them, by the names as they are given.

    A name is the path of the layers' list, a number, and a path inside the layer. The path of the list differs by what
    stands around the layers: `layers` in a body, `model.layers` below a head, `model.language_model.layers` in a
    multimodal model. So it is the list whose path has all parts of the other path, in their order, or the other way
    round, and whose layers have all that is named. Where there is none, or are several, names stay as they are.
    """
    names = list(names)
    same = {name: name for name in names}
    if all(_is_there(model, name) for name in names):
        return same
    match = _PATH.match(names[0])
    if match is None or not all(name.startswith(f"{match['path']}.") for name in names):
        return same
    path, found = match["path"], []
    for other, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and _related(path.split("."), other.split(".")):
            places = {name: other + name.removeprefix(path) for name in names}
            if all(_is_there(model, place) for place in places.values()):
                found.append(places)
    return found[0] if len(found) == 1 else same


def _is_there(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return _is_expert(model, name)
    return True


def _is_expert(model: nn.Module, name: str) -> bool:
    """Whether it is the name of an expert's matrix: of a parameter that stacks them, and a number."""
    path, _, number = name.rpartition(".")
    module, _, parameter = path.rpartition(".")
    try:
        holder = model.get_submodule(module)
    except AttributeError:
        return False
    return number.isdecimal() and parameter in holder._parameters | holder._buffers


def _related(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether the longer path has all parts of the shorter one, in their order."""
    short, long = sorted((one, other), key=len)
    rest = iter(long)
    return all(part in rest for part in short)
