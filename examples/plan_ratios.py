"""One analysis, many plans: what several allocators keep at several ratios, as a table.

    python examples/plan_ratios.py MODEL --calib my-text.txt --store STORE --remove 0.2 0.4 --allocators unirank uniform

The analysis is the expensive part and is made once; when STORE is there already, it is only checked. A plan takes
milliseconds and needs no model.
"""

from __future__ import annotations

import argparse

import unirank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="MODEL", help="directory or hub name of the dense model")
    parser.add_argument("--calib", default="my-text.txt", help="calibration text")
    parser.add_argument("--store", default="STORE", help="directory of the analysis store")
    parser.add_argument("--remove", type=float, nargs="+", default=[0.2, 0.4])
    parser.add_argument("--allocators", nargs="+", default=["unirank", "uniform", "bi", "d-rank"])
    arguments = parser.parse_args()

    store = unirank.analyze(arguments.model, arguments.store, calibration=arguments.calib)
    print(f"{'remove':>6} {'allocator':>12} {'used':>13} {'of budget':>9} {'dense':>5} {'least':>5} {'median':>6}")
    for remove in arguments.remove:
        for allocator in arguments.allocators:
            plan = unirank.plan(store, remove, allocator=allocator)
            ranks = sorted(int(rank) for rank in plan.ranks.values() if rank != "dense")
            least, median = (ranks[0], ranks[len(ranks) // 2]) if ranks else ("-", "-")
            print(
                f"{remove:6.0%} {allocator:>12} {plan.used:13,} {plan.used / plan.budget:9.2%} "
                f"{len(plan.ranks) - len(ranks):5} {least:>5} {median:>6}"
            )


if __name__ == "__main__":
    main()
