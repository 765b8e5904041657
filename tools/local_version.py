"""Give a pyproject.toml the local version of a CUDA build, such as 0.1.0+cu130.

    python tools/local_version.py PYPROJECT [cu130]

Without the name it is that of the torch that is installed. PyPI takes no local versions (PEP 440), so a CUDA wheel
cannot end there in the place of the CPU wheel, whose file name would otherwise be the same.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path


def with_local(text: str, name: str) -> str:
    """`text` with `version = "X+name"`. Exits in a sentence where there is not one plain version."""
    if not re.fullmatch(r"[a-z]+[0-9]+", name):
        sys.exit(f"A local version is letters and digits, such as cu130; got {name!r}.")
    changed, count = re.subn(r'^version = "([0-9][0-9.a-z]*)"$', rf'version = "\1+{name}"', text, flags=re.MULTILINE)
    if count != 1:
        sys.exit(f'Exactly one line `version = "X"` without a local part is needed; found {count}.')
    return changed


def of_torch() -> str:
    """cu130 for a torch that was built with CUDA 13.0."""
    import torch

    if torch.version.cuda is None:
        sys.exit(f"torch {torch.__version__} is a CPU build; the CUDA wheel needs a CUDA build.")
    return "cu" + torch.version.cuda.replace(".", "")


def main(arguments: Sequence[str]) -> None:
    """Change the file in place."""
    path = Path(arguments[0])
    path.write_text(with_local(path.read_text(), arguments[1] if len(arguments) > 1 else of_torch()))


if __name__ == "__main__":
    main(sys.argv[1:])
