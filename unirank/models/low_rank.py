"""`LowRankLinear`: what a compressed linear becomes, and where in memory its weights lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from unirank.errors import InputError
from unirank.matmul import keep_order
from unirank.models.pivoting import pivot
from unirank.models.quantized import QuantizedLinear
from unirank.models.structure import weight_of
from unirank.types import Form

keep_order()


class LowRankLinear(nn.Module):
    """A linear of rank R, as two inner linears: `right` N -> R without bias, and `left`.

    In the form "factors", `left` is R -> M with the bias kept, and `y = left(right(x))`. In the form "pivoted"
    (method 9), `right(x)` are R of the outputs, the pivots, and `left` R -> M - R makes the others from them;
    `y = cat(right(x), left(right(x)))[..., place] + bias`, `place` int32 `[M]`, a persistent buffer.

    peft can target the inner linears by name ("left", "right"). The persistent buffer `weight` (int64 `[1]`, the rank)
    is a guard: it takes the name of the dense weight that is gone, in a shape that does not fit it, so that a loader
    which does not know unirank stops with a shape mismatch where it would otherwise start from random weights.
    """

    place: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = False,
        form: Form = "factors",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.form: Form = form
        self.added_bias = False  # whether the bias is not the dense linear's
        pivoted = form == "pivoted"
        made = out_features - rank if pivoted else out_features
        self.right = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.left = nn.Linear(rank, made, bias=bias and not pivoted, device=device, dtype=dtype)
        self.register_buffer("weight", torch.full((1,), rank, dtype=torch.int64, device=device))
        if pivoted:
            own = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
            self.register_parameter("bias", own)
            self.register_buffer("place", torch.arange(out_features, dtype=torch.int32, device=device))

        self.shared: SharedInput | None = None  # set by `unirank.fuse`
        self.shared_index = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `[..., N]` -> `[..., M]`."""
        if self.shared is not None and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            product = self.shared.product(self.shared_index, self.right, x)
            if product is not None:
                return self._outputs(product)
        return self._outputs(self.right(x))

    def __getattr__(self, name: str) -> Any:
        # Code of a model's own may look at the bias of its linear, as RecurrentGemma's does when it is built.
        if name == "bias" and self.form == "factors":
            return self.left.bias
        return super().__getattr__(name)

    def _outputs(self, inner: torch.Tensor) -> torch.Tensor:
        """`[..., R]` -> `[..., M]`."""
        if self.form == "factors":
            return self.left(inner)
        y = torch.cat((inner, self.left(inner)), -1)
        # As a matrix: over more dimensions a CPU takes ten to sixty times as long for the same copy.
        flat = y.reshape(-1, self.out_features)
        taught = flat.requires_grad and not torch.compiler.is_compiling()
        flat = _Gather.apply(flat, self.place) if taught else flat.index_select(1, self.place)
        y = flat.view(y.shape)
        bias = self.output_bias
        return y if bias is None else y + bias.to(y.dtype)  # under autocast they differ

    @property
    def output_bias(self) -> nn.Parameter | None:
        """The bias `[M]`, wherever the form keeps it."""
        bias: Any = self.left.bias if self.form == "factors" else self.bias
        return bias

    def set_bias(self, bias: nn.Parameter | None) -> None:
        """Make `bias`, `[M]`, the bias."""
        (self.left if self.form == "factors" else self).register_parameter("bias", bias)

    def bias_name(self) -> str:
        """The bias's name below this module's."""
        return "left.bias" if self.form == "factors" else "bias"

    @torch.no_grad()
    def set_product(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Take the weight `left [M, R] @ right [R, N]`, in the form of this module; dtypes and devices are its own."""
        own = self.state_dict()
        for name, tensor in stored_tensors(left, right, self.form).items():
            own[name].copy_(tensor)

    def put_quantized(self, left: QuantizedLinear, right: QuantizedLinear) -> None:
        """Take quantised inner linears."""
        self.shared = None  # of `unirank.fuse`
        self.set_submodule("left", left)
        self.set_submodule("right", right)

    def dense_weight(self) -> torch.Tensor:
        """The product, `[M, N]`; of quantised matrices in float32."""
        inner: tuple[Any, Any] = (self.left, self.right)
        left, right = (
            one.dense_weight(torch.float32) if isinstance(one, QuantizedLinear) else one.weight for one in inner
        )
        return weight_product(left, right, self.place if self.form == "pivoted" else None)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, form={self.form}"


def stored_tensors(left: torch.Tensor, right: torch.Tensor, form: Form) -> dict[str, torch.Tensor]:
    """What a `LowRankLinear` of that form stores of `left [M, R] @ right [R, N]`, by name, in the dtype of `left`."""
    if form == "factors":
        return {"left.weight": left, "right.weight": right}
    found = pivot(left, right)
    return {"left.weight": found.a, "right.weight": found.b, "place": found.order.argsort().int()}


def weight_product(left: torch.Tensor, right: torch.Tensor, place: torch.Tensor | None) -> torch.Tensor:
    """The weight `[M, N]` from what is stored; `place` as in `LowRankLinear`, None for two factors."""
    product = left @ right
    return product if place is None else torch.cat((right, product)).index_select(0, place)


class _Gather(torch.autograd.Function):
    """`x[:, place]` for a permutation, whose gradient is a gather too; torch adds, in ten times the time on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(place)
        return x.index_select(1, place)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        return gradients[0].index_select(1, place.argsort()), None


class SharedInput:
    """The stacked down-projections of layers that read the same tensor, multiplied once for all of them.

    The first layer that is called with a tensor computes the product, the others take their rows of it. The state is
    one tuple, replaced as a whole, so that threads that share a model can at worst compute it twice.
    """

    def __init__(self, layers: Sequence[LowRankLinear]) -> None:
        self._ranks = [layer.rank for layer in layers]
        self._weight = torch.cat([layer.right.weight.detach() for layer in layers])
        for index, (layer, rows) in enumerate(zip(layers, self._weight.split(self._ranks), strict=True)):
            layer.right.weight.data = rows  # a view: no byte more, and what is written to one shows in the other
            layer.shared, layer.shared_index = self, index
        self._pointers = [layer.right.weight.data_ptr() for layer in layers]
        self._state: tuple[torch.Tensor, int, tuple[torch.Tensor, ...]] | None = None

    def product(self, index: int, right: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        """`x @ right.weight.T`, `[..., R]`; None when `right` is no longer what was stacked (adapted, moved, cast)."""
        if type(right) is not nn.Linear or right.weight.data_ptr() != self._pointers[index]:
            return None
        version = 0 if x.is_inference() else x._version
        state = self._state
        if state is None or state[0] is not x or state[1] != version:
            state = (x, version, F.linear(x, self._weight).split(self._ranks, -1))
        last = index == len(self._ranks) - 1
        self._state = None if last else state
        return state[2][index]


_ALIGNMENT = 64  # bytes: the widest vector of a CPU, and what MKL asks for


def align_weights(model: nn.Module) -> None:
    """Copy every CPU parameter that does not start on a 64-byte boundary to memory that does; values stay.

    Weights mapped from a file lie where the file's header put them, and BLAS adds in another order at another
    alignment. Without this, the same weights could give other last bits in another process.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % _ALIGNMENT:
            parameter.data = parameter.data.clone()  # torch allocates on the boundary


def check_guards(model: nn.Module) -> None:
    """Raise InputError for a low-rank or quantised linear that was loaded without its weights: random ones or zeros."""
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            own, what = module.rank, f"rank {module.rank}"
        elif isinstance(module, QuantizedLinear):
            own, what = module.bits, f"{module.bits} bits"
        else:
            continue
        guard: Any = module.weight
        if not guard.is_meta and guard.tolist() != [own]:
            raise InputError(
                f"{type(model).__name__} found no weights of {what} for {name} in the checkpoint and would "
                "start from random ones; open it as the class that was compressed, with AutoModelForCausalLM."
            )


def count_parameters(model: nn.Module) -> int:
    """All parameters, tied ones once; of a quantised matrix its weights, of however few bits."""
    counted = sum(parameter.numel() for parameter in model.parameters())
    return counted + sum(count_target(module) for module in model.modules() if isinstance(module, QuantizedLinear))


def count_target(module: nn.Module) -> int:
    """Weight parameters of one target, dense or low-rank, quantised or not, without its bias."""
    if isinstance(module, LowRankLinear):
        return count_target(module.left) + count_target(module.right)
    if isinstance(module, QuantizedLinear):
        return module.out_features * module.in_features
    return weight_of(module).numel()


def lost_output(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """`(W - left right) mean`, `[M]`: what a bias must add so that the mean output stays. Computed in float64."""
    mean = mean.double().to(weight.device)
    lost = weight.double() @ mean - left.double().to(weight.device) @ (right.double().to(weight.device) @ mean)
    return lost.to(weight.dtype)


def make_low_rank(
    model: nn.Module, name: str, rank: int, *, add_bias: bool = False, form: Form = "factors"
) -> LowRankLinear:
    """Replace the linear `name` by an empty `LowRankLinear` of that rank and form, on its device and in its dtype.

    A bias is kept; where there is none, `add_bias` makes one of zeros.

    Raises InputError when there is no such linear, or the rank does not fit its shape.
    """
    try:
        linear = model.get_submodule(name)
    except AttributeError as error:
        raise InputError(
            f"{type(model).__name__} has no linear {name}, which the checkpoint's ranks name; open it as the class "
            "that was compressed, with AutoModelForCausalLM, or as its body, with AutoModel."
        ) from error
    if isinstance(linear, nn.Linear):
        m, n = linear.out_features, linear.in_features
    elif isinstance(linear, Conv1D):
        n, m = linear.nx, linear.nf
    else:
        raise InputError(f"{name} is a {type(linear).__name__}, not a linear, so it cannot take rank {rank}.")
    most = min(m, n) - (form == "pivoted")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= most:
        raise InputError(f"The rank of {name} is {rank!r}; legal are whole numbers from 1 to {most}.")
    weight: torch.Tensor = linear.weight
    has_bias = linear.bias is not None
    low = LowRankLinear(n, m, rank, bias=has_bias or add_bias, form=form, device=weight.device, dtype=weight.dtype)
    low.train(linear.training)
    if has_bias:
        low.set_bias(linear.bias)
    elif low.output_bias is not None:
        low.added_bias = True
        nn.init.zeros_(low.output_bias)
    model.set_submodule(name, low)
    return low
