"""`global_topk` on the components of a whole model against its twin (a stable torch sort) and pure Python.

    python -m bench.ops.bench_topk --json out.json

4.6 million components are those of 560 linears of a 70B model. Pure Python walks a sorted list, component by component.
Rows that say "pivoted" have the price of pivoted storage, and every linear its own components, min(M, N): 3.4 million.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from bench.support.record import write_result
from bench.support.roofline import gpu_floor, topk_work
from bench.support.shapes import MODELS
from bench.support.timing import compare, device_of, ended, judged, op_parser, row, show, warm
from unirank import ops, reference

Problem = tuple[Tensor, Tensor, Tensor, Tensor]


def problem(linears: Sequence[tuple[int, int]], K: int | None, kind: str, device: torch.device) -> Problem:
    """Scores of every linear, sorted: "random", "ties" (64 values), or "equal leading bits" (neighbours of 1)."""
    generator = torch.Generator().manual_seed(0)
    values, sizes = [], []
    for M, N in linears:
        size = K or min(M, N)
        score = torch.rand(size, generator=generator, dtype=torch.float64)
        if kind == "ties":
            score = (score * 64).floor()
        elif kind == "equal leading bits":
            score = 1 + score * 2.0**-40
        values.append(score.sort(descending=True).values)
        sizes.append(size)
    shapes = torch.tensor(linears)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    return torch.cat(values).to(device), shapes.sum(1).to(device), shapes.prod(1).to(device), offsets.to(device)


def in_python(
    value: Tensor, cost: Tensor, dense_cost: Tensor, offsets: Tensor, budget: int, pivoted: bool
) -> list[int]:
    """The rule with min_rank = 0 and multiple_of = 1, written with lists."""
    costs, dense, bounds, scores = cost.tolist(), dense_cost.tolist(), offsets.tolist(), value.tolist()
    walk = sorted(
        (-scores[i], seg, i - bounds[seg]) for seg in range(len(costs)) for i in range(bounds[seg], bounds[seg + 1])
    )
    ranks, left = [0] * len(costs), budget

    def price(seg: int, rank: int) -> int:
        return min(rank * (costs[seg] - rank if pivoted else costs[seg]), dense[seg])

    for _, seg, component in walk:
        step = price(seg, component + 1) - price(seg, component)
        if step > left:
            break
        left -= step
        ranks[seg] = component + 1
    full = [bounds[seg + 1] - bounds[seg] for seg in range(len(costs))]
    return [k if price(seg, r) == dense[seg] else r for seg, (r, k) in enumerate(zip(ranks, full, strict=True))]


def refuses_infinity(p: Problem, budget: int) -> None:
    value = p[0].clone()
    value[0] = float("inf")
    try:
        ops.global_topk(value, *p[1:], budget, 0, 1)
    except ValueError:
        return
    raise AssertionError("an infinite score was not refused")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = op_parser(__doc__).parse_args(argv)
    device = device_of(arguments)
    cases = [("llama-3-70b", 8214)] if not (arguments.quick or arguments.models) else []
    cases += [(name, None) for name in arguments.models or ["smollm2-135m"]]
    rows = []
    for name, K in cases:
        linears = list(MODELS[name].all_linears())[: 14 if arguments.quick else None]
        for kind, pivoted in (("random", False), ("ties", False), ("equal leading bits", False), ("random", True)):
            p = problem(linears, None if pivoted else K, kind, device)
            budget = int(0.8 * int(p[2].sum()))
            ranks, threshold = ops.global_topk(*p, budget, 0, 1, pivoted)

            def check(p: Problem = p, budget: int = budget, pivoted: bool = pivoted, found=(ranks, threshold)) -> None:
                for got, want in zip(found, reference.global_topk(*p, budget, 0, 1, pivoted), strict=True):
                    assert torch.equal(got, want), "other ranks or another threshold than the twin's"
                refuses_infinity(p, budget)

            checked = judged(check, device)
            shape = f"{name}: {len(p[0])} components, {kind}{', pivoted' if pivoted else ''}"

            def ours(p: Problem = p, budget: int = budget, pivoted: bool = pivoted) -> object:
                return ops.global_topk(*p, budget, 0, 1, pivoted)

            def twin(p: Problem = p, budget: int = budget, pivoted: bool = pivoted) -> object:
                return reference.global_topk(*p, budget, 0, 1, pivoted)

            pair = (ours, twin)
            times = compare(*pair, arguments.repeats if kind == "random" else 3, device)
            size, floor = 8 * len(p[0]), gpu_floor(topk_work(len(p[0])), device)
            more = {"read_bytes": size, "floor": floor} | checked
            rows.append(row("topk", shape, "float64", "twin (stable sort)", *times, **more, **warm(*pair, device)))
            if kind != "random" or device.type == "cuda":  # a GPU costs by the minute, and this runs on the CPU
                continue
            start = time.perf_counter()
            assert in_python(*p, budget, pivoted) == ranks.tolist()
            python = time.perf_counter() - start
            best = min(times[0])
            rows.append(row("topk", shape, "float64", "pure Python", [best], [python], **more))
    show(rows, device)
    write_result(arguments.json, rows, device=device, seed=0)
    return ended(rows)


if __name__ == "__main__":
    raise SystemExit(main())
