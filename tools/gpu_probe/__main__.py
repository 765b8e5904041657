"""`python -m tools.gpu_probe STEP`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported

from tools.gpu_probe import job, kernels, machine, parity, smoke, solvers
from tools.gpu_probe.answers import Probe
from tools.gpu_probe.random_model import SHAPES

STEPS = {
    "env": machine.env,
    "smoke": smoke.smoke,
    "compositions": smoke.compositions,
    "sanitize": smoke.sanitize,
    "nan": smoke.not_finite,
    "parity": parity.parity,
    "solvers": solvers.solvers,
    "kernels": kernels.kernels,
    "layers": job.layers,
    "whole": job.whole,
    "profile": job.profile,
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(prog="python -m tools.gpu_probe", description="One question to a GPU.")
    found.add_argument("step", choices=STEPS)
    found.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    found.add_argument("--tiny", action="store_true", help="sizes that a CPU does in seconds")
    found.add_argument("--shape", default="7b", choices=[name for name in SHAPES if name != "tiny"])
    found.add_argument("--layers", type=int, default=2, help="of the step layers")
    found.add_argument("--windows", type=int, default=256, help="of 2048 tokens, of the steps layers and whole")
    found.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="for what steps write")
    found.add_argument("--trace", type=Path, default=Path("trace.json.gz"), help="of the step profile")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run a step; an answer that is an error is no failure of the step."""
    arguments = parser().parse_args(argv)
    STEPS[arguments.step](
        Probe(
            step=arguments.step,
            device=arguments.device,
            tiny=arguments.tiny,
            shape="tiny" if arguments.tiny else arguments.shape,
            layers=arguments.layers,
            windows=arguments.windows,
            work=arguments.work,
            trace=arguments.trace,
            results=Path(os.environ.get("RESULTS", "results.jsonl")),
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
