"""Decompose the linears of one layer with a scheme; failures and non-finite results carry the layer's name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from unirank.analysis.scheme.base import WORK_DTYPE, Problem, Scheme
from unirank.distributed import owners, rank, send_to_zero, size
from unirank.errors import NonFiniteError, UnirankError
from unirank.models.targets import target_weight
from unirank.types import Factors, Gradient, LayerStats, LinearSpec, LoadedModel

# Bytes of float64 work that a CPU does at once. (choice: a few small layers' worth, and one matrix of a large one)
_ROOM = 1 << 30


@torch.no_grad()
def decompose_layer(
    loaded: LoadedModel,
    stats: LayerStats,
    scheme: Scheme,
    gradients: Mapping[str, Gradient] | None = None,
    *,
    full: bool = True,
) -> dict[str, Factors]:
    """Factors of the linears of layer `stats.layer` that `stats` tells of, rounded to the dtype of the model's weights.

    Up to K, or without `full` up to ceil(r*), as a store of an older format that is gone on with has them.
    With `gradients` (by linear), each component also gets its curvature and its slope, whatever the scheme. Of several
    processes each decomposes some of the linears; process 0 returns all of them, the others their own.

    Raises:
        UnirankError: the solver failed; names the layer.
        NonFiniteError: a factor or an energy is NaN or infinity (or does not fit the dtype); names the linear.
    """
    problems = []
    members = [spec for spec in loaded.linears if spec.layer == stats.layer and spec.name in stats.input_of]
    owner_of = owners([float(spec.params) * spec.k for spec in members])
    for spec, owner in zip(members, owner_of, strict=True):
        if owner == rank():
            weight = target_weight(loaded.model, spec)
            moment = stats.moments[stats.input_of[spec.name]] if stats.moments else None
            gradient = gradients[spec.name] if gradients else None
            problems.append(Problem(spec.name, weight, moment, spec.k if full else spec.max_rank, gradient))
    results = {}
    for part in _parts(problems):
        try:
            solved = scheme.decompose(part)
        except (RuntimeError, ValueError) as error:
            raise UnirankError(f"The decomposition of {loaded.layers}.{stats.layer} failed: {error}") from error
        results |= {problem.name: _rounded(problem, found) for problem, found in zip(part, solved, strict=True)}
    return _gathered(results, members, owner_of, target_weight(loaded.model, members[0]))


def _parts(problems: Sequence[Problem]) -> Iterator[list[Problem]]:
    """What is solved at once: on a GPU everything; else what fits `_ROOM`, but as many matrices as there are threads.

    Each matrix is solved by itself on one thread, so the parts change no bit.
    """
    threads = torch.get_num_threads()
    part: list[Problem] = []
    used = 0
    for problem in problems:
        (m, n), k = problem.weight.shape, min(problem.weight.shape)
        size = 8 * (2 * m * n + 4 * k * k)  # the matrix and its factors; the square problem and its eigensolver's
        if problem.weight.device.type == "cpu" and len(part) >= threads and used + size > _ROOM:
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
        factors.mean,
        curvature,
        slope,
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
    left, right = factors.left.to(WORK_DTYPE), factors.right.to(WORK_DTYPE)
    curvature = ((gradient.g @ left) * left).sum(0) * ((right @ moment.c) * right).sum(1)
    slope = -((gradient.weight @ right.T) * left).sum(0)
    return curvature.clamp_min(0.0), slope
