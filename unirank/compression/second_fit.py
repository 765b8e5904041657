"""The second fit of one linear: moments of what enters it in both streams, and the best map from them (method 3)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from unirank import ops
from unirank.analysis.scheme.base import WORK_DTYPE, eigh_descending
from unirank.analysis.scheme.two_sided import damped, gram
from unirank.errors import InputError, NonFiniteError
from unirank.layerwise.clipping import clip_factors, scaled
from unirank.layerwise.products import add_cross_moment_
from unirank.layerwise.shrinkage import shrink_, shrink_cross_
from unirank.models import factoring
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
        shrink: share in [0, 1] by which the covariance of `x'` is drawn towards its diagonal, and that of `x - x'` with
            `x'` towards 0 (see `unirank.layerwise.shrinkage`), so that the fit comes nearer to the dense weight
            (**choice**, docs/experiments.md). Its own: it is not that of the analysis.
        metric: fit in the output metric of `kfac`; needs a store with gradients.
        metric_damping: of the output gradients' mean diagonal, where gradients give the output metric.
        centred: fit the centred streams and restore the mean output with a bias (`afm`). A linear that keeps its full
            rank and has no bias gets none, for a checkpoint has no place for it; its streams are then fitted as they
            are (**choice**), which sees the mean too.
        dense: also fit the linears that keep their full rank.
    """

    mix: float = 0.5
    damping: float = 1e-2
    shrink: float = 0.3
    metric: bool = False
    metric_damping: float = 1e-2
    centred: bool = False
    dense: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.mix <= 1:
            raise InputError(f"mix = {self.mix} is not legal; it lies between 0 and 1.")
        if not 0 <= self.shrink <= 1:
            raise InputError(f"shrink = {self.shrink} is not legal; it lies between 0 and 1.")
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
    _equations: dict[bool, Equations] = field(default_factory=dict, repr=False)

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
        add_cross_moment_(self.cross, dense, own)
        self.dense_sum += dense.sum(0, dtype=WORK_DTYPE)
        self.tokens += len(own)
        self._equations.clear()

    def equations(self, settings: Refine, *, centred: bool) -> Equations:
        """What the linears that read this input share; made once, so always ask with the same `settings`."""
        if centred not in self._equations:
            self._equations[centred] = self._normal(settings, centred)
        return self._equations[centred]

    def _normal(self, settings: Refine, centred: bool) -> Equations:
        own, cross = self.own / self.tokens, self.cross / self.tokens
        own_mean, dense_mean = self.own_sum / self.tokens, self.dense_sum / self.tokens
        if centred:
            scale = own.diagonal().mean()
            own, cross = own - torch.outer(own_mean, own_mean), cross - torch.outer(dense_mean, own_mean)
            if (
                own.diagonal().mean() <= _ROUNDING * scale
            ):  # one and the same input in every token: the rest is rounding
                own, cross = torch.zeros_like(own), torch.zeros_like(cross)
        moved = cross - own
        if settings.shrink:
            still = torch.zeros_like(own_mean)
            first, other = (still, still) if centred else (own_mean, dense_mean - own_mean)
            shrink_(own, first, settings.shrink)
            shrink_cross_(moved, other, first, settings.shrink)
        moment = damped(own, settings.damping)
        factor, failed = factoring.cholesky_ex(moment)
        aim = moment + settings.mix * moved
        return Equations(
            aim, None if bool(failed) else factor, own_mean, settings.mix * dense_mean + (1 - settings.mix) * own_mean
        )


@dataclass(frozen=True)
class Equations:
    """`B S' = W aim`, what the best map `B` of a weight `W` solves; `S'` is damped.

    Attributes:
        aim: `b X + (1 - b) S'` and the damping, `[N, N]`.
        factor: lower triangular `[N, N]`, `factor factorᵀ = S'`; None where S' is not positive definite.
        own_mean: `[N]`, of `x'`.
        aimed_mean: `[N]`, of `b x + (1 - b) x'`.
    """

    aim: torch.Tensor
    factor: torch.Tensor | None
    own_mean: torch.Tensor
    aimed_mean: torch.Tensor


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
    equations = pair.equations(settings, centred=centred)
    factor = equations.factor
    if factor is None:
        raise NonFiniteError(f"The moment of the inputs of {spec.name} is not positive definite, so it has no fit.")
    wanted = weight @ equations.aim
    if rank == DENSE:
        maps = (factoring.cholesky_solve(wanted.T, factor).T,)
    else:
        metric = None if g is None else factoring.cholesky(damped(g, settings.metric_damping), upper=True)
        maps = _of_rank(int(rank), wanted, factor, metric)
    lost = None
    if centred:
        lost = weight @ equations.aimed_mean - _applied(maps, equations.own_mean)
    _put(loaded, spec, rank, module, tuple(m.to(dense.dtype) for m in maps), lost, form)


def _of_rank(
    rank: int, wanted: torch.Tensor, factor: torch.Tensor, a: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """left `[M, R]` and right `[R, N]` of `A⁻¹ U_r U_rᵀ A B`, `B` the solution of `B S' = wanted [M, N]`.

    With `S' = L Lᵀ` and `Zᵀ = A B L`, `U` are the left singular vectors of Zᵀ: the eigenvectors of `Zᵀ Z [M, M]`, or
    for a tall map `Zᵀ V / sigma`, `V` the eigenvectors of `Z Zᵀ [N, N]`. The latter are not used as such: `U_r U_rᵀ Zᵀ`
    is `Zᵀ V_r V_rᵀ`, which loses nothing where sigma is small.

    Args:
        factor: L.
        a: A, upper triangular `[M, M]`; None for the identity.
    """
    z = factoring.solve_triangular(factor, (wanted if a is None else a @ wanted).T, upper=False)
    tall = wanted.shape[0] > wanted.shape[1]
    ((_, vectors),) = eigh_descending([gram(z.T.contiguous() if tall else z)])
    vectors = vectors[:, :rank]
    if tall:
        left = z.T @ vectors
        norms = left.norm(dim=0)
        norms = norms.where(norms > 0, 1.0)
        left, inner = left / norms, vectors * norms
    else:
        left, inner = vectors, z @ vectors
    right = factoring.solve_triangular(factor.T, inner, upper=True).T
    return left if a is None else factoring.solve_triangular(a, left, upper=True), right


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
