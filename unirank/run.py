"""Any program that loads models with transformers, taught the low-rank layers first.

    python -m unirank.run lm_eval --model hf --model_args pretrained=OUT --tasks arc_easy

is `python -m lm_eval ...` in a process that has imported unirank. Processes that it starts afresh have not.
"""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec

import unirank  # noqa: F401 - the point of it


def main() -> None:
    """Run the module that the first argument names, as `python -m` would; the others are its own."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0 if len(sys.argv) > 1 else 2)
    sys.argv = sys.argv[1:]
    if find_spec(sys.argv[0].partition(".")[0]) is None:
        raise SystemExit(f"unirank.run: there is no module {sys.argv[0]!r} to run.")
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
