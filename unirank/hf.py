"""The bridge to transformers: after `import unirank`, `from_pretrained` builds compressed models by itself.

transformers lets a library register a "quantization method"; ours replaces the linears named in the checkpoint's
`quantization_config` by `LowRankLinear` before the weights are read. Without unirank, transformers only warns about an
unknown method; the guard of `LowRankLinear` then makes it stop with a shape mismatch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from unirank.errors import InputError
from unirank.modules import LowRankLinear, align_weights

METHOD = "unirank"


class UniRankConfig(QuantizationConfigMixin):
    """`quantization_config` of a compressed checkpoint: the rank of every linear that is no longer dense.

    `biased` names those that have a bias where the dense linear has none (scheme `afm`); it is written only then.
    Raises InputError when either is something else.
    """

    biased: Sequence[str] = ()

    def __init__(self, ranks: Mapping[str, int] | None = None, biased: Sequence[str] = (), **_: Any) -> None:
        self.quant_method = METHOD  # pyright: ignore[reportAttributeAccessIssue]
        if ranks is not None and not isinstance(ranks, Mapping):
            raise InputError(f"quantization_config.ranks must map names to ranks, got {type(ranks).__name__}.")
        self.ranks = dict(ranks or {})
        if not isinstance(biased, list | tuple) or not all(isinstance(b, str) and b in self.ranks for b in biased):
            raise InputError(f"quantization_config.biased must be a list of linears that ranks names, got {biased!r}.")
        if biased:
            self.biased = list(biased)


class UniRankQuantizer(HfQuantizer):
    """Builds the low-rank skeleton before transformers loads the weights into it."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        config: Any = self.quantization_config
        for name, rank in config.ranks.items():
            make_low_rank(model, name, rank, add_bias=name in config.biased)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> None:
        align_weights(model)

    def is_serializable(self, **_: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


register_quantization_config(METHOD)(UniRankConfig)
register_quantizer(METHOD)(UniRankQuantizer)


def make_low_rank(model: nn.Module, name: str, rank: int, *, add_bias: bool = False) -> LowRankLinear:
    """Put an empty `LowRankLinear` of that rank in the place of the linear `name`, on its device and in its dtype.

    A bias is kept; where there is none, `add_bias` makes one of zeros.

    Raises InputError when there is no such linear, or the rank does not fit its shape.
    """
    try:
        linear = model.get_submodule(name)
    except AttributeError as error:
        raise InputError(f"The model has no linear {name}, which the checkpoint's ranks name.") from error
    if isinstance(linear, nn.Linear):
        m, n = linear.out_features, linear.in_features
    elif isinstance(linear, Conv1D):
        n, m = linear.nx, linear.nf
    else:
        raise InputError(f"{name} is a {type(linear).__name__}, not a linear, so it cannot take rank {rank}.")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= min(m, n):
        raise InputError(f"The rank of {name} is {rank!r}; legal are whole numbers from 1 to {min(m, n)}.")
    weight: torch.Tensor = linear.weight
    has_bias = linear.bias is not None
    low = LowRankLinear(n, m, rank, bias=has_bias or add_bias, device=weight.device, dtype=weight.dtype)
    low.train(linear.training)
    if has_bias:
        low.left.bias = linear.bias
    elif add_bias:
        low.added_bias = True
        nn.init.zeros_(low.left.bias)
    model.set_submodule(name, low)
    return low
