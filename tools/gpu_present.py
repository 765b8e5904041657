"""Exit with one sentence where a GPU, or torch itself, cannot be used by this Python."""

from __future__ import annotations

import importlib.util
import sys


def missing(device: str) -> str | None:
    """What is missing for `device`, "cuda" or "cpu"; None where nothing is."""
    for name in ("torch", "transformers", "pytest"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed for {sys.executable}; set PYTHON (PY) to one that has it."
    import torch

    if device == "cpu" or torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"there is a GPU, but the torch of {sys.executable} is a CPU build; install a CUDA build."
    return (
        f"there is a GPU, but torch {torch.__version__} with CUDA {torch.version.cuda} cannot use it; see nvidia-smi."
    )


if __name__ == "__main__":
    sys.exit(missing(sys.argv[1]))
