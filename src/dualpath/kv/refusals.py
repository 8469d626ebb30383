"""Which models keep what can't be cut into blocks of tokens: told from a config.json alone, before weights are read."""

from collections.abc import Iterable
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

_COUNTS = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "index_topk",
    "max_position_embeddings",
)
_SIZES = {"num_attention_heads", "num_key_value_heads", "head_dim", "kv_lora_rank", "qk_rope_head_dim"}


def refusal(config: Any) -> str | None:
    """Returns why the KV of a Hugging Face `config` can't be stored and moved, to follow its name; None if it may be.

    What else a config doesn't say, such as sizes that differ by layer, shows when the model is loaded.
    """
    if (nonsense := _of_no_kind(config)) is not None:
        return nonsense
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
    return _nonsense(config)


def _of_no_kind(config: Any) -> str | None:
    """Returns which field of a config has a value of another kind than any config's."""
    for name in ("model_type", "per_layer_attributes", "layer_types", "indexer_types"):
        value = getattr(config, name, None)
        fits = isinstance(value, str) == (name == "model_type") and isinstance(value, Iterable)
        if value is not None and not fits:
            return f"has a config.json whose {name} is {value!r}, which makes no sense"
    return None


def _nonsense(config: Any) -> str | None:
    """Returns which numbers of a config make no sense, whatever its family."""
    for name in _COUNTS:
        value = getattr(config, name, None)
        if value is not None and (not isinstance(value, int) or value < 1):
            return f"has a config.json whose {name} is {value!r}; it must be a whole number above 0"
    layers = getattr(config, "num_hidden_layers", None)
    for name in ("layer_types", "indexer_types"):
        named = getattr(config, name, None)
        if named is not None and layers is not None and len(named) != layers:
            return f"has a config.json with {name} for {len(named)} layers, and {layers} layers"
    if (getattr(config, "indexer_types", None) or ["full"])[0] != "full":
        return "has a config.json whose first layer shares the indexer of a layer before it (indexer_types)"
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if slides and (not isinstance(window, int) or window < 1):
        return f"has layers with a window, and a config.json whose sliding_window is {window!r}"
    return None
