"""`ara`: ranks trained on the calibration set through masks over frozen factors (ARA, arXiv 2510.19389)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from unirank.errors import InputError, NonFiniteError
from unirank.layerwise.lending import lent
from unirank.planning.allocator.base import Allocator, Request
from unirank.planning.allocator.masks import MaskedFactors, Staircase, masked_factors
from unirank.planning.allocator.measure import first_windows, replaced, whole, workbench_of
from unirank.planning.allocator.targets import equivalent, ranks_from_targets, real_rank

_STAGE = "train ranks"
_SMOOTHING = 0.9  # of the running mean of the loss that early stopping watches


def allocate(request: Request) -> tuple[list[int], float | None, dict[str, Any]]:
    """Train one staircase a matrix (see `masks`) with Adam, then cut the expected ranks to the exact budget.

    The loss of a step is

        CE + lambda1 (kept - (1 - remove))² + lambda2 Σ_l share_l [near <= ratio_l < 1] (1 - ratio_l)

    with CE the mean token cross-entropy (nats) of `batch` calibration windows cut to `tokens`,
    `ratio = R (M + N) / (M N)` of the expected rank R, `share = M N / Σ M N`, and `kept = Σ share min(ratio, 1)`. The
    third term is the guidance that pulls a matrix near break-even to dense.

    In the pivoted form `ratio = R (M + N - R) / (M N)`, whose end is the dense matrix without a jump, so there is no
    guidance.

    The paper does not publish its formulas in full. **Choices**: the form of the guidance; both lambdas, `near`, `lr`;
    where masks start; windows in shuffled rounds; the end after `patience` steps in which the running mean of the loss
    (decay 0.9) found no new minimum (0 never ends early); and hard ranks: a matrix whose ratio is past the middle
    between `near` and 1 is wanted dense, the others at their expected rank, and `ranks_from_targets` meets the budget.

    Frozen: model and factors; gradients reach masks only, and windows run one at a time. Needs memory for all factors
    up to the dense rank beside the dense model, and for one window's activations. One seed gives one plan, with the
    rounding of one machine and thread count.

    Returns ranks, no threshold, and `history`, the loss of every step, with `expected_kept` at the end.

    Raises:
        InputError: an option is not legal.
        NonFiniteError: the loss or a gradient is NaN or infinity; names the step.
    """
    steps, batch, tokens = whole(request, "steps"), whole(request, "batch"), whole(request, "tokens", least=2)
    patience, seed, blocks = (
        whole(request, "patience", least=0),
        whole(request, "seed", least=0),
        whole(request, "blocks"),
    )
    _check_numbers(request.options)
    request.check_floor()
    if request.budget == sum(spec.params for spec in request.linears):
        return [spec.k for spec in request.linears], None, {"history": [], "expected_kept": 1.0}
    workbench = workbench_of(request)
    model = workbench.loaded.model
    windows = first_windows(workbench, len(workbench.windows), tokens)
    near, form = request.options["near"], request.form
    staircases = {
        spec.name: Staircase.start(
            spec, blocks, real_rank(spec, (1 - request.remove) * spec.params, form), form, model.device
        )
        for spec in request.linears
    }
    trainer = _Trainer(request, staircases)
    history: list[float] = []
    running, best, best_step = 0.0, math.inf, 0
    draws = _rounds(len(windows), batch, seed)
    modules = {
        spec.name: masked_factors(request.store, spec, form, model.get_submodule(spec.name)) for spec in request.linears
    }
    with lent(model), replaced(model, modules):
        workbench.progress(_STAGE, 0, steps)
        for step in range(steps):
            history.append(trainer.step(model, modules, windows[next(draws)], step))
            running = _SMOOTHING * running + (1 - _SMOOTHING) * history[-1]
            mean = running / (1 - _SMOOTHING ** (step + 1))
            if mean < best:
                best, best_step = mean, step
            workbench.progress(_STAGE, step + 1, steps)
            if patience and step - best_step >= patience:
                workbench.progress(_STAGE, steps, steps)
                break
    targets, kept = [], 0.0
    for spec in request.linears:
        rank = float(staircases[spec.name].mask().detach().sum())
        target = equivalent(spec, rank, form)
        ratio = target * spec.cost / spec.params
        kept += min(ratio, 1.0) * spec.params
        targets.append(float(spec.k) if form == "factors" and ratio >= (near + 1) / 2 else target)
    total = sum(spec.params for spec in request.linears)
    ranks, _ = ranks_from_targets(request, torch.tensor(targets, dtype=torch.float64))
    return ranks, None, {"history": history, "expected_kept": kept / total}


class _Trainer:
    """The staircases' optimizer, and one step of it."""

    def __init__(self, request: Request, staircases: Mapping[str, Staircase]) -> None:
        self._options, self._pivoted = request.options, request.form == "pivoted"
        self._keep = 1 - request.remove
        total = sum(spec.params for spec in request.linears)
        self._linears = [(spec, staircases[spec.name], spec.params / total) for spec in request.linears]
        parameters = [staircase.theta for staircase in staircases.values()]
        self._adam = torch.optim.Adam(parameters, lr=request.options["lr"])

    def step(self, model: nn.Module, modules: Mapping[str, MaskedFactors], windows: torch.Tensor, step: int) -> float:
        """Change the staircases once by `windows`, int64 `[B, T]`; returns the loss before the change."""
        near = self._options["near"]
        self._adam.zero_grad(set_to_none=True)
        kept = guidance = torch.zeros((), dtype=torch.float64, device=windows.device)
        live: list[tuple[torch.Tensor, torch.Tensor]] = []  # a tensor that depends on theta, and its leaf in the model
        for spec, staircase, share in self._linears:
            mask = staircase.mask()
            rank = mask.sum()
            cost = spec.cost - rank if self._pivoted else spec.cost
            ratio = (rank * (cost / spec.params)).clamp(max=1.0).to(kept.device)
            kept = kept + share * ratio
            if self._pivoted:
                gate = torch.zeros_like(ratio)
            else:
                if near <= float(ratio.detach()) < 1:
                    guidance = guidance + share * (1 - ratio)
                gate = ((ratio - near) / (1 - near)).clamp(min=0.0)
            live += [pair for pair in modules[spec.name].set(mask, gate) if pair[0].requires_grad]
        # The model's graph ends at leaves, so that one window's is gone before the next one's is made.
        loss = 0.0
        for ids in windows:
            loss += _cross_entropy(model, ids, [leaf for _, leaf in live], len(windows))
        compression = (kept - self._keep).square()
        rest = self._options["lambda1"] * compression + self._options["lambda2"] * guidance
        loss += float(rest.detach())
        if not math.isfinite(loss):
            raise NonFiniteError(f"The loss of ara is {loss} at step {step}; a lower lr or other options may help.")
        rest.backward(retain_graph=True)
        torch.autograd.backward([tensor for tensor, _ in live], [leaf.grad for _, leaf in live])
        self._adam.step()
        if not all(bool(staircase.theta.isfinite().all()) for _, staircase, _ in self._linears):
            raise NonFiniteError(f"The gradient of ara is NaN or infinity at step {step}.")
        return loss


def _cross_entropy(model: nn.Module, ids: torch.Tensor, leaves: Sequence[torch.Tensor], parts: int) -> float:
    """Mean NLL of one window over `parts`; its gradient is added to the leaves.

    What flows back through the model is the gradient of the sum, as in the gradient pass: divided by tokens and parts
    already there, the gradients of most logits would be 0 in float16. The leaves are float32, so they are divided.
    """
    parameter = next(model.parameters())
    ids = ids.to(parameter.device)
    with torch.enable_grad():
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        loss = F.cross_entropy(logits.float(), ids[1:], reduction="sum")
        count = len(logits) * parts
        value = float(loss.detach()) / count
        if math.isfinite(value):  # the caller stops with the step's number otherwise
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
            for leaf, gradient in zip(leaves, gradients, strict=True):
                if gradient is not None:  # a gate that is shut takes none
                    gradient = gradient / count
                    leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
    return value


def _rounds(count: int, batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Indices of `batch` windows a step, in rounds of all windows, each shuffled."""
    generator = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.int64)
    while True:
        while len(waiting) < batch:
            waiting = torch.cat([waiting, torch.randperm(count, generator=generator)])
        yield waiting[:batch]
        waiting = waiting[batch:]


def _check_numbers(options: Mapping[str, float]) -> None:
    if not 0 < options["near"] < 1:
        raise InputError(f"The option near = {options['near']} is not legal; it must lie between 0 and 1.")
    if options["lr"] <= 0:
        raise InputError(f"The option lr = {options['lr']} is not legal; it must be above 0.")
    for name in ("lambda1", "lambda2"):
        if options[name] < 0:
            raise InputError(f"The option {name} = {options[name]} is not legal; it must be at least 0.")


ALLOCATOR = Allocator(
    "ara",
    scored=False,
    allocate=allocate,
    options={
        "steps": 200,
        "batch": 2,
        "tokens": 256,
        "lr": 0.05,
        "blocks": 64,
        "lambda1": 100.0,
        "lambda2": 1.0,
        "near": 0.8,
        "seed": 0,
        "patience": 50,
    },
    measures=True,
)
