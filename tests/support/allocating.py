"""What tests of allocators that measure share."""

from __future__ import annotations

import torch

from unirank.analysis.store import AnalysisStore
from unirank.planning.allocator.base import Request, Workbench, options_of
from unirank.planning.score import ScoreSettings
from unirank.rank_plan import budget_of
from unirank.types import LoadedModel


def request_of(store: AnalysisStore, workbench: Workbench, rule, remove: float, **options: float) -> Request:
    budget = budget_of(remove, sum(spec.params for spec in store.linears))
    chosen = options_of(rule, options)
    return Request(
        store.linears,
        store.energies(),
        store.cosines(),
        ScoreSettings(),
        remove,
        budget,
        1,
        1,
        store,
        chosen,
        workbench,
    )


class Found:
    """What a model is: its modules, weights, and flags."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._model = loaded.model
        self._modules = dict(loaded.model.named_modules())
        self._weights = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
        self._flags = self._now()

    def _now(self) -> list[bool]:
        model = self._model
        return [p.requires_grad for p in model.parameters()] + [m.training for m in model.modules()]

    def unchanged(self) -> bool:
        now = self._model.state_dict()
        modules = dict(self._model.named_modules())
        return (
            list(modules) == list(self._modules)
            and all(modules[name] is module for name, module in self._modules.items())
            and not any("forward" in vars(module) for module in modules.values())
            and list(now) == list(self._weights)
            and all(torch.equal(now[name], tensor) for name, tensor in self._weights.items())
            and all(parameter.grad is None for parameter in self._model.parameters())
            and self._now() == self._flags
        )
