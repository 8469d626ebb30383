"""Small seeded checkpoints in the ordinary Hugging Face format, made locally: nothing to download.

`make_checkpoint` writes the files of a published model (config, safetensors weights, generation config, byte-level
tokenizer with a ChatML template), so the engines load it like any other. Its weights are random, with these properties:

* activations keep a standard deviation near one through every layer, and queries and keys are scaled up, so what comes
  out depends on the whole context and greedy output wanders instead of repeating one token;
* logits have a standard deviation of a few units, so the gap between the two best tokens is far above float32 rounding;
* bytes that do not print get flatter logits, so text is mostly printable.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from dualpath.model.chat_template import CHATML_TEMPLATE
from dualpath.spec.architectures import Architecture

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

_TINY: dict[str, Any] = {
    "num_hidden_layers": 5,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
_TINY_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
_TINY_INDEXER: dict[str, Any] = {"index_n_heads": 16, "index_head_dim": 16, "index_topk": 64}
"""With fewer heads, scores of exactly zero, and so ties, would be common."""
_TINY_BY_ARCHITECTURE: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "llama": {"head_dim": 16},
    "deepseek_v3": _TINY_LATENT | {"num_nextn_predict_layers": 0},
    "deepseek_v32": _TINY_LATENT | _TINY_INDEXER,
    "glm_moe_dsa": _TINY_LATENT | _TINY_INDEXER | {"indexer_types": ["full", "shared"]},
    "gpt_oss": {"head_dim": 16, "sliding_window": 50, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mimo_v2_flash": {
        "head_dim": 16,
        "v_head_dim": 12,
        "sliding_window": 50,
        "layer_types": ["full_attention", "sliding_attention"],
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 50,
        "attn_logit_softcapping": 6.0,
        "final_logit_softcapping": 15.0,
    },
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 50,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "olmo3": {"sliding_window": 50},
    "exaone4": {"sliding_window": 50},
    "cohere2": {"sliding_window": 50, "logit_scale": 0.5},
    "mistral": {"sliding_window": 50},
}

DEMO_MODEL: Mapping[str, Any] = {
    "architecture": "qwen3",
    "seed": 2026,
    "num_hidden_layers": 8,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 131072,
}
"""Arguments of `make_checkpoint` for the demo's model: 16 KiB of float32 KV per token, like a large FP8 model's."""


def make_checkpoint(path: str | Path, architecture: Architecture, seed: int = 0, **sizes: Any) -> Path:
    """Write a checkpoint into the folder `path`, made if missing, and return the folder.

    `sizes` override fields of the architecture's Transformers config. The same arguments give the same weights.
    Raises ValueError for an unknown architecture or field.
    """
    if architecture not in _TINY_BY_ARCHITECTURE:
        known = ", ".join(_TINY_BY_ARCHITECTURE)
        raise ValueError(f"architecture {architecture!r} is not one that can be made here; choose one of {known}")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _byte_tokenizer()
    end_of_text, end_of_turn = (
        tokenizer.convert_tokens_to_ids(name) for name in (SPECIAL_TOKENS[0], SPECIAL_TOKENS[2])
    )
    config = AutoConfig.for_model(architecture)
    fields = _TINY | _TINY_BY_ARCHITECTURE[architecture] | sizes
    layers = fields["num_hidden_layers"]
    for by_layer in {"layer_types", "indexer_types"} & set(fields) - set(sizes):
        fields[by_layer] = (fields[by_layer] * layers)[:layers]
    unknown = sorted(name for name in fields if not hasattr(config, name))
    if unknown:
        raise ValueError(f"{architecture} has no config field named {', '.join(unknown)}; see its Transformers config")
    config = AutoConfig.for_model(
        architecture,
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=end_of_turn,
        pad_token_id=end_of_text,
        dtype="float32",
        **fields,
    )
    model = AutoModelForCausalLM.from_config(config)
    _draw_weights(model, seed, _printable_ids(tokenizer))
    model.generation_config = GenerationConfig(
        eos_token_id=[end_of_turn, end_of_text], pad_token_id=end_of_text, do_sample=False
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def model_fingerprint(path: str | Path) -> str:
    """Returns a hash of a checkpoint's config and weights, 32 hex digits. Engines share KV only if it is equal.

    Reads every weight file once. Raises FileNotFoundError when the folder has no config or no safetensors file.
    """
    folder = Path(path)
    weights = sorted(folder.glob("*.safetensors"))
    config_file = folder / "config.json"
    if not config_file.is_file() or not weights:
        raise FileNotFoundError(
            f"{folder} is not a checkpoint: it needs config.json and at least one .safetensors file"
        )
    config = json.loads(config_file.read_text())
    config.pop("transformers_version", None)
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=16)
    for file in weights:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "blake2b").digest())
    return digest.hexdigest()


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, then the special tokens: any text round-trips."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL_TOKENS[2],
        pad_token=SPECIAL_TOKENS[0],
        additional_special_tokens=[SPECIAL_TOKENS[1]],
        chat_template=CHATML_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _printable_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    text = "\n" + "".join(chr(code) for code in range(0x20, 0x7F))
    return [int(index) for index in tokenizer.encode(text, add_special_tokens=False)]


@torch.no_grad()
def _draw_weights(model: Any, seed: int, printable: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    is_gemma = "gemma" in model.config.model_type  # it adds 1 to gains and scales embeddings
    only_after = not any("input_layernorm" in name for name, _ in model.named_parameters())  # norms follow each part
    embedding_scale = math.sqrt(model.config.hidden_size) if is_gemma else 1.0
    for name, weight in sorted(model.named_parameters()):
        noise = torch.randn(weight.shape, generator=generator)
        if weight.dim() == 1:
            weight.copy_(_drawn_vector(name, noise, weakens=only_after and "post_" in name, from_zero=is_gemma))
        elif "embed_tokens" in name:
            weight.copy_(noise / embedding_scale)
        elif "lm_head" in name:
            flatter = torch.full((weight.shape[0], 1), 0.5)
            flatter[printable] = 1.0
            end_of_turn = weight.shape[0] - 1
            flatter[end_of_turn] = 1.0
            weight.copy_(noise * flatter * (3.0 / math.sqrt(weight.shape[1])))
        else:
            sharpens_attention = any(part in name for part in ("q_proj", "k_proj", "q_b_proj"))
            weight.copy_(noise * ((2.0 if sharpens_attention else 1.0) / math.sqrt(weight.shape[-1])))


def _drawn_vector(name: str, noise: Tensor, weakens: bool, from_zero: bool) -> Tensor:
    """Returns a norm's gains, attention sinks that weigh about as much as a token does, or a bias.

    A norm that `weakens` keeps what a layer adds below the token's own part, or all tokens would look alike.
    """
    if "norm" in name:
        return (0.4 if weakens else 0.0 if from_zero else 1.0) + 0.1 * noise
    return 2.0 + noise if "sinks" in name else 0.1 * noise
