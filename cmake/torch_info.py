"""Print what CMake needs to know of the installed torch as JSON; empty strings where there is none.

torch is located, not imported: importing takes seconds and may need a GPU driver that a build machine lacks.
"""

import importlib.util
import json
import runpy
from pathlib import Path


def _nvidia_root() -> str:
    """The folder of the CUDA libraries that pip installed beside a CUDA torch."""
    spec = importlib.util.find_spec("nvidia")
    for path in (spec.submodule_search_locations or []) if spec is not None else []:
        for folder in sorted(Path(path).glob("cu[0-9]*"), reverse=True):
            if (folder / "lib").is_dir():
                return folder.as_posix()
    return ""


def torch_info() -> dict[str, str]:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return {"root": "", "version": "", "cuda": "", "nvidia": ""}
    root = Path(spec.origin).parent
    version = runpy.run_path(str(root / "version.py"))
    return {
        "root": root.as_posix(),
        # "2.13.0+cpu" and "2.14.0a0+git1234" both compare as plain numbers once the tag is gone.
        "version": str(version["__version__"]).partition("+")[0],
        "cuda": version.get("cuda") or "",
        "nvidia": _nvidia_root(),
    }


if __name__ == "__main__":
    print(json.dumps(torch_info()))
