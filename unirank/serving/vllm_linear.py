"""vLLM's linear layers, multiplied by factors.

vLLM builds a model of its own layers, asks `VllmConfig` for each layer's method, and reads the checkpoint: every tensor
goes to the parameter of its name, with the member of a fused layer that it belongs to. Ranks differ between members,
so the parameters are empty at first and only collect; when all is read, they become the products of `members`.
"""

# vLLM is not installed where types are checked.
# pyright: reportMissingImports=false
from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from unirank.errors import InputError
from unirank.models.bits import unpack
from unirank.models.matrices import Matrix, meant, stacked
from unirank.models.quantizer import METHOD, UniRankConfig
from unirank.serving.members import Member, Share, layout, member, refuse_experts

# The tensors of one linear in a checkpoint. A bias that the dense linear lacks has a name of its own here, for vLLM
# drops a `bias` that its layer does not have.
_ADDED = "added_bias"
_MATRIX = ("weight", "quantized", "scale")
_PARTS = ("place", "left.bias", _ADDED, *(f"{at}{part}" for at in ("", "left.", "right.") for part in _MATRIX))


class VllmConfig(QuantizationConfig):
    """`quantization_config` of a compressed checkpoint, as vLLM asks for it."""

    def __init__(self, config: UniRankConfig | None = None) -> None:
        super().__init__()
        if config is None:  # what vLLM does where it is told the method and the checkpoint names none
            raise InputError(f"The checkpoint has no quantization_config of {METHOD}; leave --quantization out.")
        whole = dict.fromkeys(config.whole)  # dense linears whose weights are whole numbers with scales
        self.ranks: dict[str, int | None] = whole | config.ranks
        self.bits = config.bits
        self._pivoted, self.biased = config.form == "pivoted", list(config.biased)
        self.waiting: set[str] = set(self.ranks)  # linears that no layer was built for
        self.model = ""  # the type that config.json names
        self.in_order = False  # whether a matrix of q, k and v in one has them one after the other

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> VllmConfig:
        """Raises InputError where the configuration is another method's or not legal."""
        if config.get("quant_method") != METHOD:
            raise InputError(f"The checkpoint's quant_method is {config.get('quant_method')!r}, not {METHOD!r}.")
        read = UniRankConfig(**{key: value for key, value in config.items() if key != "quant_method"})
        refuse_experts(read.names)
        return cls(read)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Note of which model the checkpoint is."""
        del model_name, revision
        if hf_config is not None:
            self.model = hf_config.model_type
            self.in_order = self.model in _IN_ORDER
            if self.model == "falcon":  # one key head for all queries is the last but one, else they are by group
                self.in_order = hf_config.multi_query and not hf_config.new_decoder_architecture

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Name the linears as the modules of vLLM's model are named."""
        self.ranks = hf_to_vllm_mapper.apply_dict(self.ranks)
        self.biased = hf_to_vllm_mapper.apply_list(self.biased)
        self.waiting = set(self.ranks)

    def get_checkpoint_weight_mapper(self) -> Any:
        """Renames the biases that compression added, so that vLLM keeps them."""
        from vllm.model_executor.models.utils import WeightsMapper

        if not (self._pivoted and self.biased):
            return WeightsMapper()
        # A model's body may read the names again, without the prefix that its head took off.
        ends = {name[match.start() :] for name in self.biased for match in re.finditer(r"(?<![^.])(?=[^.])", name)}
        ends = {end for end in ends if re.search(r"\.\d+\.", end)}
        pattern = re.compile(rf"^({'|'.join(map(re.escape, sorted(ends)))})\.bias$")
        return WeightsMapper(orig_to_new_regex={pattern: rf"\1.{_ADDED}"})

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        if not isinstance(layer, LinearBase):
            return None
        names = self._names(prefix)
        self.waiting.difference_update(names)
        if not any(name in self.ranks for name in names):
            return UnquantizedLinearMethod()
        if isinstance(layer, QKVParallelLinear) and len(names) == 1 and not self.in_order:
            raise InputError(
                f"{names[0]} holds q, k and v in one matrix, whose order in a {self.model or 'model'} unirank does not "
                "know; make a dense checkpoint for vLLM: unirank densify."
            )
        return LowRankMethod(self, {name: self.ranks.get(name) for name in names})

    def _names(self, prefix: str) -> list[str]:
        """The linears of the checkpoint that a layer of vLLM stands for."""
        parent, _, last = prefix.rpartition(".")
        fused = self.packed_modules_mapping.get(last) or _FUSED.get(last, [last])
        names = [f"{parent}.{name}" for name in fused]
        # Some models have in one matrix what others fuse under the same name.
        return names if any(name in self.ranks for name in names) else [prefix]


class LowRankMethod(LinearMethodBase):
    """Multiplies by the factors of one layer of vLLM, which may stand for several linears."""

    def __init__(self, config: VllmConfig, ranks: Mapping[str, int | None]) -> None:
        self._config, self._ranks = config, dict(ranks)
        self._product = UnquantizedLinearMethod()  # vLLM's own choice of kernel, for each of our products

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        del input_size_per_partition, output_partition_sizes, input_size, output_size, extra_weight_attrs
        layer.pieces = {}
        for part in _PARTS:
            holder: nn.Module = layer
            *path, leaf = part.split(".")
            for step in path:
                if not hasattr(holder, step):
                    holder.add_module(step, nn.Module())
                holder = holder.get_submodule(step)
            guard = part == "weight" or (leaf == "weight" and self._config.bits is not None)
            kind = torch.int64 if guard else _DTYPES.get(leaf, params_dtype)
            empty: Any = nn.Parameter(torch.empty(0, dtype=kind), requires_grad=False)
            empty.weight_loader = _collector(layer.pieces, part)
            holder.register_parameter(leaf, empty)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Raises InputError where the checkpoint does not hold what its configuration says."""
        if self._config.waiting and get_pp_group().world_size == 1:
            raise InputError(
                f"vLLM's model has no linear {min(self._config.waiting)}, which quantization_config names."
            )
        device, dtype = layer.left.bias.device, layer.params_dtype
        members = self._members(layer)
        found = layout(members)
        downs = [part.to(device, dtype) for part in stacked([each.down for each in members])]
        ups = [each.up.to(device, dtype) for each in members if each.up is not None]
        layer.downs = nn.ModuleList(Product(part, self._product) for part in downs)
        layer.ups = nn.ModuleList(Product(part, self._product) for part in ups)
        layer.inner = found.inner
        gather = None if found.gather is None else found.gather.to(device)
        layer.register_buffer("gather", gather, persistent=False)
        self._biases(layer, members, device, dtype)
        for name in {part.partition(".")[0] for part in _PARTS} | {"pieces"}:
            delattr(layer, name)
        layer.weight = nn.Parameter(torch.empty(0, device=device, dtype=dtype), requires_grad=False)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x `[..., N]` -> `[..., M]`, the process's share of each."""
        flat = x.reshape(-1, x.shape[-1])
        h = _joined([down(flat) for down in layer.downs])
        parts = [] if layer.gather is None and layer.inner else [h]
        for up, (first, count) in zip(layer.ups, layer.inner, strict=True):
            parts.append(up(h if count == h.shape[1] else h[:, first : first + count].contiguous()))
        y = _joined(parts)
        if layer.gather is not None:
            y = y.index_select(1, layer.gather)
        if layer.own_bias is not None:
            y = y + layer.own_bias
        if bias is not None:
            y = y + bias
        return y.view(*x.shape[:-1], y.shape[-1])

    def _members(self, layer: Any) -> list[Member]:
        """The linears that `layer` stands for, in the order of its outputs."""
        pieces = layer.pieces
        if not pieces:
            raise InputError(f"The checkpoint has no weights for {' and '.join(self._ranks)}.")
        names = list(self._ranks)
        order = sorted(pieces, key=lambda shard: _ORDER.get(shard, shard if isinstance(shard, int) else 0))
        if len(order) != len(names) or any(isinstance(shard, tuple) for shard in order):
            raise InputError(f"The checkpoint has weights for {len(order)} of the linears {', '.join(names)}.")
        if self._config.model in _TRANSPOSED:
            _turn_back(pieces)
        members = []
        for name, shard in zip(names, order, strict=True):
            members.append(member(name, self._ranks[name], pieces[shard], _share(layer, shard)))
            if members[-1].bias is None and name in self._config.biased:
                raise InputError(f"The checkpoint has no bias for {name}, which quantization_config.biased names.")
        return members

    @staticmethod
    def _biases(layer: Any, members: list[Member], device: torch.device, dtype: torch.dtype) -> None:
        """Biases go to the layer's own, or, where it has none, are added with the product."""
        layer.register_parameter("own_bias", None)
        if all(each.bias is None for each in members):
            return
        into = layer.bias
        if into is None:
            into = torch.zeros(sum(each.outputs for each in members), device=device, dtype=dtype)
            # The products of a row-parallel layer are summed over its processes: one of them adds the bias.
            if not (isinstance(layer, RowParallelLinear) and layer.tp_rank > 0):
                layer.own_bias = nn.Parameter(into, requires_grad=False)
        first = 0
        for each in members:
            if each.bias is not None:
                into.data[first : first + each.outputs] = each.bias.to(into)
            first += each.outputs


# What vLLM's models fuse, where they do not say so themselves.
_FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
# Model types that store q, k and v of all heads one after the other, and whose weights vLLM takes for `Conv1D`'s.
_IN_ORDER = ("phi3", "gpt2")
_TRANSPOSED = ("gpt2",)
_DTYPES = {"place": torch.int32, "quantized": torch.int8, "scale": torch.float32}  # what vLLM expects to read
_ORDER: dict[Any, int] = {"q": 0, "k": 1, "v": 2, None: 0}


def _collector(pieces: dict[Any, dict[str, torch.Tensor]], part: str) -> Any:
    """A `weight_loader` of vLLM that keeps the tensor, for the member of a fused layer or (None) for all of it."""

    def keep(_: Any, tensor: torch.Tensor, shard: Any = None) -> None:
        pieces.setdefault(shard, {})[part] = tensor

    return keep


def _turn_back(pieces: dict[Any, dict[str, torch.Tensor]]) -> None:
    """Undo what vLLM does to a `Conv1D`; factors are stored as every linear's."""
    for tensors in pieces.values():
        for name in ("left.weight", "right.weight"):
            if name in tensors and tensors[name].dim() == 2:
                tensors[name] = tensors[name].t()


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class Product(nn.Module):
    """`x W^T`, by vLLM's own choice of kernel; whole numbers become the input's dtype first."""

    def __init__(self, matrix: Matrix, method: UnquantizedLinearMethod) -> None:
        super().__init__()
        self._method, self._columns, self._bits = method, matrix.shape[1], matrix.bits
        self._by_row = matrix.group == matrix.shape[1]
        self.weight = nn.Parameter(matrix.packed(), requires_grad=False)
        self.register_buffer("scale", matrix.scale, persistent=False)
        if matrix.bits is None:
            method.process_weights_after_loading(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `[T, N]` -> `[T, M]`."""
        if self._bits is None:
            return self._method.apply(self, x)
        scale: Any = self.scale
        numbers = self.weight if self._bits == 8 else unpack(self.weight, self._columns)
        # A row's one scale can wait for the product, but not in float16, whose range the sums would leave.
        if self._by_row and x.dtype != torch.float16:
            return nn.functional.linear(x, numbers.to(x.dtype)) * scale[:, 0].to(x.dtype)
        return nn.functional.linear(x, meant(numbers, scale, x.dtype))


def _share(layer: Any, shard: Any) -> Share:
    """What this process holds of the member `shard` of a layer."""
    rank, size = layer.tp_rank, layer.tp_size
    if isinstance(layer, RowParallelLinear):
        count = layer.input_size_per_partition
        columns = None if size == 1 else (rank * count, count)
        return Share(layer.output_size, layer.input_size, columns=columns)
    parts = _parts(layer)
    index: Any = _ORDER.get(shard, shard)
    spans, offset = [], 0
    for whole, own, copies in parts if shard is None else [parts[index]]:
        spans.append((offset + rank // copies * own, own))
        offset += whole
    return Share(offset, layer.input_size, spans=None if size == 1 else tuple(spans))


def _parts(layer: Any) -> list[tuple[int, int, int]]:
    """Of each linear of a layer: outputs in the checkpoint, outputs of a process, processes that hold the same ones."""
    kind = type(layer)
    if kind is QKVParallelLinear:
        v_size = layer.v_head_size
        return [
            (layer.total_num_heads * layer.head_size, layer.num_heads * layer.head_size, 1),
            *(
                (layer.total_num_kv_heads * head, layer.num_kv_heads * head, layer.num_kv_head_replicas)
                for head in (layer.head_size, v_size)
            ),
        ]
    if kind is MergedColumnParallelLinear:
        return [(whole, whole // layer.tp_size, 1) for whole in layer.output_sizes]
    if kind is ReplicatedLinear:
        return [(layer.output_size, layer.output_size, layer.tp_size)]
    if kind is ColumnParallelLinear:
        return [(layer.output_size, layer.output_size_per_partition, 1)]
    if layer.tp_size == 1:  # of any other kind only what needs no split
        return [(whole, whole, 1) for whole in layer.output_partition_sizes]
    raise InputError(f"unirank does not know how vLLM splits a {kind.__name__} over processes; serve with one.")
