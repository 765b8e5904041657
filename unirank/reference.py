"""Pure-torch twins of the native ops: same names, same meaning, on any device; the definition of what an op computes.

Argument letters: T tokens, D hidden size, N in_features, M out_features, B matrices, K = min(M, N), L segments,
C components. Each `check_*` states an op's preconditions in one place: the twins and the fake kernels share it.
"""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

# Public in the documentation, but not re-exported by name.
LinAlgError = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FULL = (torch.float32, torch.float64)

# Rows whose products are summed in the compute dtype before they join the gram; equal to the CPU kernel's chunk.
CHUNK = 2048


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_devices(op: str, *tensors: Tensor) -> None:
    devices = {str(t.device) for t in tensors}
    _require(len(devices) == 1, f"{op}: all tensors must be on one device, got {sorted(devices)}")


def check_cosine(state: Tensor, x: Tensor, y: Tensor) -> None:
    op = "cosine_accumulate_"
    _require(
        state.dtype == torch.float64 and state.dim() == 1 and state.shape[0] == 3 and state.is_contiguous(),
        f"{op}: state must be contiguous float64 of shape [3], got {state.dtype} of shape {list(state.shape)}",
    )
    _require(x.dim() == 2, f"{op}: x must have shape [T, D], got {list(x.shape)}")
    _require(x.shape == y.shape, f"{op}: y must have the shape of x, {list(x.shape)}, got {list(y.shape)}")
    _require(x.dtype in FLOATING, f"{op}: x must be float32, float64, bfloat16 or float16, got {x.dtype}")
    _require(y.dtype == x.dtype, f"{op}: y must have the dtype of x, {x.dtype}, got {y.dtype}")
    _check_devices(op, state, x, y)


def cosine_accumulate_(state: Tensor, x: Tensor, y: Tensor) -> None:
    """Add the sum of token cosines, of their squares, and the token count to `state`; see `unirank.ops`."""
    check_cosine(state, x, y)
    x, y = x.double(), y.double()
    xx, yy = (x * x).sum(1), (y * y).sum(1)
    cosine = ((x * y).sum(1) / (xx.sqrt() * yy.sqrt())).clamp(-1, 1)
    cosine = cosine.masked_fill((xx == 0) | (yy == 0), 0)
    cosine = cosine.masked_fill(~(xx.isfinite() & yy.isfinite()), float("nan"))
    state += torch.stack((cosine.sum(), (cosine * cosine).sum(), torch.full_like(state[2], x.shape[0])))


def check_gram(gram: Tensor, mean: Tensor, x: Tensor) -> None:
    op = "gram_accumulate_"
    _require(x.dim() == 2, f"{op}: x must have shape [T, N], got {list(x.shape)}")
    _require(x.dtype in FLOATING, f"{op}: x must be float32, float64, bfloat16 or float16, got {x.dtype}")
    N = x.shape[1]
    _require(
        gram.dim() == 2 and gram.shape[0] == N and gram.shape[1] == N and gram.is_contiguous(),
        f"{op}: gram must be contiguous of shape [{N}, {N}], got {list(gram.shape)}",
    )
    _require(
        mean.dim() == 1 and mean.shape[0] == N and mean.is_contiguous(),
        f"{op}: mean must be contiguous of shape [{N}], got {list(mean.shape)}",
    )
    _require(
        gram.dtype in FULL and mean.dtype == gram.dtype,
        f"{op}: gram and mean must both be float64 or both float32, got {gram.dtype} and {mean.dtype}",
    )
    _check_devices(op, gram, mean, x)


def gram_accumulate_(gram: Tensor, mean: Tensor, x: Tensor) -> None:
    """Add the tokens' sum of `x xᵀ` to `gram` and of `x` to `mean`; see `unirank.ops`."""
    check_gram(gram, mean, x)
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    for rows in x.split(CHUNK):
        rows = rows.to(compute)
        gram += (rows.T @ rows).to(gram.dtype)
        mean += rows.sum(0, dtype=torch.float64).to(mean.dtype)
    lower = gram.tril()
    gram.copy_(lower + lower.tril(-1).T)


def check_eigh(a: Tensor) -> None:
    op = "batched_eigh"
    _require(a.dtype in FULL, f"{op}: a must be float32 or float64, got {a.dtype}")
    _require(a.dim() == 3 and a.shape[1] == a.shape[2], f"{op}: a must have shape [B, N, N], got {list(a.shape)}")


def _require_finite(op: str, *results: Tensor) -> None:
    for result in results:
        bad = (~result.isfinite()).flatten(1).any(1).nonzero()
        _require(bad.numel() == 0, f"{op}: matrix {int(bad[0]) if bad.numel() else 0} of the batch is not finite")


def batched_eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors, in columns, of each symmetric matrix; see `unirank.ops`."""
    check_eigh(a)
    _require_finite("batched_eigh", a.tril())
    try:
        w, v = torch.linalg.eigh(a, UPLO="L")
    except LinAlgError as error:
        raise ValueError(f"batched_eigh: {error}") from error
    _require_finite("batched_eigh", w)
    return w, v.contiguous()


def check_svd(a: Tensor) -> None:
    op = "batched_svd"
    _require(a.dtype in FULL, f"{op}: a must be float32 or float64, got {a.dtype}")
    _require(a.dim() == 3, f"{op}: a must have shape [B, M, N], got {list(a.shape)}")


def batched_svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin singular value decomposition of each matrix; see `unirank.ops`."""
    check_svd(a)
    _require_finite("batched_svd", a)
    try:
        u, s, vh = torch.linalg.svd(a, full_matrices=False)
    except LinAlgError as error:
        raise ValueError(f"batched_svd: {error}") from error
    _require_finite("batched_svd", s)
    return u.contiguous(), s, vh.contiguous()


def check_topk(value: Tensor, cost: Tensor, dense_cost: Tensor, offsets: Tensor) -> None:
    op = "global_topk"
    _require(value.dtype in FULL, f"{op}: value must be float32 or float64, got {value.dtype}")
    _require(value.dim() == 1, f"{op}: value must have shape [C], got {list(value.shape)}")
    _require(cost.dim() == 1, f"{op}: cost must have shape [L], got {list(cost.shape)}")
    L = cost.shape[0]
    for name, tensor, length in (("cost", cost, L), ("dense_cost", dense_cost, L), ("offsets", offsets, L + 1)):
        _require(tensor.dtype == torch.int64, f"{op}: {name} must be int64, got {tensor.dtype}")
        _require(
            tensor.dim() == 1 and tensor.shape[0] == length,
            f"{op}: {name} must have shape [{length}], got {list(tensor.shape)}",
        )
    _check_devices(op, value, cost, dense_cost, offsets)


def _check_topk_data(value: Tensor, cost: Tensor, dense_cost: Tensor, offsets: Tensor, pivoted: bool) -> None:
    op, C = "global_topk", value.shape[0]
    _require(
        int(offsets[0]) == 0 and int(offsets[-1]) == C,
        f"{op}: offsets must run from 0 to {C}, got {int(offsets[0])} to {int(offsets[-1])}",
    )
    empty = (offsets.diff() <= 0).nonzero().flatten().tolist()
    _require(not empty, f"{op}: offsets must increase, but segment {empty[:1]} does not")
    for name, tensor in (("cost", cost), ("dense_cost", dense_cost)):
        bad = (tensor <= 0).nonzero().flatten().tolist()
        _require(not bad, f"{op}: {name} must be positive, got {tensor[bad[:1]].tolist()} at segment {bad[:1]}")
    lengths = offsets.diff()
    for seg in (pivoted & (cost // 2 < lengths)).nonzero().flatten().tolist():
        raise ValueError(
            f"{op}: with pivoted=True, cost must be at least twice a segment's length, got cost {int(cost[seg])} "
            f"and length {int(lengths[seg])} at segment {seg}"
        )
    _require(sum(dense_cost.tolist()) < 2**63, f"{op}: the dense costs add up to more than an int64")
    bad = (~value.isfinite()).nonzero().flatten().tolist()
    _require(not bad, f"{op}: value must be finite, got {value[bad[:1]].tolist()} at index {bad[:1]}")
    rises = value.diff() > 0
    rises[offsets[1:-1] - 1] = False  # from one segment to the next a score may rise
    bad = rises.nonzero().flatten().tolist()
    if bad:
        segment = int(torch.searchsorted(offsets, bad[0], right=True)) - 1
        raise ValueError(
            f"{op}: value must be non-increasing inside a segment, but rises at index {bad[0] + 1} in segment {segment}"
        )


class _Prices:
    """Price of a rank in each segment; a matrix is dense where its rank alone would cost `dense_cost` or more."""

    def __init__(self, cost: Tensor, dense_cost: Tensor, offsets: Tensor, multiple_of: int, pivoted: bool) -> None:
        self.K: list[int] = offsets.diff().tolist()
        self.cost: list[int] = cost.tolist()
        self.dense_cost: list[int] = dense_cost.tolist()
        self.multiple_of = multiple_of
        self.pivoted = pivoted

    def uncapped(self, seg: int, r: int) -> int:
        return r * self.cost[seg] - (r * r if self.pivoted else 0)

    def price(self, seg: int, r: int) -> int:
        return min(self.uncapped(seg, r), self.dense_cost[seg])

    def is_dense(self, seg: int, r: int) -> bool:
        return self.uncapped(seg, r) >= self.dense_cost[seg]

    def normalise(self, seg: int, r: int) -> int:
        return self.K[seg] if self.is_dense(seg, r) else r

    def round_up(self, seg: int, r: int) -> int:
        rounded = -(-r // self.multiple_of) * self.multiple_of
        return self.normalise(seg, min(rounded, self.K[seg]))

    def total(self, ranks: list[int]) -> int:
        return sum(self.price(seg, r) for seg, r in enumerate(ranks))


def _buy_prefix(
    value: Tensor, cost: Tensor, dense_cost: Tensor, offsets: Tensor, floor: Tensor, left: int, pivoted: bool
) -> tuple[Tensor, float]:
    """Longest affordable prefix of the global order: its ranks and the smallest score bought beyond the floor."""
    order = torch.sort(value, descending=True, stable=True).indices
    segment = torch.repeat_interleave(offsets.diff())[order]
    component = order - offsets[segment]
    c, dense = cost[segment], dense_cost[segment]

    def price(r: Tensor) -> Tensor:
        unit = c - r if pivoted else c
        is_dense = r >= -(-dense // unit)  # r * unit might overflow
        return torch.where(is_dense, dense, r.masked_fill(is_dense, 0) * unit)

    beyond = component >= floor[segment]
    steps = torch.where(beyond, price(component + 1) - price(component), 0)
    bought = beyond[: int((steps.cumsum(0) <= left).sum())]
    taken = order[: bought.shape[0]][bought]
    ranks = floor + torch.bincount(segment[: bought.shape[0]][bought], minlength=floor.shape[0])
    return ranks, float(value[taken].min()) if taken.numel() else float("inf")


def _fill_residual(value: list[float], starts: list[int], prices: _Prices, ranks: list[int], left: int) -> None:
    """Spend what rounding down freed, in score order; a segment whose next step does not fit is closed."""
    queue = [(-value[starts[seg] + r], seg) for seg, r in enumerate(ranks) if r < prices.K[seg]]
    heapq.heapify(queue)
    while queue:
        _, seg = heapq.heappop(queue)
        target = prices.round_up(seg, ranks[seg] + 1)
        step = prices.price(seg, target) - prices.price(seg, ranks[seg])
        if step > left:
            continue
        left -= step
        ranks[seg] = target
        if target < prices.K[seg]:
            heapq.heappush(queue, (-value[starts[seg] + target], seg))


def global_topk(
    value: Tensor,
    cost: Tensor,
    dense_cost: Tensor,
    offsets: Tensor,
    budget: int,
    min_rank: int,
    multiple_of: int,
    pivoted: bool = False,
) -> tuple[Tensor, Tensor]:
    """Ranks that one global ranking of all components buys for `budget` parameters; see `unirank.ops`."""
    check_topk(value, cost, dense_cost, offsets)
    _require(min_rank >= 0, f"global_topk: min_rank must be at least 0, got {min_rank}")
    _require(multiple_of >= 1, f"global_topk: multiple_of must be at least 1, got {multiple_of}")
    device = value.device
    value, cost, dense_cost, offsets = (t.cpu() for t in (value.double() + 0.0, cost, dense_cost, offsets))
    _check_topk_data(value, cost, dense_cost, offsets, pivoted)

    prices = _Prices(cost, dense_cost, offsets, multiple_of, pivoted)
    floor = [prices.round_up(seg, min(min_rank, K)) for seg, K in enumerate(prices.K)]
    used = prices.total(floor)
    _require(used <= budget, f"global_topk: min_rank {min_rank} needs {used} parameters but the budget is {budget}")
    bought, threshold = _buy_prefix(
        value, cost, dense_cost, offsets, torch.tensor(floor, dtype=torch.int64), budget - used, pivoted
    )
    ranks: list[int] = bought.tolist()
    if multiple_of > 1:
        ranks = [
            r if prices.is_dense(seg, r) else max(floor[seg], r // multiple_of * multiple_of)
            for seg, r in enumerate(ranks)
        ]
        _fill_residual(value.tolist(), offsets.tolist(), prices, ranks, budget - prices.total(ranks))
    ranks = [prices.normalise(seg, r) for seg, r in enumerate(ranks)]
    return (
        torch.tensor(ranks, dtype=torch.int64, device=device),
        torch.tensor(threshold, dtype=torch.float64, device=device),
    )
