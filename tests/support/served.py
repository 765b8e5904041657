"""Checkpoints for an engine, and what the engine and transformers make of the same tokens."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers as T
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

import unirank
from tests.support.architectures import build
from unirank.models.loading import describe
from unirank.types import DENSE, Form, LinearSpec, Rank

# vLLM's attention on a CPU wants heads of 32 and more.
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# Classes without key-value heads of their own: a stray number in config.json misleads vLLM.
EQUAL = SIZES | {"num_key_value_heads": 4}
OLD = {"num_key_value_heads": 4, "hidden_size": 128, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 256}
HEADS = {"head_dim": 32}
SLIDING = {"sliding_window": 8}

# Whether `vllm serve` takes them through its own model code or through its backend for transformers is vLLM's matter.
SERVED: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (T.LlamaConfig, SIZES | {"tie_word_embeddings": True}),
    "llama, biases": (T.LlamaConfig, SIZES | {"attention_bias": True, "mlp_bias": True}),
    "mistral": (T.MistralConfig, SIZES | SLIDING | HEADS),
    "qwen2": (T.Qwen2Config, SIZES),
    "qwen3": (T.Qwen3Config, SIZES | HEADS),
    "gemma2": (T.Gemma2Config, SIZES | HEADS | SLIDING),
    "gemma3": (T.Gemma3TextConfig, SIZES | HEADS | SLIDING),
    "phi3": (T.Phi3Config, SIZES),
    "gpt-neox": (T.GPTNeoXConfig, EQUAL),
    "olmo2": (T.Olmo2Config, SIZES),
    "starcoder2": (T.Starcoder2Config, SIZES),
    "smollm3": (T.SmolLM3Config, SIZES),
    "granite": (T.GraniteConfig, SIZES),
    "cohere": (T.CohereConfig, SIZES),
    "stablelm": (T.StableLmConfig, SIZES),
    "glm4": (T.Glm4Config, SIZES | HEADS),
    "phi": (T.PhiConfig, SIZES),
    "opt": (T.OPTConfig, EQUAL | {"ffn_dim": 192, "word_embed_proj_dim": 128}),
    "falcon": (T.FalconConfig, EQUAL),
    "gpt2": (T.GPT2Config, OLD),
    "gptj": (T.GPTJConfig, OLD | {"rotary_dim": 16}),
}
# q, k and v of every head, or group of heads, together in one matrix.
UNSERVED: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "bloom": (T.BloomConfig, {"hidden_size": 128, "n_layer": 2, "n_head": 4, "num_key_value_heads": 4}),
    "falcon, groups": (T.FalconConfig, SIZES | {"new_decoder_architecture": True, "num_kv_heads": 2}),
}


def mixed_ranks(linears: Sequence[LinearSpec]) -> dict[str, Rank]:
    """Ranks that differ within every group of an engine, with a dense linear in some, and the first three dense."""
    steps = (24, 7, 48, None, 16, 33, 1, 63, 60)
    ranks: dict[str, Rank] = {}
    for index, spec in enumerate(linears):
        rank = None if index < 3 else steps[index % len(steps)]
        ranks[spec.name] = DENSE if rank is None else min(rank, spec.k - 1)
    return ranks


def write_checkpoint(
    folder: Path,
    architecture: str,
    tokenizer: PreTrainedTokenizerBase,
    text: Path,
    *,
    form: Form,
    scheme: str = "whiten",
    dtype: torch.dtype = torch.float32,
) -> unirank.CompressedModel:
    """Compress a tiny model of that architecture with mixed ranks, and save it."""
    model = build(*(SERVED | UNSERVED)[architecture]).to(dtype)
    compressed = unirank.compress(
        model,
        ranks=mixed_ranks(describe(model, tokenizer).linears),
        scheme=scheme,
        form=form,
        tokenizer=tokenizer,
        calibration=unirank.Calibration(text=str(text), windows=4, window=32, batch=4),
    )
    compressed.save(folder)
    return compressed


def of_transformers(folder: Path, prompts: Sequence[Sequence[int]], dtype: str) -> list[list[float]]:
    """Log-probability of every token but the first, of each prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu")
    found = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            logits = model(tokens).logits[0, :-1].float()
        found.append(logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0].tolist())
    return found


@contextmanager
def engine_of(folder: Path, dtype: str, **options: Any) -> Iterator[Any]:
    """vLLM in this process."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    options = {"enforce_eager": True, "distributed_executor_backend": "uni"} | options
    engine = None
    try:  # also what an engine that did not start leaves behind has to go
        engine = LLM(str(folder), dtype=dtype, max_model_len=64, max_num_seqs=4, skip_tokenizer_init=True, **options)
        yield engine
    finally:
        del engine
        cleanup_dist_env_and_memory()
        gc.collect()


def of_vllm(folder: Path, prompts: Sequence[Sequence[int]], dtype: str, **options: Any) -> list[list[float]]:
    """What `of_transformers` says, of vLLM."""
    from vllm import SamplingParams

    with engine_of(folder, dtype, **options) as engine:
        wanted = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        answers = engine.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], wanted, use_tqdm=False)
    return [
        [at[token].logprob for at, token in zip(answer.prompt_logprobs[1:], prompt[1:], strict=True)]
        for answer, prompt in zip(answers, prompts, strict=True)
    ]


def with_adapter(
    folder: Path, prompts: Sequence[Sequence[int]], adapter: Path, count: int
) -> list[tuple[list[int], list[float]]]:
    """So many greedy tokens behind each prompt, and their log-probabilities, with a LoRA adapter on top in float32.

    Of prompts vLLM 0.32 gives none with an adapter on a CPU, for dense models neither.
    """
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    with engine_of(folder, "float32", enable_lora=True, max_lora_rank=8) as engine:
        wanted = SamplingParams(temperature=0, max_tokens=count, logprobs=0, ignore_eos=True, detokenize=False)
        inputs: Any = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        request = LoRARequest("adapter", 1, str(adapter))
        outputs = [each.outputs[0] for each in engine.generate(inputs, wanted, use_tqdm=False, lora_request=request)]
    return [
        (list(out.token_ids), [at[token].logprob for at, token in zip(out.logprobs, out.token_ids, strict=True)])
        for out in outputs
    ]
