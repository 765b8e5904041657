"""A model that is only lent: it works for us, and is then what it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def lent(model: nn.Module) -> Iterator[None]:
    """The model evaluates, and its parameters take no gradients, meanwhile; autograd keeps nothing for them.

    Whatever happens in between, `training` of every module and `requires_grad` of every parameter are then as before.
    """
    taking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = [module for module in model.modules() if module.training]
    try:
        for parameter in taking:
            parameter.requires_grad_(False)
        for module in training:
            module.training = False
        yield
    finally:
        for parameter in taking:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True
