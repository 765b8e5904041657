"""Exit with one sentence where `python -m pytest tests/gpu`, run from the source tree, would have no CUDA kernels."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMAND = f"UNIRANK_CUDA=ON {sys.executable} -m pip install --no-build-isolation --no-deps -e ."


def missing() -> str | None:
    """What is missing and what to do; None where all is there. The source tree comes first, as for `python -m`."""
    sys.path.insert(0, str(ROOT))
    try:
        import torch
    except ImportError:
        return f"torch is not installed for {sys.executable}: install a CUDA build of torch first."
    try:
        from unirank import ops
    except ImportError as error:
        return f"unirank does not work from this source tree ({str(error).split(':')[0]}): run `{COMMAND}` here."
    if not torch.cuda.is_available():
        return "No CUDA device is usable here."
    found = ops.cuda_kernels_missing()
    return None if found is None else f"{found}. For this source tree: run `{COMMAND}` here."


if __name__ == "__main__":
    sys.exit(missing())
