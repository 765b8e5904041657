"""Every causal language model that transformers knows, made tiny through the names that its configuration gives sizes.

Nothing here is about an architecture but `SPECIAL`: sizes that have to fit each other, and are no usual names.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.support.tiny import WORDS

TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LAYERS = 2
LARGEST = 500_000  # parameters; more is not tiny
VOCAB = len(WORDS)

_NAMES = {
    VOCAB: "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size shape_vocab_size "
    "pronunciation_vocab_size audio_vocab_size encoder_hash_byte_group_vocab ngram_vocab_size_base",
    256: "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions model_max_length "
    "max_source_positions original_max_position_embeddings rel_extent",
    48: "intermediate_size moe_intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_ff dff dim_ff d_inner "
    "shared_expert_intermediate_size shared_experts_intermediate_size shared_intermediate_size feed_forward_size "
    "ffn_hidden_size expert_ffn_hidden_size dense_intermediate_size intermediate_size_mlp "
    "moe_shared_expert_intermediate_size mlp_dim",
    32: "hidden_size d_model n_embd emb_dim embedding_size embedding_dim word_embed_proj_dim hidden_size_global "
    "input_embedding_size output_embedding_size attention_hidden_size pronunciation_embed_dim shape_embed_dim "
    "backbone_hidden_size out_hidden_size output_channels ext_pw_out_channel nemo_conv_channels "
    "depthwise_separable_out_channel ple_embed_dim lru_width",
    16: "sliding_window sliding_window_size attention_window_size window_size local_attention image_size crop_size "
    "local_attention_window_len attention_chunk_size mamba_d_head local_attn_chunk_length lsh_attn_chunk_length "
    "mamba_head_dim mamba_headdim",
    8: "head_dim kv_lora_rank q_lora_rank o_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim rotary_dim dim_head "
    "attention_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim swa_head_dim attention_head_size "
    "d_head index_head_dim d_kv kv_channels hidden_size_per_layer_input hc_lowrank ssm_state_size mamba_d_state",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
    "linear_num_value_heads linear_num_heads swa_num_attention_heads num_encoder_attention_heads index_n_heads "
    "num_decoder_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts mamba_n_heads "
    "mamba_num_heads zero_expert_num patch_size",
    2: "num_key_value_heads num_kv_heads linear_num_key_heads swa_num_key_value_heads num_experts_per_tok n_groups "
    "num_experts_per_token moe_k moe_topk num_hidden_layers n_layer n_layers num_layers decoder_layers depth "
    "encoder_layers num_blocks num_decoder_layers num_encoder_layers max_window_layers o_groups split_ngram_parts",
    1: "n_group num_expert_group topk_group num_kv_shared_layers",
}
_SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks")

_NOTE = dict.fromkeys(("head_dim", "v_head_dim", "q_lora_rank", "kv_lora_rank"), 8) | dict.fromkeys(
    ("qk_nope_head_dim", "qk_rope_head_dim", "num_attention_heads", "num_key_value_heads"), 4
)
# By model type; that of a nested configuration counts for itself.
SPECIAL: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v3": {"first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "dots3_note_vision_encoder": {"adapter_in_dim": 32, "adapter_out_dim": 32},
    "dots3_note_text": _NOTE | {f"swa_{name}": size for name, size in _NOTE.items()},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 16},
    "flint": {"mlp_only_layers": [0]},
    "gemma3n_text": {"intermediate_size": 48, "num_kv_shared_layers": 0},
    "gemma4_assistant": {
        "text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 1,
    },
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 16]},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"n_mamba_heads": 4, "attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
}


# What transformers itself cannot build from a configuration of the type; the third needs a package that tests lack.
NOT_TINY = {
    "musicgen": "its class wants the configuration of its decoder, and the type has that of the whole",
    "musicgen_melody": "its class wants the configuration of its decoder, and the type has that of the whole",
    "gemma3n": "its vision tower needs the package timm",
}


def tiny_config(kind: str) -> PretrainedConfig:
    """The configuration of the type `kind`, tiny."""
    return _shrunk(CONFIG_MAPPING[kind], SPECIAL.get(kind, {}))


def _shrunk(cls: type[PretrainedConfig], changes: dict[str, Any]) -> PretrainedConfig:
    default = cls(**{name: value for name, value in changes.items() if name.endswith("_config")})
    found = default.to_dict()
    depth = next((found[name] for name in _DEPTHS if isinstance(found.get(name), int)), None)
    tiny: dict[str, Any] = {}
    for name, value in found.items():
        inner = getattr(default, name) if isinstance(value, dict) else None
        if isinstance(inner, PretrainedConfig):
            more = changes.get(name, {})
            tiny[name] = _shrunk(type(inner), SPECIAL.get(inner.model_type, {}) | more).to_dict()
        elif name in changes:
            tiny[name] = changes[name]
        elif name == "head_dim" and value is None:
            tiny[name] = 8
        elif isinstance(value, int) and not isinstance(value, bool):
            if name == "num_key_value_heads" and "kv_lora_rank" in found:
                tiny[name] = _SIZES["num_attention_heads"]  # keys are made for every head
            elif name in _SIZES:
                tiny[name] = min(value, _SIZES[name])
            elif name.endswith(("token_id", "token_index")) and value >= VOCAB:
                tiny[name] = 1
        elif isinstance(value, list) and len(value) == depth:
            kinds = list(dict.fromkeys(value)) if isinstance(value[0], str) else []
            tiny[name] = (kinds + value)[:LAYERS]  # layers of two kinds where there are
    return cls(**(changes | tiny))


def build(kind: str) -> PreTrainedModel:
    """A tiny random float32 model of the type `kind`."""
    config = tiny_config(kind)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    assert size <= LARGEST, f"{kind} has {size} parameters"
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()
