"""Tiny random models with a vision tower beside the text decoder, and real processors for them, made offline.

In each the tower has more weights than the decoder: who takes the largest list of layers takes the wrong one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3Processor,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    Mistral3Config,
    MistralConfig,
    PixtralVisionConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from tests.support.tiny import COMMON, WORDS

SIDE = 16  # pixels
PATCH = 4
SPECIAL = ("<image>", "<begin>", "<end>", "<break>", "<video>", "<start>", "<stop>")
IMAGE, BEGIN, END, BREAK, VIDEO, START, STOP = range(len(WORDS), len(WORDS) + len(SPECIAL))
TEXT: dict[str, Any] = COMMON | {"vocab_size": len(WORDS) + len(SPECIAL), "head_dim": 8}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}
_LOOK: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def _gemma3() -> PretrainedConfig:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    text = Gemma3TextConfig(**TEXT, sliding_window=8, layer_types=kinds)
    return Gemma3Config(
        text_config=text,
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=BEGIN,
        eoi_token_index=END,
        tie_word_embeddings=True,
    )


def _llava() -> PretrainedConfig:
    vision = CLIPVisionConfig(**VISION, projection_dim=32)
    return LlavaConfig(text_config=LlamaConfig(**TEXT), vision_config=vision, image_token_index=IMAGE)


def _mistral3() -> PretrainedConfig:
    return Mistral3Config(
        text_config=MistralConfig(**TEXT),
        vision_config=PixtralVisionConfig(**VISION),
        image_token_index=IMAGE,
        spatial_merge_size=2,
    )


def _qwen2_5_vl() -> PretrainedConfig:
    text = TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
    vision = {
        "depth": 4,
        "hidden_size": 32,
        "out_hidden_size": 32,
        "intermediate_size": 256,
        "num_heads": 4,
        "patch_size": PATCH,
        "window_size": 16,
        "fullatt_block_indexes": [1, 3],
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=STOP,
    )


CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "gemma3": _gemma3,
    "llava": _llava,
    "mistral3": _mistral3,
    "qwen2_5_vl": _qwen2_5_vl,
}


PROCESSED = ("gemma3", "llava")  # the processors of the others want torchvision


def build(kind: str) -> PreTrainedModel:
    """A tiny random float32 model of the type `kind`, a key of `CONFIGS`."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(CONFIGS[kind]())
    for parameter in model.parameters():
        if parameter.dim() > 1:  # as in `tests.support.tiny.build`
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The words of `tests.support.tiny`, and tokens for images."""
    vocabulary = {word: index for index, word in enumerate((*WORDS, *SPECIAL))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"image_token": "<image>", "boi_token": "<begin>", "eoi_token": "<end>", "video_token": "<video>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        eos_token="<eos>",
        pad_token="<eos>",
        extra_special_tokens=named | {"break_token": "<break>", "start_token": "<start>", "stop_token": "<stop>"},
    )


def make_processor(kind: str) -> ProcessorMixin:
    """The processor of a type in `PROCESSED`, of the type's own class, for images of any size."""
    tokenizer = make_tokenizer()
    square = {"height": SIDE, "width": SIDE}
    if kind == "gemma3":
        return Gemma3Processor(Gemma3ImageProcessorPil(size=square, **_LOOK), tokenizer, image_seq_length=4)
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square, **_LOOK),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def save_dense(kind: str, folder: Path) -> Path:
    """Model and processor as a checkpoint; where there is no processor, a tokenizer and made-up settings of one."""
    build(kind).save_pretrained(folder)
    if kind in PROCESSED:
        make_processor(kind).save_pretrained(folder)
    else:
        make_tokenizer().save_pretrained(folder)
        for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
            (folder / name).write_text('{"merge_size": 2}\n')
    return folder


def picture() -> Image.Image:
    pixels = torch.randint(0, 256, (20, 20, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def look(kind: str, processor: Any) -> dict[str, torch.Tensor]:
    """What a model of the type gets for a picture and three words; `processor` is the one of its directory.

    Without a processor, of types that are not in `PROCESSED`, the picture is noise.
    """
    grid, noise = SIDE // PATCH, torch.Generator().manual_seed(2)
    if kind == "mistral3":
        ids = [2, *[IMAGE] * (grid // 2) ** 2, END, 5, 6]
        pixels = torch.randn(1, 3, SIDE, SIDE, generator=noise)
        return {"input_ids": torch.tensor([ids]), "pixel_values": pixels, "image_sizes": torch.tensor([[SIDE, SIDE]])}
    if kind == "qwen2_5_vl":
        ids = [2, START, *[IMAGE] * (grid // 2) ** 2, STOP, 5, 6]
        pixels = torch.randn(grid**2, 3 * 2 * PATCH**2, generator=noise)
        kinds = torch.tensor([[int(token == IMAGE) for token in ids]])
        return {
            "input_ids": torch.tensor([ids]),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
            "pixel_values": pixels,
            "image_grid_thw": torch.tensor([[1, grid, grid]]),
            "mm_token_type_ids": kinds,
        }
    mark = "<begin>" if kind == "gemma3" else "<image>"
    return dict(processor(images=picture(), text=f"w0 {mark} w3 w4", return_tensors="pt"))
