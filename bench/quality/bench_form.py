"""What the pivoted form loses: rounding of every low-rank linear against two factors', and how well its pivots stand.

    unirank plan STORE --remove 0.4 --form pivoted -o plan.json
    python -m bench.quality.bench_form STORE plan.json --json form.json

The relative error is that of the product, in the Frobenius norm, against the float64 product of the factors in STORE.
In 16 bits "pivoted" starts from rounded factors, as a model of that dtype does, and A is fitted to the rounded B;
"not fitted" leaves that out. The condition number is that of the pivot rows of the factor with orthonormal right side.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import unirank
from bench.support.record import write_result
from unirank.models.low_rank import stored_tensors, weight_product
from unirank.models.pivoting import dominant_rows, pivot

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("plan", type=Path, help="ranks, in the pivoted form")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    store = unirank.open_store(arguments.store)
    plan = unirank.import_plan(store, arguments.plan.read_text(encoding="utf-8"), form="pivoted")
    rows, recount = [], 0
    for spec in store.linears:
        rank = plan.ranks[spec.name]
        if rank == "dense":
            recount += spec.params
            continue
        left, right = store.factors(spec, int(rank))
        rows.append({"linear": spec.name, "rank": rank, "shape": [spec.m, spec.n]} | measure(left, right))
        stored = stored_tensors(left, right, "pivoted")
        recount += stored["left.weight"].numel() + stored["right.weight"].numel()
    assert recount == plan.used, (recount, plan.used)
    print(f"{len(rows)} low-rank linears; {recount:,} parameters counted from the tensors, as the plan says")
    for key in (key for key in rows[0] if key not in ("linear", "rank", "shape")):
        values = torch.tensor([row[key] for row in rows], dtype=torch.float64)
        print(f"{key:28} median {float(values.median()):10.3g}   largest {float(values.max()):10.3g}")
    write_result(arguments.json, rows, device=torch.device("cpu"), seed=0)
    return 0


def measure(left: torch.Tensor, right: torch.Tensor) -> dict[str, Any]:
    """Errors by dtype, the condition of the pivot rows, and the largest entry of A."""
    whole = left.double() @ right.double()

    def lost(product: torch.Tensor) -> float:
        return float((product - whole).norm() / whole.norm())

    turned, upper = torch.linalg.qr(right.double().T)
    a, order = dominant_rows(left.double() @ upper.T)
    rank = left.shape[1]
    del turned
    found: dict[str, Any] = {
        "condition": float(torch.linalg.cond((left.double() @ upper.T)[order[:rank]])),
        "largest |A|": float(a.abs().max()),
    }
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        low, wide = left.to(dtype), right.to(dtype)
        found[f"{name} factors"] = lost(low.double() @ wide.double())
        stored = stored_tensors(low, wide, "pivoted")
        parts = stored["left.weight"].double(), stored["right.weight"].double(), stored["place"]
        found[f"{name} pivoted"] = lost(weight_product(*parts))
        if dtype != torch.float32:
            exact = pivot(low.float(), wide.float())
            plain = exact.a.to(dtype).double(), exact.b.to(dtype).double(), exact.order.argsort().int()
            found[f"{name} not fitted"] = lost(weight_product(*plain))
    return found


if __name__ == "__main__":
    raise SystemExit(main())
