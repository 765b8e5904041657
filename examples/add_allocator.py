"""A rule of your own for the ranks, without a change to unirank: compute ranks, check them, compress with them.

    python examples/add_allocator.py MODEL --calib my-text.txt --store STORE --remove 0.3 -o OUT

The rule here keeps of every matrix a fraction proportional to its effective rank over K. `plan` checks the ranks and
counts what they cost. docs/contributing.md says how a rule becomes an allocator with a name of its own.
"""

from __future__ import annotations

import argparse

import unirank


def own_rule(store: unirank.AnalysisStore, remove: float) -> dict[str, int]:
    """Ranks by name, the largest of this rule that fit the budget."""
    budget = (1 - remove) * sum(spec.params for spec in store.linears)
    energies = store.energies()  # [K] by name, descending
    shares = {spec.name: unirank.effective_rank(energies[spec.name]) / spec.k for spec in store.linears}

    def ranks(scale: float) -> dict[str, int]:
        return {s.name: max(1, min(s.k, int(scale * shares[s.name] * s.params / s.cost))) for s in store.linears}

    low, high = 0.0, max(spec.cost for spec in store.linears) / min(shares.values())
    for _ in range(50):  # bisection: the cost grows with the scale
        middle = (low + high) / 2
        cost = sum(spec.rank_cost(ranks(middle)[spec.name]) for spec in store.linears)
        low, high = (middle, high) if cost <= budget else (low, middle)
    return ranks(low)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="MODEL", help="directory or hub name of the dense model")
    parser.add_argument("--calib", default="my-text.txt", help="calibration text")
    parser.add_argument("--store", default="STORE", help="directory of the analysis store")
    parser.add_argument("--remove", type=float, default=0.3)
    parser.add_argument("-o", "--out", default="OUT", help="directory of the compressed checkpoint")
    arguments = parser.parse_args()

    loaded = unirank.load(arguments.model)
    store = unirank.analyze(loaded, arguments.store, calibration=arguments.calib)
    plan = unirank.plan(store, ranks=own_rule(store, arguments.remove))
    print(f"{plan.used:,} of {plan.total:,} parameters kept: {plan.remove:.2%} removed")
    unirank.apply(loaded, store, plan).save(arguments.out)


if __name__ == "__main__":
    main()
