"""The bridge to transformers: after `import unirank`, `from_pretrained` builds compressed models by itself.

transformers lets a library register a "quantization method"; ours replaces the linears named in the checkpoint's
`quantization_config` by `LowRankLinear` before the weights are read. Without unirank, transformers only warns about an
unknown method; the guard of `LowRankLinear` then makes it stop with a shape mismatch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from unirank import looks
from unirank.errors import InputError
from unirank.models.bits import Bits, check_bits
from unirank.types import FORMS, Form

METHOD = "unirank"


class UniRankConfig(QuantizationConfigMixin):
    """`quantization_config` of a compressed checkpoint: the rank of every linear that is no longer dense.

    `biased` names those that have a bias where the dense linear has none (scheme `afm`), and `form` says how low-rank
    matrices are stored. `bits` are those of quantised weights: of both matrices of every low-rank linear, and of the
    linears in `whole`, which have no rank; `group_size` is the most weights that share a scale. Each is
    written only where it is not the default, which versions without it mean. Raises InputError when one of them is
    something else, and for what is none of them.
    """

    biased: Sequence[str] = ()
    form: Form = "factors"
    bits: Bits | None = None
    group_size: int | None = None
    whole: Sequence[str] = ()

    def __init__(
        self,
        ranks: Mapping[str, int] | None = None,
        biased: Sequence[str] = (),
        form: Form = "factors",
        bits: Bits | None = None,
        group_size: int | None = None,
        whole: Sequence[str] = (),
        **others: Any,
    ) -> None:
        self.quant_method = METHOD  # pyright: ignore[reportAttributeAccessIssue]
        if unknown := sorted(others.keys() - {"quant_method"}):
            raise InputError(
                f"quantization_config has {unknown[0]!r}, which this unirank does not know; the checkpoint is of a "
                "newer one: update unirank."
            )
        if ranks is not None and not isinstance(ranks, Mapping):
            raise InputError(f"quantization_config.ranks must map names to ranks, got {type(ranks).__name__}.")
        self.ranks = dict(ranks or {})
        if not isinstance(biased, list | tuple) or not all(isinstance(b, str) and b in self.ranks for b in biased):
            raise InputError(f"quantization_config.biased must be a list of linears that ranks names, got {biased!r}.")
        if biased:
            self.biased = list(biased)
        if form not in FORMS:
            raise InputError(f"quantization_config.form = {form!r} is not legal; legal values: {', '.join(FORMS)}.")
        if form == "pivoted":
            self.form = form
        if bits is not None:
            self._take_bits(bits, group_size, whole)

    def _take_bits(self, bits: object, group_size: object, whole: object) -> None:
        self.bits, size = check_bits(bits, group_size, where="quantization_config.")
        if size is not None:
            self.group_size = size
        if not isinstance(whole, list | tuple) or not all(isinstance(w, str) and w not in self.ranks for w in whole):
            raise InputError(f"quantization_config.whole must be a list of linears without a rank, got {whole!r}.")
        if whole:
            self.whole = list(whole)

    def __repr__(self) -> str:
        bits = "" if self.bits is None else f"; weights of {self.bits} bits"
        return looks.lines(
            f"UniRankConfig: {len(self.ranks)} low-rank linears, {self.form}{bits}",
            f"{len(self.biased)} with an added bias; {len(self.whole)} quantised without a rank",
            "next: .ranks, .to_dict()",
        )

    @property
    def names(self) -> list[str]:
        """Every linear that is low-rank or quantised."""
        return [*self.ranks, *self.whole]

    def rename(self, places: Mapping[str, str]) -> None:
        """Name every linear by what `places` says of it."""
        self.ranks = {places[name]: rank for name, rank in self.ranks.items()}
        if self.biased:
            self.biased = [places[name] for name in self.biased]
        if self.whole:
            self.whole = [places[name] for name in self.whole]


# What transformers knows a quantised model by.
_MARKS = ("hf_quantizer", "is_quantized", "quantization_method", "_is_quantized")


class UniRankQuantizer(HfQuantizer):
    """Builds the low-rank skeleton before transformers loads the weights into it."""

    requires_calibration = True
    _built: nn.Module | None = None  # the model, once its linears are low-rank

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        # Here and not above: this module is imported while transformers itself is being imported (see `registration`).
        from unirank.models.places import places_of
        from unirank.models.targets import make_all_low_rank

        _refuse_tensor_parallel(model)
        config: Any = self.quantization_config
        config.rename(places_of(model, config.names))  # the model may be another class than the one that was saved
        make_all_low_rank(model, config.ranks, biased=config.biased, form=config.form)
        if config.bits is not None:
            from unirank.models.quantizing import put_empty, require_torchao

            require_torchao()  # before the weights are read
            put_empty(model, config.names, config.bits, config.group_size)
        self._built = model

    def update_weight_conversions(self, weight_conversions: Any, *model: Any) -> Any:
        """Leave out what would turn or join the tensors of low-rank modules: they were saved as they are."""
        from unirank.models.file_names import kept_apart

        updated = super().update_weight_conversions(weight_conversions, *model)
        return updated if self._built is None else kept_apart(self._built, updated)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> None:
        from unirank.models.low_rank import align_weights, check_guards
        from unirank.models.low_rank_experts import check_expert_guards

        _refuse_tensor_parallel(model)  # releases before 5.20 say so only here
        check_guards(model)
        check_expert_guards(model)
        align_weights(model)

    def postprocess_model(self, model: Any, **kwargs: Any) -> None:
        """End of `from_pretrained`: the model is an ordinary one from here on.

        transformers forbids quantised models much that is right for ours: casts, full training, and more with every
        release. Only `config.quantization_config` stays, by which the next loader knows the format.
        """
        super().postprocess_model(model, **kwargs)
        for part in model.modules():
            for owner in (part, getattr(part, "config", None)):
                for name in _MARKS:
                    getattr(owner, "__dict__", {}).pop(name, None)

    def is_serializable(self, **_: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _refuse_tensor_parallel(model: Any) -> None:
    """Raise InputError where transformers is about to split the linears of `model` among processes.

    Its plan names a dense linear and splits the one product that this does; of ours it would split both factors as if
    each were that linear, and the model would stop at its first token. FSDP and pipelines split no product.
    """
    asked = getattr(model.config, "distributed_config", None)
    for size in (getattr(asked, "tp_size", None), getattr(model, "_tp_size", None)):
        if size is not None and size > 1:
            raise InputError(
                f"A compressed checkpoint cannot be loaded with tensor parallelism (tp_plan, tp_size = {size}), whose "
                "plan is for dense linears; take device_map='auto', pp_size or fsdp_size of DistributedConfig, or make "
                "a dense checkpoint of it: unirank densify."
            )


register_quantization_config(METHOD)(UniRankConfig)
register_quantizer(METHOD)(UniRankQuantizer)
