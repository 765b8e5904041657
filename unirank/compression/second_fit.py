"""The second fit of one linear: moments of what enters it in both streams, and the best map from them (method 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from unirank import ops
from unirank.analysis.scheme.base import WORK_DTYPE
from unirank.analysis.scheme.two_sided import Target, damped, solve
from unirank.errors import InputError, NonFiniteError
from unirank.layerwise.clipping import clip_factors, scaled
from unirank.layerwise.products import cross_moment
from unirank.models.low_rank import make_low_rank
from unirank.models.structure import weight_of
from unirank.types import DENSE, Form, LinearSpec, LoadedModel, Rank

# Of a moment's mean diagonal: what is left below it when the mean is taken out is rounding, for Gram matrices multiply
# in float32 (docs/numerics.md; measured with one token everywhere: 1e-7).
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Refine:
    """How the second pass fits.

    Attributes:
        mix: `b` in [0, 1]. 1 aims at the dense model's outputs (AA-SVD), 0 at the dense weights on the new inputs
            (re-whitening, SVD-LLM at high ratios), between them SAES-SVD's mixture.
        damping: of the inputs' mean diagonal; pulls the fit to the dense weight (**choice**), so that it never follows
            directions that few tokens show.
        metric: fit in the output metric of `kfac`; needs a store with gradients.
        metric_damping: of the output gradients' mean diagonal, where gradients give the output metric.
        centred: fit the centred streams and restore the mean output with a bias (`afm`). A linear that keeps its full
            rank and has no bias gets none, for a checkpoint has no place for it; its streams are then fitted as they
            are (**choice**), which sees the mean too.
        dense: also fit the linears that keep their full rank.
    """

    mix: float = 0.5
    damping: float = 1e-2
    metric: bool = False
    metric_damping: float = 1e-2
    centred: bool = False
    dense: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.mix <= 1:
            raise InputError(f"mix = {self.mix} is not legal; it lies between 0 and 1.")
        for name in ("damping", "metric_damping"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"{name} = {getattr(self, name)} is not legal; it is above 0 and at most 1.")


@dataclass
class Pair:
    """Running sums over tokens of an input of the dense (`x`) and of the compressed (`x'`) stream, float64.

    Attributes:
        clip: a token whose `x'` is longer than this many times the median of its batch counts in both streams with the
            one factor that brings `x'` there (see `unirank.layerwise.clipping`), so that the map between the two that
            it asks for is the same; 0 clips nothing.
    """

    own: torch.Tensor  # x' x'ᵀ
    cross: torch.Tensor  # x x'ᵀ
    own_sum: torch.Tensor
    dense_sum: torch.Tensor
    tokens: int = 0
    clip: float = 0.0

    @classmethod
    def zeros(cls, n: int, device: torch.device, *, clip: float = 0.0) -> Pair:
        def make(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=WORK_DTYPE, device=device)

        return cls(make(n, n), make(n, n), make(n), make(n), clip=clip)

    def add(self, dense: torch.Tensor, own: torch.Tensor) -> None:
        """Account for the same tokens in both streams, `[T, N]`, of one dtype."""
        factors = clip_factors(own, self.clip)
        dense, own = scaled(dense, factors), scaled(own, factors)
        ops.gram_accumulate_(self.own, self.own_sum, own)
        self.cross += cross_moment(dense, own)
        self.dense_sum += dense.sum(0, dtype=WORK_DTYPE)
        self.tokens += len(own)


@torch.no_grad()
def fit(
    loaded: LoadedModel,
    spec: LinearSpec,
    rank: Rank,
    pair: Pair,
    g: torch.Tensor | None,
    settings: Refine,
    form: Form = "factors",
) -> None:
    """Put the best map of that rank from `x'` to `W (b x + (1 - b) x')` in the linear's place; b is `settings.mix`.

    Where the fit is centred, what its weights make of the mean input is put right by the bias. A linear of low rank is
    given one where it has none; a dense one cannot be (a checkpoint of its class has no place for it), so that one is
    fitted to the second moment about zero, of which the mean is a part.

    Args:
        rank: R, or "dense" for the full one.
        pair: of the linear's input.
        g: `[M, M]`, the second moment of the gradients at its output, for the output metric of `kfac`; None for none.
            A map of full rank is the same in every metric.
        form: in which a low-rank map is stored.

    Raises NonFiniteError when the fit is NaN or infinity, also in the dtype of the model; names the linear. The linear
    is then as it was.
    """
    module = loaded.model.get_submodule(spec.name)
    dense = weight_of(module)
    weight = dense.to(WORK_DTYPE)
    centred = settings.centred and (rank != DENSE or module.bias is not None)
    own, cross = pair.own / pair.tokens, pair.cross / pair.tokens
    own_mean, dense_mean = pair.own_sum / pair.tokens, pair.dense_sum / pair.tokens
    if centred:
        scale = own.diagonal().mean()
        own, cross = own - torch.outer(own_mean, own_mean), cross - torch.outer(dense_mean, own_mean)
        if own.diagonal().mean() <= _ROUNDING * scale:  # one and the same input in every token: the rest is rounding
            own, cross = torch.zeros_like(own), torch.zeros_like(cross)
    ridge = damped(own, settings.damping) - own
    factor, failed = torch.linalg.cholesky_ex(own + ridge)
    if bool(failed):
        raise NonFiniteError(f"The moment of the inputs of {spec.name} is not positive definite, so it has no fit.")
    aim = settings.mix * cross + (1 - settings.mix) * own + ridge
    best = torch.cholesky_solve((weight @ aim).T, factor).T
    if rank == DENSE:
        maps = (best,)
    else:
        metric = None if g is None else damped(g, settings.metric_damping)
        (factors,) = solve([Target(best, own + ridge, metric, int(rank))])
        maps = (factors.left, factors.right)
    lost = None
    if centred:
        aimed_mean = settings.mix * dense_mean + (1 - settings.mix) * own_mean
        lost = weight @ aimed_mean - _applied(maps, own_mean)
    _put(loaded, spec, rank, module, tuple(m.to(dense.dtype) for m in maps), lost, form)


def _applied(maps: tuple[torch.Tensor, ...], x: torch.Tensor) -> torch.Tensor:
    for m in reversed(maps):
        x = m @ x
    return x


def _put(
    loaded: LoadedModel,
    spec: LinearSpec,
    rank: Rank,
    module: nn.Module,
    maps: tuple[torch.Tensor, ...],
    lost: torch.Tensor | None,
    form: Form,
) -> None:
    """Write the maps, of the model's dtype, and what is to be added to the bias, float64."""
    bias = None
    if lost is not None:
        before = module.bias
        bias = (lost + before if isinstance(before, torch.Tensor) else lost).to(maps[0].dtype)
    if not all(bool(tensor.isfinite().all()) for tensor in (*maps, bias) if tensor is not None):
        raise NonFiniteError(f"The second fit of {spec.name} is NaN or infinity in {maps[0].dtype}.")
    if rank == DENSE:
        weight_of(module).copy_(maps[0])
        target = module.bias
    else:
        low = make_low_rank(loaded.model, spec.name, int(rank), add_bias=bias is not None, form=form)
        low.set_product(*maps)
        target = low.output_bias
    if bias is not None:
        assert isinstance(target, torch.Tensor)
        target.copy_(bias)
