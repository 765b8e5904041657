"""transformers learns the checkpoint format: at once where it is loaded, else as soon as it is imported.

Registering needs transformers and torch, which take seconds to import, so `import unirank` waits for somebody else to
import them. transformers keeps its quantization methods in one module; ours is added when that module has run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_METHODS = "transformers.quantizers.auto"


def register() -> None:
    """Register unirank's quantization method with transformers, now or when transformers is imported."""
    if _METHODS in sys.modules:
        _add()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _add() -> None:
    """Importing the module registers the method, once; where that is under way already, its end does."""
    import unirank.models.quantizer  # noqa: F401


class _Finder(MetaPathFinder):
    """Finds one module as the other finders do, and has `_add` run behind it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _METHODS:
            return None
        for finder in [other for other in sys.meta_path if not isinstance(other, _Finder)]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # From here on the module is as if nobody had stood in between.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _add()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
