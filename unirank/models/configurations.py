"""What a configuration says of its model: which class opens it, and which part of it is about text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto import modeling_auto

from unirank.disk.strictjson import read_object
from unirank.errors import is_out_of_memory

# For models with towers; the second is of newer releases, and knows those for sound too.
_WRAPPERS: tuple[Any, ...] = (
    AutoModelForImageTextToText,
    *filter(None, [getattr(transformers, "AutoModelForMultimodalLM", None)]),
)


def text_part(config: Any) -> Any:
    """The configuration of the text decoder; the whole one where it does not tell of one, which is refused later."""
    try:
        return config.get_text_config()
    except (ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        return config


def auto_class(config: Any) -> Any:
    """The class of transformers that opens a checkpoint of this configuration; None where none does.

    AutoModelForCausalLM where transformers has one of the type, and `architectures` names it, or no other is there;
    else the one for a model with towers, which holds the text decoder as a part.
    """
    brought = getattr(config, "auto_map", None) or {}
    wrapper = next((auto for auto in _WRAPPERS if type(config) in auto._model_mapping), None)
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        named = {found.__name__ for found in _all(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])}
        if wrapper is None or named.intersection(config.architectures or ()):
            return AutoModelForCausalLM
        return wrapper
    if "AutoModelForCausalLM" in brought:
        return AutoModelForCausalLM
    return wrapper or next((auto for auto in _WRAPPERS if auto.__name__ in brought), None)


def auto_name(class_name: str) -> str:
    """What opens a checkpoint of that class, for people: a class with towers by what also takes images."""
    for auto, mapping in (
        ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
        ("AutoModelForMultimodalLM", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"),
    ):
        values = getattr(modeling_auto, mapping, {}).values()
        if any(class_name in _all(value) for value in values):
            return auto
    return "AutoModelForCausalLM"


def opened_by(folder: Path) -> str:
    """`auto_name` of the checkpoint in `folder`. Raises Damaged where its config.json is no JSON object."""
    named = read_object(folder / "config.json").get("architectures") or ()
    return next(map(auto_name, named), "AutoModelForCausalLM")


def _all(found: Any) -> Sequence[Any]:
    return found if isinstance(found, tuple | list) else (found,)
