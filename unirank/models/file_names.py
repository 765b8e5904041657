"""What tensors are called in files: for many classes transformers renames on loading, and back when it saves.

`save_pretrained` has the tensors of the whole model for that. Here it is found out from shapes alone which tensors of
the model make which tensors of the files, so that they can be read and written a few at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, revert_weight_conversion

from unirank.models.low_rank import LowRankLinear
from unirank.models.low_rank_experts import LowRankExperts
from unirank.models.quantized import QuantizedLinear

_Tensors = Mapping[str, torch.Tensor]
_ATTRIBUTE = "_weight_conversions"  # transformers': what was renamed when the model was loaded


class FileTensors:
    """The tensors that go into the files of a model, by their names there.

    Attributes:
        empty: meta tensors of their shapes and dtypes, in the order in which transformers writes them.
    """

    def __init__(self, model: Any, tensors: _Tensors, read: Callable[[str], torch.Tensor]) -> None:
        """`tensors` are those of the model that are saved, by name; only shapes and dtypes are looked at."""
        self._model, self._read = model, read
        own = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
        self.empty: dict[str, torch.Tensor] = dict(revert_weight_conversion(model, dict(own)))
        names = {id(tensor): name for name, tensor in self.empty.items()}
        # A tensor that is only renamed is the same object; the others were joined, cut or turned.
        self._renamed = {names[id(tensor)]: name for name, tensor in own.items() if id(tensor) in names}
        changed = {name: tensor for name, tensor in own.items() if id(tensor) not in names}
        self._sources: dict[str, Sequence[str]] = {}
        for group in _groups(model, changed, {n: t for n, t in self.empty.items() if n not in self._renamed}):
            for name in revert_weight_conversion(model, {source: own[source] for source in group}):
                self._sources[name] = group
        self._waiting: dict[str, torch.Tensor] = {}  # made together with one that was taken, and not taken yet

    def take(self, name: str) -> torch.Tensor:
        """The tensor of that name; every one can be taken once."""
        if name in self._renamed:
            return self._read(self._renamed[name])
        if name not in self._waiting:
            made = {source: self._read(source) for source in self._sources[name]}
            self._waiting.update(revert_weight_conversion(self._model, made))
        return self._waiting.pop(name)


def _groups(model: Any, changed: _Tensors, wanted: _Tensors) -> list[list[str]]:
    """Names in `changed`, those together that make a tensor of `wanted` together."""
    groups: list[tuple[set[str], list[str]]] = []  # what they make, who
    for source, tensor in changed.items():
        made, members = set(revert_weight_conversion(model, {source: tensor})), [source]
        for group in [group for group in groups if group[0] & made]:
            groups.remove(group)
            made |= group[0]
            members = group[1] + members
        groups.append((made, members))
    found: dict[str, torch.Tensor] = {}
    for _, members in groups:
        found |= revert_weight_conversion(model, {source: changed[source] for source in members})
    same = found.keys() == wanted.keys() and all(found[name].shape == wanted[name].shape for name in wanted)
    # Where a name depends on which other tensors there are, all are converted at once.
    return [members for _, members in groups] if same else [list(changed)]


def keep_apart(model: nn.Module) -> None:
    """Take the joining of tensors out of what transformers does to a compressed model when it saves it.

    A class whose files hold q, k and v as one matrix cannot have them so where some are low-rank. They are then written
    under the modules' names, which loading understands without more.
    """
    found = _conversions(model)
    kept = kept_apart(model, found)
    if len(kept) < len(found):
        setattr(model, _ATTRIBUTE, kept)


def kept_apart(model: nn.Module, conversions: Sequence[Any]) -> list[Any]:
    """Those of `conversions` that join or turn no tensor of a module that is low-rank or quantised."""
    return [one for one in conversions if not (isinstance(one, WeightConverter) and _touches_low_rank(model, one))]


def join_again(model: nn.Module) -> None:
    """Undo `keep_apart`, for a model that is dense again."""
    kept = getattr(model, _ATTRIBUTE, None)
    if kept is not None:
        patterns = [one.source_patterns for one in kept]
        known = get_model_conversion_mapping(model, add_legacy=False)  # pyright: ignore[reportArgumentType]
        missing = [one for one in known if isinstance(one, WeightConverter) and one.source_patterns not in patterns]
        setattr(model, _ATTRIBUTE, [*kept, *missing])


def _conversions(model: Any) -> list[Any]:
    """What transformers would revert when it saves `model`."""
    found = getattr(model, _ATTRIBUTE, None)
    if found is not None:
        return list(found)
    return [
        one
        for one in get_model_conversion_mapping(model, add_legacy=False)
        if type(one).__name__ != "PrefixChange"  # as `revert_weight_conversion` does for a model that was not loaded
    ]


def _touches_low_rank(model: nn.Module, converter: Any) -> bool:
    back = converter.reverse_transform()
    return any(
        back.rename_source_key(f"{path}.{name}")[1] is not None
        for path, module in model.named_modules()
        if isinstance(module, LowRankLinear | LowRankExperts | QuantizedLinear)
        for name in module.state_dict()
    )
