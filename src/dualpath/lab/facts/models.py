"""The paper's models by name, and any other model by its ``config.json``.

Shapes are from each model's published ``config.json``. `hf_config` counts parameters from them; the vendor's round
figure replaces the count if one is published (tests hold both within 3 %).
"""

from pathlib import Path
from typing import Any

import msgspec

from dualpath.lab.facts.hf_config import ModelConfigError, from_hf_config
from dualpath.lab.facts.model_spec import ModelSpec

__all__ = ["MODELS", "ModelConfigError", "ModelSpec", "find_model", "from_hf_config"]

_MLA: dict[str, Any] = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}

_DEEPSEEK_V3: dict[str, Any] = _MLA | {
    "num_hidden_layers": 61,
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "intermediate_size": 18432,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "vocab_size": 129280,
    "quantization_config": {"quant_method": "fp8"},
}
_DEEPSEEK_V32 = _DEEPSEEK_V3 | {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}

_DS_27B = _MLA | {
    "num_hidden_layers": 30,
    "hidden_size": 2560,
    "num_attention_heads": 32,
    "intermediate_size": 12288,
    "first_k_dense_replace": 1,
    "n_routed_experts": 72,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1536,
    "index_n_heads": 32,
    "index_head_dim": 64,
    "index_topk": 1024,
    "vocab_size": 129280,
    "quantization_config": {"quant_method": "fp8"},
}
_QWEN25_32B = {
    "num_hidden_layers": 64,
    "hidden_size": 5120,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "intermediate_size": 27648,
    "vocab_size": 152064,
}
_QWEN3_235B = {
    "num_hidden_layers": 94,
    "hidden_size": 4096,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1536,
    "vocab_size": 151936,
}
_GPT_OSS_120B = {
    "model_type": "gpt_oss",
    "num_hidden_layers": 36,
    "hidden_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 2880,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "vocab_size": 201088,
    "quantization_config": {"quant_method": "mxfp4"},
}


def _built_in(name: str, config: dict[str, Any], source: str, **published: Any) -> ModelSpec:
    return msgspec.structs.replace(from_hf_config(config, name), source=source, **published)


_BUILT_IN = (
    _built_in(
        "deepseek-v3.2",
        _DEEPSEEK_V32,
        "config.json of deepseek-ai/DeepSeek-V3.2-Exp; 37e9 active parameters: its model card. The paper's DS 660B",
        active_parameters=37e9,
        kv_dtype="fp8",
    ),
    _built_in(
        "ds-27b",
        _DS_27B,
        "shapes in the paper's appendix (paper §A.2-A.4); not published itself. MLA dimensions, vocabulary and fp8 "
        "weights are taken to be DeepSeek-V3's",
        kv_dtype="fp8",
    ),
    _built_in(
        "qwen2.5-32b", _QWEN25_32B, "config.json of Qwen/Qwen2.5-32B-Instruct; fp16 KV as in the paper", kv_dtype="fp16"
    ),
    _built_in(
        "deepseek-v3",
        _DEEPSEEK_V3,
        "config.json of deepseek-ai/DeepSeek-V3; 37e9 active parameters: DeepSeek-V3 technical report (2412.19437)",
        active_parameters=37e9,
        kv_dtype="fp8",
    ),
    _built_in(
        "qwen3-235b-a22b",
        _QWEN3_235B,
        "config.json of Qwen/Qwen3-235B-A22B; 22e9 active parameters: its model card; fp8 KV as in the paper",
        active_parameters=22e9,
        kv_dtype="fp8",
    ),
    _built_in(
        "gpt-oss-120b",
        _GPT_OSS_120B,
        "config.json of openai/gpt-oss-120b; 5.1e9 active parameters: its model card; fp8 KV as in the paper",
        active_parameters=5.1e9,
        kv_dtype="fp8",
    ),
)

MODELS: dict[str, ModelSpec] = {spec.name: spec for spec in _BUILT_IN}


def find_model(name: str, beside: Path | None = None) -> ModelSpec:
    """Returns a model of `MODELS`, or that of the ``config.json`` (or its directory) at path `name`, from `beside` on.

    Raises ModelConfigError naming the known models.
    """
    if name in MODELS:
        return MODELS[name]
    path = (beside or Path()) / name
    if path.exists():
        return from_hf_config(path, path.parent.name if path.is_file() else path.name)
    raise ModelConfigError(f"no model {name!r}: give one of {', '.join(MODELS)}, or the path of a config.json")
