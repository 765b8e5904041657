"""The plugin for vLLM: `pip install unirank` beside it, then `vllm serve OUT`.

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`). The checkpoint's own
`quant_method` then selects unirank, with no flag. Nothing of vLLM is imported before that call.
"""

# pyright: reportMissingImports=false
from __future__ import annotations


def register() -> None:
    """Teach this process's vLLM the checkpoints of unirank; may be called more than once."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from unirank.models.quantizer import METHOD
    from unirank.serving.vllm_linear import VllmConfig

    register_quantization_config(METHOD)(VllmConfig)
