"""Frozen records that pass between the stages. Axis letters: M out_features, N in_features, K = min(M, N), R rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from unirank import looks
from unirank.disk.strictjson import Damaged, build, number
from unirank.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Sublayer = str  # a name for people, from the module tree: see `models.structure.find_linears`
SUBLAYERS: tuple[Sublayer, ...] = ("attention", "mlp")  # of a layer that has two
BLOCK: Final = "block"  # the whole layer, where a sublayer could stand
DENSE: Final = "dense"
Rank = int | Literal["dense"]
Form = Literal["factors", "pivoted"]  # how a low-rank matrix is stored, and so what a rank costs
FORMS: tuple[Form, ...] = ("factors", "pivoted")


def sublayers_of(linears: Iterable[LinearSpec]) -> tuple[Sublayer, ...]:
    """The sublayers of `linears`, each once, in the order in which they come first."""
    return tuple(dict.fromkeys(spec.sublayer for spec in linears))


def rank_cost(m: int, n: int, rank: Rank, form: Form = "factors") -> int:
    """Parameters that `rank` keeps of an `[M, N]` matrix.

    Two factors cost `min(R (M + N), M N)`, the pivoted form `R (M + N - R)`, which is `M N` at `R = K` (method 9).
    """
    if rank == DENSE:
        return m * n
    r = int(rank)
    return min(r * (m + n) - (r * r if form == "pivoted" else 0), m * n)


def stack_of(name: str) -> str | None:
    """The stack of which the target `name` is one expert's matrix, without the number; None of any other target."""
    stack, _, number = name.rpartition(".")
    return stack if number.isdecimal() else None


@dataclass(frozen=True)
class LinearSpec:
    """One target: a linear map `y = W x + b` inside a decoder layer, with `W [M, N]`."""

    name: str  # path from the model's root, "model.layers.0.self_attn.q_proj"
    layer: int
    sublayer: Sublayer
    kind: str  # path inside the layer, "self_attn.q_proj": equal for the same projection of every layer
    m: int
    n: int

    @property
    def params(self) -> int:
        """Weight parameters of the dense matrix, `M N`."""
        return self.m * self.n

    @property
    def cost(self) -> int:
        """Parameters of one kept component, `M + N`."""
        return self.m + self.n

    @property
    def k(self) -> int:
        """Number of components, `min(M, N)`."""
        return min(self.m, self.n)

    @property
    def max_rank(self) -> int:
        """`ceil(r*)`, `r* = M N / (M + N)`: from this rank on the dense matrix is cheaper than two factors."""
        return -(-self.params // self.cost)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> LinearSpec:
        """Read what `dataclasses.asdict` gave, of its kinds too. Raises Damaged for anything else."""
        spec = build(_kind_of(record), record)
        whole = all(type(size) is int for size in (spec.layer, spec.m, spec.n))
        if not (whole and spec.layer >= 0 and spec.m > 0 and spec.n > 0):
            raise Damaged(f"the linear {str(spec.name)[:80]!r} is not legal")
        if not all(isinstance(name, str) for name in (spec.name, spec.kind, spec.sublayer)):
            raise Damaged("a linear has no name")
        if spec.sublayer in ("", BLOCK):
            raise Damaged(f"the linear {spec.name[:80]!r} has no legal sublayer")
        if isinstance(spec, ExpertSpec) and not (
            type(spec.expert) is int
            and type(spec.transposed) is bool
            and spec.name == f"{spec.module}.{spec.parameter}.{spec.expert}"
        ):
            raise Damaged(f"the expert {spec.name[:80]!r} is not legal")
        if isinstance(spec, ListedSpec) and not (
            type(spec.member) is int and f"{spec.name}.".startswith(f"{spec.networks}.{spec.member}.")
        ):
            raise Damaged(f"the linear {spec.name[:80]!r} is not legal")
        return spec

    def rank_cost(self, rank: Rank, form: Form = "factors") -> int:
        """Parameters that `rank` keeps of this matrix: see `rank_cost`."""
        return rank_cost(self.m, self.n, rank, form)

    def dense_rank(self, form: Form) -> int:
        """The least rank that costs as much as the dense matrix: `ceil(r*)`, in the pivoted form K."""
        return self.k if form == "pivoted" else self.max_rank

    def stored_in(self, model: nn.Module) -> torch.Tensor:
        """What `model` has by the name of the weight, however it is stored; low-rank, it is a vector."""
        weight: Any = model.get_submodule(self.name).weight
        return weight


@dataclass(frozen=True)
class ExpertSpec(LinearSpec):
    """One matrix of one expert, of those that a module stacks in a parameter `[E, M, N]`, or `[E, N, M]`.

    Its name is the parameter's and the expert's number, "model.layers.0.mlp.experts.down_proj.3"; its kind is without
    the number.
    """

    expert: int
    transposed: bool  # whether the parameter is `[E, N, M]`

    @property
    def parameter(self) -> str:
        """The parameter's own name, "down_proj"."""
        return self.name.split(".")[-2]

    @property
    def module(self) -> str:
        """The path of the module that holds the experts, from the model's root."""
        return self.name.rsplit(".", 2)[0]

    def stored_in(self, model: nn.Module) -> torch.Tensor:
        """The parameter of all experts; low-rank, it is a vector."""
        weight: Any = getattr(model.get_submodule(self.module), self.parameter)
        return weight


def _kind_of(record: object) -> type[LinearSpec]:
    keys = record if isinstance(record, dict) else ()
    return ExpertSpec if "expert" in keys else ListedSpec if "member" in keys else LinearSpec


@dataclass(frozen=True)
class ListedSpec(LinearSpec):
    """A linear of one of the networks that a module keeps in a list, of which each may see some of the tokens only."""

    networks: str  # the list's path from the model's root, "model.layers.0.mlp.experts"
    member: int  # the network's number

    @property
    def siblings(self) -> str:
        """Equal for the same linear of every network of the list."""
        return f"{self.networks}.*{self.name.removeprefix(f'{self.networks}.{self.member}')}"


class Paging(Protocol):
    """Where the weights of decoder layers are that are not in memory; see `unirank.pages`."""

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor `name`, read now."""
        ...

    def reader(self, name: str) -> Callable[[], torch.Tensor]:
        """What reads `tensor(name)` as it is now, whatever is put there later."""
        ...

    def put(self, name: str, make: Callable[[], torch.Tensor]) -> None:
        """From now on `tensor(name)` is what `make()` gives."""
        ...

    def stamp(self, name: str) -> Hashable:
        """Changes when `tensor(name)` does; None where nothing tells."""
        ...

    def resident(self, model: nn.Module, index: int, then: int | None = None) -> AbstractContextManager[None]:
        """Layer `index` of `model` is in memory inside, and layer `then` is read meanwhile."""
        ...


@dataclass(frozen=True)
class Companions:
    """Small files beside the weights of a checkpoint, which go into every checkpoint that is made from it.

    Attributes:
        files: contents by name; a name has at most one folder.
        tokenizer: the same of the tokenizer's own files, which go along with that tokenizer alone.
        origin: where that tokenizer was loaded from, as it says itself.
    """

    files: Mapping[str, bytes] = field(repr=False)
    tokenizer: Mapping[str, bytes] = field(repr=False)
    origin: str


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model with its targets found by structure."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layers: str  # path of the ModuleList that holds the decoder layers
    linears: tuple[LinearSpec, ...]  # in execution order of layers, then module order
    source: str  # what the caller asked for
    pages: Paging | None = None  # of a model that is read layer by layer
    companions: Companions | None = field(default=None, compare=False, repr=False)
    # What `analysis.identity.weights_hash` found, by kind, with what tells whether it still holds.
    hashes: dict[str, tuple[Any, str]] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __repr__(self) -> str:
        held = sum(parameter.numel() for parameter in self.model.parameters() if not parameter.is_meta)
        streamed = "" if self.pages is None else "; the decoder layers stay in its files"
        targets = sum(spec.params for spec in self.linears)
        return looks.lines(
            f"LoadedModel: {type(self.model).__name__} of {self.source}",
            f"{held:,} parameters in memory, {str(self.model.dtype).removeprefix('torch.')}{streamed}",
            f"{len(self.linears)} linears in {self.layer_count} decoder layers, {targets:,} parameters: the targets",
            "next: unirank.analyze(loaded, STORE); unirank.compress(loaded, 0.2)",
        )

    @property
    def device(self) -> torch.device:
        """Where tokens go: the device of the parameters in memory (in CpmAnt, layers that are not come first)."""
        return next(parameter.device for parameter in self.model.parameters() if not parameter.is_meta)

    def resident(self, index: int, then: int | None = None) -> AbstractContextManager[None]:
        """The weights of layer `index` are in memory inside; those of a model loaded as a whole always are.

        Where they are not, those of layer `then`, the next one, are read meanwhile; None, or a number that no layer
        has, for none.
        """
        if self.pages is None:
            return nullcontext()
        return self.pages.resident(self.model, index, then if then in range(self.layer_count) else None)

    def state(self, *, by_name: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors of the model in its order, or by name; one at a time in memory where it is streamed."""
        state = self.model.state_dict()
        for name, tensor in sorted(state.items()) if by_name else state.items():
            yield name, tensor if self.pages is None or not tensor.is_meta else self.pages.tensor(name)

    def require_whole(self, what: str) -> None:
        """Raise InputError where `what` needs all layers in memory and they are not."""
        if self.pages is not None:
            raise InputError(f"{what} needs the whole model in memory; load it without streaming.")

    def require_dense(self) -> None:
        """Raise InputError where targets were replaced by low-rank ones since the model was loaded."""
        # A low-rank linear holds a guard in the place of the weight matrix: a vector.
        if any(spec.stored_in(self.model).dim() < 2 for spec in self.linears):
            raise InputError(
                f"The model {self.source} was compressed in place by an earlier apply, truncate or refine; load it "
                "again, or compress a copy with apply(..., copy=True)."
            )

    def require_no_experts(self, what: str) -> None:
        """Raise InputError where `what` cannot be had for experts, and there are some among the targets."""
        refuse_experts_for(what, self.linears)

    @property
    def layer_count(self) -> int:
        return self.linears[-1].layer + 1


def refuse_experts_for(what: str, linears: Iterable[LinearSpec]) -> None:
    """Raise InputError where `what` cannot be had for experts, stacked or listed, and there are some in `linears`."""
    expert = next((spec for spec in linears if isinstance(spec, ExpertSpec | ListedSpec)), None)
    if expert is not None:
        where = expert.module if isinstance(expert, ExpertSpec) else expert.networks
        raise InputError(
            f"{what} is not available for mixtures of experts, of which each sees some tokens only ({where}); "
            "preset='unirank' is, and every scheme without gradients with every allocator that measures nothing."
        )


@dataclass(frozen=True)
class Moment:
    """Moments of one input, float64, means over `tokens`: `c [N, N]` of `x xᵀ`, `mean [N]`, `mean_abs [N]` of `|x|`."""

    c: torch.Tensor
    mean: torch.Tensor
    tokens: int
    mean_abs: torch.Tensor | None = None


@dataclass(frozen=True)
class Gradient:
    """Gradients of the loss (summed token NLL) at one linear's output, `g = ∂L/∂y`, and at its weight.

    Attributes:
        g: `[M, M]`, mean over tokens of `g gᵀ`.
        rows: `[M]`, mean over windows of the squared entries of a window's `∂L/∂W`, summed along each row.
        weight: `[M, N]`, mean over tokens of `g xᵀ`.
    """

    g: torch.Tensor
    rows: torch.Tensor
    weight: torch.Tensor


@dataclass(frozen=True)
class CosineStat:
    """Token cosines between the stream that enters and the stream that leaves a sublayer or a whole block."""

    total: float
    total_of_squares: float
    tokens: int

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> CosineStat:
        """Read what `dataclasses.asdict` gave. Raises Damaged for anything else."""
        stat = build(cls, record)
        if not (type(stat.tokens) is int and stat.tokens > 0):
            raise Damaged(f"cosines over {str(stat.tokens)[:80]} tokens")
        for key in ("total", "total_of_squares"):
            number(getattr(stat, key), key)
        return stat

    @property
    def mean(self) -> float:
        return self.total / self.tokens


@dataclass(frozen=True)
class LayerStats:
    """What calibration saw of one decoder layer."""

    layer: int
    moments: Mapping[str, Moment]  # by the name of the first linear that reads the input
    input_of: Mapping[str, str]  # linear -> key of `moments`
    cosines: Mapping[str, CosineStat]  # by sublayer, and "block"
    shares: Mapping[str, float] = field(default_factory=dict)  # of the router's weight, by expert's matrix


@dataclass(frozen=True)
class Factors:
    """`W ≈ left @ right`: `left [M, R]`, `right [R, N]`, `energy [K]`, float64, descending; R = K.

    In stores up to format 4 R is ceil(r*).

    Attributes:
        damping: relative to the mean diagonal of what was damped; 0 when nothing was.
        mean: `[N]`, the input whose output a bias restores after truncation, or None (see the scheme `afm`).
        curvature: `[R]`, second-order estimate of the loss increase of dropping each component alone (times 2).
        slope: `[R]`, first-order estimate of the same. Both need gradients; None without them.
    """

    left: torch.Tensor
    right: torch.Tensor
    energy: torch.Tensor
    damping: float
    mean: torch.Tensor | None = None
    curvature: torch.Tensor | None = None
    slope: torch.Tensor | None = None

    def __repr__(self) -> str:
        (m, kept), n = self.left.shape, self.right.shape[1]
        held = [name for name in ("mean", "curvature", "slope") if getattr(self, name) is not None]
        return looks.lines(
            f"Factors: {m} x {n}, {kept} of {len(self.energy)} components, {str(self.left.dtype)[6:]}",
            f"effective rank {effective_rank(self.energy):.1f}; damping {self.damping:g}",
            f"with {', '.join(held)}" if held else "",
        )


def effective_rank(weights: torch.Tensor) -> float:
    """`exp(-Σ p ln p)`, `p = weights / Σ weights` (Roy and Vetterli 2007): between 1 and K; 0 where all weights are 0.

    Args:
        weights: `[K]`, not negative; energies `sigma²` or singular values `sigma`.
    """
    weights = weights.double()
    total = weights.sum()
    if total <= 0:
        return 0.0
    shares = weights / total
    return math.exp(-float(shares.xlogy(shares).sum()))
