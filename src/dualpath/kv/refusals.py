"""Which models keep what can't be cut into blocks of tokens: told from a config.json alone, before weights are read."""

from typing import Any

from dualpath.kv.layout import WHOLE_KV_LAYER_TYPES

STATE_FAMILIES = frozenset(
    {
        "bailing_hybrid",
        "bamba",
        "falcon_h1",
        "falcon_mamba",
        "granitemoehybrid",
        "inkling_text",
        "inkling2_text",
        "jamba",
        "kimi_linear",
        "lfm2",
        "lfm2_moe",
        "lfm3",
        "mamba",
        "mamba2",
        "minimax",
        "nemotron_h",
        "olmo_hybrid",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_next",
        "qwen4_exp",
        "qwen4_exp_text",
        "recurrent_gemma",
        "rwkv",
        "xlstm",
        "zamba",
        "zamba2",
        "zaya",
    }
)
"""By `model_type`: a published config need not name the types of its layers. Where it does, and none keeps a state
(Granite 4.0 Micro), the model is not refused. See docs/design/hybrids.md."""

_SIZES = {"num_attention_heads", "num_key_value_heads", "head_dim", "kv_lora_rank", "qk_rope_head_dim"}


def refusal(config: Any) -> str | None:
    """Returns why the KV of a Hugging Face `config` can't be stored and moved, to follow its name; None if it may be.

    What else a config doesn't say, such as sizes that differ by layer, shows when the model is loaded.
    """
    kinds = set(map(str, getattr(config, "layer_types", None) or ()))
    others = sorted(kinds - WHOLE_KV_LAYER_TYPES - {"attention"})  # older configs' name of full attention
    if getattr(config, "model_type", None) in STATE_FAMILIES and (others or not kinds):
        return (
            "has layers that keep one state for all tokens so far (linear attention, state spaces, convolutions), not "
            "a row a token, so a prefix can't be cut out of them; only attention over rows of tokens is supported"
        )
    if others:
        return (
            f"has layers of type {', '.join(others)}; only full, sliding-window and indexed attention has KV of every "
            "token in every layer, which is what is stored and moved here"
        )
    parts = ("text_config", "vision_config", "audio_config", "decoder", "thinker_config")
    inner = [name for name in parts if getattr(config, name, None) is not None]
    if inner and getattr(config, "num_hidden_layers", None) is None:
        return (
            f"is made of several models ({', '.join(inner)}), for images or sound beside text; only a language model "
            "alone is supported"
        )
    by_layer = sorted(_SIZES & set(getattr(config, "per_layer_attributes", None) or ()))
    if by_layer:
        return f"has layers that differ in {', '.join(by_layer)}; rows of KV must have one size in all layers"
    return None
