"""`LowRankExperts`: what a module of stacked experts becomes, each of its matrices with a rank of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from unirank.errors import InputError
from unirank.experts import activated, expert_bias, is_experts, is_transposed, routed, stacks_of
from unirank.models.low_rank import stored_tensors, weight_product
from unirank.types import Form


class RaggedFactors(nn.Module):
    """The matrices `[M, N]` of E experts, of which each is low-rank with a rank of its own, or dense; no padding.

    `right` is `[ΣR, N]`, the right factors one below the other, and `left` is one row of numbers, `[Σ M R]`, or in the
    pivoted form `[Σ (M - R) R]`, with `place` int32 `[E_low, M]` as in `LowRankLinear`. Dense matrices are in `dense`,
    `[E_dense, M, N]`, which is not there where all are low-rank. Experts come in their order everywhere.
    """

    left: nn.Parameter
    right: nn.Parameter
    place: torch.Tensor

    def __init__(
        self,
        m: int,
        n: int,
        ranks: Sequence[int | None],
        *,
        form: Form = "factors",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`ranks` has one of every expert; None is dense."""
        super().__init__()
        self.m, self.n, self.ranks = m, n, tuple(ranks)
        self.form: Form = form
        self._rows: list[tuple[int, int]] = []  # of each expert, where it begins in `right` or `dense`, and in `left`
        rows = cells = dense = 0
        for rank in self.ranks:
            self._rows.append((dense, 0) if rank is None else (rows, cells))
            dense += rank is None
            rows += rank or 0
            cells += 0 if rank is None else self._made(rank) * rank

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.right, self.left = empty(rows, n), empty(cells)
        if form == "pivoted":
            place = torch.arange(m, dtype=torch.int32, device=device).repeat(len(self.ranks) - dense, 1)
            self.register_buffer("place", place)
        self.dense: nn.Parameter | None
        self.register_parameter("dense", empty(dense, m, n) if dense else None)

    def _made(self, rank: int) -> int:
        """Outputs that the left factor makes."""
        return self.m - rank if self.form == "pivoted" else self.m

    @property
    def rank(self) -> int:
        """The sum of all ranks."""
        return sum(rank or 0 for rank in self.ranks)

    def count(self, expert: int) -> int:
        """Weight parameters of one expert."""
        rank = self.ranks[expert]
        return self.m * self.n if rank is None else (self.n + self._made(rank)) * rank

    def product(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """x `[T, N]` -> `[T, M]`."""
        tensors = self.tensors(expert)
        if "dense" in tensors:
            return F.linear(x, tensors["dense"])
        inner = F.linear(x, tensors["right.weight"])
        y = F.linear(inner, tensors["left.weight"])
        return torch.cat((inner, y), -1).index_select(1, tensors["place"]) if "place" in tensors else y

    def tensors(self, expert: int) -> dict[str, torch.Tensor]:
        """Views of what is stored of one expert: "dense", or by the names that a `LowRankLinear` has for it."""
        first, cell = self._rows[expert]
        rank = self.ranks[expert]
        if rank is None:
            assert self.dense is not None
            return {"dense": self.dense[first]}
        made = self._made(rank)
        found: dict[str, torch.Tensor] = {
            "left.weight": self.left.narrow(0, cell, made * rank).view(made, rank),
            "right.weight": self.right.narrow(0, first, rank),
        }
        if self.form == "pivoted":
            found["place"] = self.place[sum(r is not None for r in self.ranks[:expert])]
        return found

    @torch.no_grad()
    def put(self, expert: int, left: torch.Tensor, right: torch.Tensor) -> None:
        """Take the weight `left [M, R] @ right [R, N]` of a low-rank expert; dtypes and devices are the module's."""
        own = self.tensors(expert)
        for name, tensor in stored_tensors(left, right, self.form).items():
            own[name].copy_(tensor)

    @torch.no_grad()
    def take_dense(self, stacked: torch.Tensor, *, turned: bool) -> None:
        """Copy the matrices of dense experts from all experts', `[E, M, N]`, or where they are `turned` `[E, N, M]`."""
        for expert, rank in enumerate(self.ranks):
            if rank is None:
                self.tensors(expert)["dense"].copy_(stacked[expert].T if turned else stacked[expert])

    @torch.no_grad()
    def dense_weight(self, expert: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix `[M, N]`, computed in `dtype`."""
        own = self.tensors(expert)
        if "dense" in own:
            return own["dense"].to(dtype)
        return weight_product(own["left.weight"].to(dtype), own["right.weight"].to(dtype), own.get("place"))

    def filled(self, read: Callable[[str], torch.Tensor]) -> RaggedFactors:
        """The same with other tensors, those that `read` gives by name."""
        found: Any = copy.copy(self)
        parameters = {
            name: None if own is None else nn.Parameter(read(name), requires_grad=False)
            for name, own in self._parameters.items()
        }
        found.__dict__ |= {"_parameters": parameters, "_buffers": {name: read(name) for name in self._buffers}}
        return found

    def extra_repr(self) -> str:
        return f"experts={len(self.ranks)}, m={self.m}, n={self.n}, ranks={self.rank} in all, form={self.form}"


class LowRankExperts(nn.Module):
    """Stacked experts with low-rank matrices, called as the dense module is; only experts that are hit run.

    A parameter of the dense module, say `down_proj`, has become `down_proj_factors` (`RaggedFactors`), or is still
    there where no expert's matrix of it has a rank. Its name then belongs to a persistent buffer (int64 `[1]`, the sum
    of the ranks), a guard as in `LowRankLinear`. Biases and all else keep the names that they had.
    """

    def __init__(self, dense: nn.Module) -> None:
        """Take over all that `dense` has; `low_rank` then replaces a parameter."""
        super().__init__()
        if not is_experts(dense):
            raise InputError(f"A {type(dense).__name__} is no module of stacked experts.")
        own: Any = self
        for name, tensor in dense.named_parameters(recurse=False):
            own.register_parameter(name, tensor)
        for name, tensor in dense.named_buffers(recurse=False):
            own.register_buffer(name, tensor, persistent=name not in dense._non_persistent_buffers_set)
        for name, child in dense.named_children():
            own.add_module(name, child)
        # The dense module's gates, norms and numbers, by its own code, on the tensors that are here. In a tuple, so
        # that it is no child.
        code: Any = copy.copy(dense)
        code.__dict__ |= {kind: self.__dict__[kind] for kind in ("_parameters", "_buffers", "_modules")}
        self._code = (code,)
        self.stacks = stacks_of(dense)
        self.count = getattr(dense, self.stacks[0]).shape[0]
        self.added_bias: tuple[str, ...] = ()  # parameters whose biases are not the dense module's
        self.train(dense.training)

    def low_rank(
        self, name: str, ranks: Sequence[int | None], *, add_bias: bool = False, form: Form = "factors"
    ) -> None:
        """Make room for factors of these ranks in the place of the parameter `name`.

        Dense matrices (None) are copied. With `add_bias`, a parameter without biases gets zeros.
        """
        stacked = getattr(self, name)
        turned = self.turned
        m, n = stacked.shape[:0:-1] if turned else stacked.shape[1:]
        factors = RaggedFactors(m, n, ranks, form=form, device=stacked.device, dtype=stacked.dtype)
        if not stacked.is_meta:
            factors.take_dense(stacked, turned=turned)
        delattr(self, name)
        total = torch.full((1,), factors.rank, dtype=torch.int64, device=stacked.device)
        self.register_buffer(name, total)
        self.add_module(f"{name}_factors", factors.train(self.training))
        if add_bias and getattr(self, f"{name}_bias", None) is None:
            zeros = torch.zeros((self.count, m), device=stacked.device, dtype=stacked.dtype)
            self.register_parameter(f"{name}_bias", nn.Parameter(zeros))
            self.added_bias = (*self.added_bias, name)

    @property
    def turned(self) -> bool:
        """Whether the dense module's parameters are `[E, N, M]`."""
        return is_transposed(self._code[0])

    def factors(self, name: str) -> RaggedFactors | None:
        """What stands in the place of the parameter `name`; None where it is dense."""
        found = self._modules.get(f"{name}_factors")
        return found if isinstance(found, RaggedFactors) else None

    def count_target(self, name: str, expert: int) -> int:
        """Weight parameters of one expert's matrix, without its bias."""
        factors = self.factors(name)
        return getattr(self, name)[expert].numel() if factors is None else factors.count(expert)

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`[T, D]`, the experts `[T, k]` of every token and their weights `[T, k]` -> `[T, D]`.

        Of Llama 4's kind, `[E T, D]` alone -> `[E T, D]`; what is zero stays zero.
        """
        if top_k_index is None or top_k_weights is None:
            return self._for_all_tokens(hidden_states)
        tokens, each = top_k_index.shape
        weights = top_k_weights.reshape(-1, 1)
        dtype = torch.promote_types(hidden_states.dtype, weights.dtype)
        # Every token's results have places of their own, so that they are added in one order however they were made.
        made = hidden_states.new_zeros((tokens * each, hidden_states.shape[-1]), dtype=dtype)
        for expert, rows in enumerate(routed(top_k_index, self.count)):
            if len(rows):
                weighted = self.run(expert, hidden_states[rows // each]) * weights[rows]
                made.index_copy_(0, rows, weighted.to(dtype))
        return made.view(tokens, each, -1).sum(1).to(hidden_states.dtype)

    def dense_stack(self, name: str, read: Callable[[str], torch.Tensor] | None = None) -> torch.Tensor:
        """What the dense module has as the parameter `name`: products, computed in float32, in this module's dtype.

        `read` gives the tensors of its factors by name; None takes those that are here.
        """
        factors = self.factors(name)
        if factors is None:
            return getattr(self, name).detach()
        own = factors if read is None else factors.filled(read)
        weights = (own.dense_weight(expert) for expert in range(self.count))
        turned = self.turned
        return torch.stack([(weight.T if turned else weight).to(own.right.dtype) for weight in weights])

    def dense_shape(self, name: str) -> torch.Size:
        """The shape of the dense module's parameter `name`."""
        factors = self.factors(name)
        if factors is None:
            return getattr(self, name).shape
        sides = (factors.n, factors.m) if self.turned else (factors.m, factors.n)
        return torch.Size((self.count, *sides))

    def dense_module(self, stacks: Mapping[str, nn.Parameter]) -> nn.Module:
        """A module of the dense class with these parameters, and all else that is here."""
        dense: Any = copy.copy(self._code[0])
        parameters = dict(stacks) | {name: own for name, own in self._parameters.items() if name not in stacks}
        buffers = {name: own for name, own in self._buffers.items() if name not in stacks}
        modules = {name: own for name, own in self._modules.items() if not isinstance(own, RaggedFactors)}
        dense.__dict__ |= {"_parameters": parameters, "_buffers": buffers, "_modules": modules}
        return dense.train(self.training)

    def _for_all_tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        made = torch.zeros_like(flat)
        each = len(flat) // self.count
        for expert, x in enumerate(flat.split(each)):
            rows = (x != 0).any(1).nonzero().squeeze(1)
            if len(rows):
                made.index_copy_(0, rows + expert * each, self.run(expert, x[rows]))
        return made

    def run(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """x `[T, D]` -> `[T, D]`, by one expert."""
        code, (first, second) = self._code[0], self.stacks
        y = self._product(second, expert, activated(code, self._product(first, expert, x)))
        return code.post_expert_norm(y) if getattr(code, "has_post_expert_norm", False) else y

    def _product(self, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        factors = self.factors(name)
        if factors is None:
            weight = getattr(self, name)[expert]
            y = F.linear(x, weight.T if self.turned else weight)
        else:
            y = factors.product(expert, x)
        bias = expert_bias(self, name, expert)
        return y if bias is None else y + bias


def make_low_rank_experts(
    model: nn.Module,
    path: str,
    ranks: Mapping[str, Mapping[int, int]],
    *,
    biased: Collection[str] = (),
    form: Form = "factors",
) -> LowRankExperts:
    """Replace the module of experts at `path` by an empty `LowRankExperts`, on its device and in its dtype.

    Args:
        ranks: by parameter and expert; experts without one stay dense.
        biased: parameters whose matrices get biases of zeros where the module has none.

    Raises InputError when there is no such module, parameter or expert, or a rank does not fit.
    """
    try:
        dense = model.get_submodule(path)
    except AttributeError as error:
        raise InputError(_no_experts(model, path)) from error
    if not is_experts(dense):
        raise InputError(_no_experts(model, path))
    experts = LowRankExperts(dense)
    for name, known in ranks.items():
        if name not in experts.stacks:
            raise InputError(f"{path} has the stacks {' and '.join(experts.stacks)}, and ranks name {name[:80]!r}.")
        most = min(getattr(experts, name).shape[1:]) - (form == "pivoted")
        for expert, rank in known.items():
            if not 0 <= expert < experts.count:
                raise InputError(f"{path}.{name} has {experts.count} experts, and ranks name the number {expert}.")
            if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= most:
                raise InputError(
                    f"The rank of {path}.{name}.{expert} is {rank!r}; legal are whole numbers from 1 to {most}."
                )
        each = [known.get(expert) for expert in range(experts.count)]
        experts.low_rank(name, each, add_bias=name in biased, form=form)
    model.set_submodule(path, experts)
    return experts


def check_expert_guards(model: nn.Module) -> None:
    """Raise InputError for low-rank experts that were loaded without their weights: random ones or zeros."""
    for path, module in model.named_modules():
        if isinstance(module, LowRankExperts):
            for name in module.stacks:
                factors, guard = module.factors(name), getattr(module, name)
                if factors is not None and not guard.is_meta and guard.tolist() != [factors.rank]:
                    raise InputError(
                        f"{type(model).__name__} found no low-rank weights for {path}.{name} in the checkpoint and "
                        "would start from random ones; open it as the class that was compressed, with "
                        "AutoModelForCausalLM."
                    )


def _no_experts(model: nn.Module, path: str) -> str:
    return (
        f"{type(model).__name__} has no stacked experts at {path}, which the checkpoint's ranks name; open it as the "
        "class that was compressed, with AutoModelForCausalLM."
    )
