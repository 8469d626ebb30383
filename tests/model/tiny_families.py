"""A tiny seeded model of any family of causal language models that its config's fields alone make tiny."""

from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

WINDOW = 5
MOST_WEIGHTS = 40_000_000
"""Of a model that counts as tiny."""

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "sliding_window": WINDOW,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_n_heads": 16,
    "index_head_dim": 16,
    "index_topk": 8,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
WINDOWS = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
LATE_WINDOWS = {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": WINDOW}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
DECODER = {"decoder_layers": 4, "decoder_attention_heads": 4, "encoder_attention_heads": 4}
DECODERS = "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart whisper".split()  # noqa: SIM905
FIELDS: dict[str, dict[str, Any]] = dict.fromkeys(DECODERS, DECODER) | {
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": WINDOWS | {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {
        "d_model": 64,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "max_window_layers": 2},
    "gemma3n_text": WINDOWS
    | {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": 64, "intermediate_size": [96] * 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 8},
    "laguna": WINDOWS,
    "lfm2": {"full_attn_idxs": [2, 3]},
    "longcat_flash": {"num_layers": 2, "head_dim": 8, "num_key_value_heads": 4},
    "mellum": WINDOWS,
    "minimax_m3_vl_text": {"num_hidden_layers": 4, "layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "phimoe": {"sliding_window": WINDOW},
    "qwen2": LATE_WINDOWS,
    "qwen3": LATE_WINDOWS,
    "qwen3_moe": LATE_WINDOWS,
    "xmod": {"default_language": "en_XX"},
}
"""What a family needs besides, or may have although its config class leaves it out (windows of Qwen, Phi-3.5-MoE)."""


class NotTinyError(Exception):
    """A family can't be made tiny from its config's fields alone; the message says why."""


def tiny_network(model_type: str) -> Any:
    """Returns a model that its own eager attention runs through. Raises NotTinyError when there is none."""
    first_error = None
    for fields in _tiny_fields(model_type):
        try:
            return _made(model_type, fields)
        except Exception as error:  # a family's own code, given sizes that it may not take
            first_error = first_error or error
    raise NotTinyError(_line(first_error) if first_error else "its default config is not valid")


def _line(error: Exception) -> str:
    said = " ".join(str(error).split())
    return said if isinstance(error, NotTinyError) else f"{type(error).__name__}: {said}"


def _made(model_type: str, fields: dict[str, Any]) -> Any:
    config = CONFIG_MAPPING[model_type](**fields)
    with torch.device("meta"):
        weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(deepcopy(config)).parameters())
    if weights > MOST_WEIGHTS:
        raise NotTinyError("its sizes are said by other fields")
    network = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    _draw(network)
    with torch.inference_mode():
        network(input_ids=torch.tensor([[1, 2]]))
    return network


def _tiny_fields(model_type: str) -> Iterator[dict[str, Any]]:
    """Sets of fields to try: sizes that the config has, then those that it leaves open as well, then without some."""
    cls = CONFIG_MAPPING[model_type]
    with suppress(Exception):
        default = cls()
        known = {name: size for name, size in SIZES.items() if _has(default, name)}
        if getattr(default, "kv_lora_rank", None):
            known |= {"num_key_value_heads": 4}
            known.pop("head_dim", None)
        given = {name: size for name, size in known.items() if getattr(default, name) is not None or "_id" in name}
        for fields in (given, known):
            for left_out in ((), ("bos_token_id",), ("head_dim",)):
                kept = {name: size for name, size in fields.items() if name not in left_out}
                yield _with_kinds(cls, default, kept) | FIELDS.get(model_type, {})


def _has(config: Any, name: str) -> bool:
    try:
        getattr(config, name)
    except Exception:  # AttributeError, or what a config raises for fields that it has by layer
        return False
    return True


def _with_kinds(cls: Any, default: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """Adds layers of every kind that the family's default config has."""
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or ()))
    with suppress(Exception):
        if set(cls(**fields).layer_types) == set(kinds):
            return fields
    if not kinds:
        return fields
    types = (kinds * 4)[: max(4, len(kinds))]
    return fields | {"layer_types": types, "num_hidden_layers": len(types)}


@torch.no_grad()
def _draw(network: Any) -> None:
    """Weights that let activations neither vanish nor explode, so that a wrong attention shows."""
    generator = torch.Generator().manual_seed(1)
    for name, weight in network.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.dim() > 1:
            weight.copy_(noise / weight.shape[-1] ** 0.5)
        else:
            weight.copy_(0.3 * noise + ("norm" in name))
