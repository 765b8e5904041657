"""Decompose the linears of one layer with a scheme; failures and non-finite results carry the layer's name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch

from unirank.analysis.overlap import Solvers, entries_of_work
from unirank.analysis.scheme.base import WORK_DTYPE, Problem, Scheme
from unirank.distributed import owners, rank, send_to_zero, size
from unirank.errors import NonFiniteError, UnirankError, is_out_of_memory
from unirank.models.targets import target_weight
from unirank.queues import has_queues
from unirank.types import Factors, Gradient, LayerStats, LinearSpec, LoadedModel, Moment

# Bytes of work that are done at once. (choice: a few small layers' worth, and one matrix of a large one)
_ROOM = 1 << 30


@torch.no_grad()
def decompose_layer(
    loaded: LoadedModel,
    stats: LayerStats,
    scheme: Scheme,
    gradients: Mapping[str, Gradient] | None = None,
    *,
    weights: Mapping[str, torch.Tensor] | None = None,
    solvers: Solvers | None = None,
    full: bool = True,
    work: torch.dtype = WORK_DTYPE,
) -> dict[str, Factors]:
    """Factors of the linears of layer `stats.layer` that `stats` tells of, rounded to the dtype of the model's weights.

    Up to K, or without `full` up to ceil(r*), as a store of an older format that is gone on with has them.
    With `gradients` (by linear), each component also gets its curvature and its slope, whatever the scheme. Of several
    processes each decomposes some of the linears; process 0 returns all of them, the others their own.

    Args:
        weights: of the layer's linears by name, as `weights_of_layer` gives them, for a layer that may leave memory
            meanwhile; None takes the model's.
        solvers: of a GPU, whose threads share the linears out; None solves one part after the other. The same bits.
        work: the dtype of the decomposition, float64 or float32.

    Raises:
        UnirankError: the solver failed; names the layer. Errors of memory pass as they are.
        NonFiniteError: a factor or an energy is NaN or infinity (or does not fit the dtype); names the linear.
    """
    weights = weights_of_layer(loaded, stats.layer) if weights is None else weights
    members = [spec for spec in loaded.linears if spec.layer == stats.layer and spec.name in stats.input_of]
    owner_of = owners([float(spec.params) * spec.k for spec in members])
    own = [spec for spec, owner in zip(members, owner_of, strict=True) if owner == rank()]
    read = {stats.input_of[spec.name] for spec in own} if stats.moments else ()
    moments = {name: _moment_in(work, stats.moments[name]) for name in read}
    problems = []
    for spec in own:
        moment = moments[stats.input_of[spec.name]] if moments else None
        gradient = _gradient_in(work, gradients[spec.name]) if gradients else None
        max_rank = spec.k if full else spec.max_rank
        problems.append(Problem(spec.name, weights[spec.name], moment, max_rank, gradient, work))
    solve = partial(_solved, f"{loaded.layers}.{stats.layer}", scheme)
    parts = _parts(problems)
    solved = map(solve, parts) if solvers is None else solvers.map(solve, parts, _size)
    found = {name: factors for part in solved for name, factors in part.items()}
    return _gathered({spec.name: found[spec.name] for spec in own}, members, owner_of, weights[members[0].name])


def weights_of_layer(loaded: LoadedModel, index: int) -> dict[str, torch.Tensor]:
    """The weights `[M, N]` of the targets of layer `index`, which is in memory, by name."""
    return {spec.name: target_weight(loaded.model, spec) for spec in loaded.linears if spec.layer == index}


@torch.no_grad()
def _solved(layer: str, scheme: Scheme, part: Sequence[Problem]) -> dict[str, Factors]:
    try:
        solved = scheme.decompose(part)
    except (RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise UnirankError(f"The decomposition of {layer} failed: {error}") from error
    return {problem.name: _rounded(problem, found) for problem, found in zip(part, solved, strict=True)}


def _moment_in(work: torch.dtype, moment: Moment) -> Moment:
    mean_abs = None if moment.mean_abs is None else moment.mean_abs.to(work)
    return Moment(moment.c.to(work), moment.mean.to(work), moment.tokens, mean_abs)


def _gradient_in(work: torch.dtype, gradient: Gradient) -> Gradient:
    return Gradient(gradient.g.to(work), gradient.rows.to(work), gradient.weight.to(work))


def _size(part: Sequence[Problem]) -> int:
    return sum(problem.work.itemsize * entries_of_work(*problem.weight.shape) for problem in part)


def _parts(problems: Sequence[Problem]) -> Iterable[list[Problem]]:
    """What is solved at once: what fits `_ROOM`; on a CPU as many matrices as there are threads, on a GPU of one shape.

    On a CPU each matrix is solved by itself on one thread, so the parts change no bit. A GPU's library may round in
    another way for another number of matrices, so there the parts follow from the shapes alone, whatever is free. The
    largest come first, so that no thread is left with one at the end.
    """
    if problems and has_queues(problems[0].weight.device):
        return _alike(problems)
    return _filled(problems, torch.get_num_threads())


def _alike(problems: Sequence[Problem]) -> list[list[Problem]]:
    parts = []
    for shape in {tuple(problem.weight.shape): None for problem in problems}:
        parts += _filled([problem for problem in problems if tuple(problem.weight.shape) == shape], 1)
    return sorted(parts, key=_size, reverse=True)


def _filled(problems: Sequence[Problem], least: int) -> Iterator[list[Problem]]:
    """Parts of at least `least` matrices, and of more as far as they fit `_ROOM`."""
    part: list[Problem] = []
    used = 0
    for problem in problems:
        size = _size([problem])
        if len(part) >= least and used + size > _ROOM:
            yield part
            part, used = [], 0
        part.append(problem)
        used += size
    if part:
        yield part


def _rounded(problem: Problem, factors: Factors) -> Factors:
    """The factors in the dtype of the model's weights, with what dropping them costs where that was asked for."""
    dtype = problem.weight.dtype
    curvature, slope = _losses(problem, factors)
    result = Factors(
        factors.left.to(dtype),
        factors.right.to(dtype),
        factors.energy.to(torch.float64),
        factors.damping,
        *(None if vector is None else vector.to(torch.float64) for vector in (factors.mean, curvature, slope)),
    )
    for tensor in (result.left, result.right, result.energy, curvature, slope):
        if tensor is not None and not tensor.isfinite().all():
            raise NonFiniteError(f"The decomposition of {problem.name} gave NaN or infinity in {dtype}.")
    return result


def _gathered(
    own: dict[str, Factors], members: Sequence[LinearSpec], owner_of: Sequence[int], like: torch.Tensor
) -> dict[str, Factors]:
    """On process 0 the factors of all `members`, in their order; `like` has the dtype and device of factors."""
    if size() == 1 or rank() > 0:
        for spec, owner in zip(members, owner_of, strict=True):
            if owner == rank() != 0:
                send_to_zero(_packed(own[spec.name]), owner)
        return own
    results = {}
    for spec, owner in zip(members, owner_of, strict=True):
        if owner == 0:
            results[spec.name] = own[spec.name]
            continue
        header = torch.empty(5, dtype=torch.float64, device=like.device)
        send_to_zero([header], owner)
        count, damping, *present = header.tolist()
        shapes = ((spec.m, int(count)), (int(count), spec.n), (spec.k,), (spec.n,), (int(count),), (int(count),))
        wanted = (True, True, True, *map(bool, present))
        tensors = [
            torch.empty(shape, dtype=like.dtype if index < 2 else torch.float64, device=like.device) if there else None
            for index, (shape, there) in enumerate(zip(shapes, wanted, strict=True))
        ]
        send_to_zero([tensor for tensor in tensors if tensor is not None], owner)
        left, right, energy, mean, curvature, slope = tensors
        assert left is not None
        assert right is not None
        assert energy is not None
        results[spec.name] = Factors(left, right, energy, damping, mean, curvature, slope)
    return results


def _packed(factors: Factors) -> list[torch.Tensor]:
    """What `_gathered` receives: sizes and damping, then the tensors that are there."""
    optional = (factors.mean, factors.curvature, factors.slope)
    numbers = [float(factors.left.shape[1]), factors.damping, *(float(tensor is not None) for tensor in optional)]
    header = torch.tensor(numbers, dtype=torch.float64, device=factors.left.device)
    rest = [tensor.to(torch.float64) for tensor in optional if tensor is not None]
    return [header, factors.left, factors.right, factors.energy, *rest]


def _losses(problem: Problem, factors: Factors) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What dropping component `i`, `ΔW = -left_i right_i`, does to the loss, each component by itself.

    Second order `E[(gᵀ ΔW x)²] ≈ (left_iᵀ G left_i)(right_i C right_iᵀ)`, inputs and gradients taken as independent;
    first order `<∂L/∂W, ΔW>` (arXiv 2602.02848). Both `[R]`, per token.
    """
    gradient, moment = problem.gradient, problem.moment
    if gradient is None or moment is None:
        return None, None
    left, right = factors.left.to(problem.work), factors.right.to(problem.work)
    curvature = ((gradient.g @ left) * left).sum(0) * ((right @ moment.c) * right).sum(1)
    slope = -((gradient.weight @ right.T) * left).sum(0)
    return curvature.clamp_min(0.0), slope
