"""Makes a `ModelSpec` from a Hugging Face ``config.json``: shapes in, parameters and attention out.

It reads features, not a list of models: `kv_lora_rank` means MLA, `index_topk` DeepSeek's sparse attention,
`layer_types` (or its older equivalents) sliding windows, `num_experts_per_tok` a mixture of experts. It refuses by name
what it can't describe (linear attention, state spaces, chunked attention). From a multimodal file it reads the text
model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from dualpath.lab.facts.attention import AttentionLayers, Indexer, KVFormat
from dualpath.lab.facts.model_spec import ModelSpec

_FULL = {"full_attention", "indexed_attention", "attention"}
_SLIDING = "sliding_attention"
_FULL_EVERY = {"gpt_oss": 2, "gemma2": 2, "olmo3": 4, "cohere2": 4, "exaone4": 4, "gemma3_text": 6}
"""Models whose every nth layer is full, and the others slide, if the file has neither `layer_types` nor a pattern."""
_ALL_SLIDE = {"mistral", "mixtral", "phi3", "starcoder2", "qwen3_moe"}
"""Models with a window in every layer, if the file has one at all."""
_UNGATED = {"gpt_neox", "opt", "phi", "starcoder2", "nemotron"}
"""Models whose MLP has two matrices; all others have three (gate, up, down)."""
_FOREIGN_KEYS = (
    "attention_chunk_size",
    "attn_layer_period",
    "compress_rates",
    "compress_ratios",
    "full_attention_interval",
    "hybrid_override_pattern",
    "linear_attn_config",
    "mamba_d_state",
)
"""Keys of files without `layer_types` whose layers are not attention as described here."""
_DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
_WEIGHT_BYTES = {"fp8": 1.0, "mxfp4": 0.53125}
"""Bytes per weight by quantization method; mxfp4 has an eight-bit scale per 32 four-bit values."""


class ModelConfigError(ValueError):
    """A config.json can't be read or described. The message names the file and the key."""


def from_hf_config(config: Path | str | Mapping[str, Any], name: str | None = None) -> ModelSpec:
    """Describes the model of a ``config.json``: a path to it, to its directory, or its content.

    The KV dtype is the file's `dtype` (`msgspec.structs.replace` it for fp8 KV). Raises ModelConfigError.
    """
    content, where = _read(config)
    content = {**content, **content.get("text_config", {})}
    return _Reader(content, where).model(name)


def _read(config: Path | str | Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    if isinstance(config, Mapping):
        return config, "config"
    path = Path(config)
    path = path / "config.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelConfigError(f"{path}: can't be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelConfigError(f"{path}: is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelConfigError(f"{path}: holds a {type(content).__name__}, not an object")
    return content, str(path)


class _Reader:
    """One file's content; `where` is its name in errors."""

    def __init__(self, content: Mapping[str, Any], where: str) -> None:
        self._content = content
        self._where = where
        for key in _FOREIGN_KEYS:
            if content.get(key):
                raise self._error(
                    key, "says that not all layers are full, sliding or sparse attention; only these are known"
                )
        self._layers = self._need("num_hidden_layers")
        self._hidden = self._need("hidden_size")
        self._heads = self._need("num_attention_heads")
        self._is_mla = content.get("kv_lora_rank") is not None

    def model(self, name: str | None) -> ModelSpec:
        attention_parameters = float(self._layers * self._attention_parameters())
        moe_layers = self._moe_layers()
        dense = (self._layers - moe_layers) * self._mlp(self._dense_width()) if self._layers > moe_layers else 0
        routed = shared = active = 0
        if moe_layers:
            expert = self._mlp(self._content.get("moe_intermediate_size") or self._need("intermediate_size"))
            experts = self._experts()
            routed = moe_layers * experts * expert
            active = moe_layers * self._need("num_experts_per_tok") * expert
            shared = moe_layers * (self._shared_parameters(expert) + experts * self._hidden)
        head = self._need("vocab_size") * self._hidden
        embedding = 0 if self._content.get("tie_word_embeddings") else head
        always = attention_parameters + dense + shared + head
        return ModelSpec(
            name=name or str(self._content.get("model_type", "model")),
            attention=self._attention(),
            active_parameters=always + active,
            total_parameters=always + routed + embedding,
            routed_parameters=float(routed),
            attention_parameters=attention_parameters,
            kv_dtype=self._kv_dtype(),
            weight_bytes_per_parameter=self._weight_bytes(),
            source=self._where,
        )

    # ── attention ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _attention(self) -> tuple[AttentionLayers, ...]:
        sliding = self._sliding_layers()
        run = self._mla_layer() if self._is_mla else self._gqa_layer(self._kv_heads())
        sharing = self._sharing_layers()
        runs = [
            msgspec.structs.replace(run, layers=self._layers - sliding - sharing),
            msgspec.structs.replace(run, layers=sharing, own_indexer=False),
        ]
        if sliding:
            window = self._need("sliding_window")
            other = run if self._is_mla else self._gqa_layer(self._kv_heads(sliding=True))
            runs.append(msgspec.structs.replace(other, layers=sliding, window_tokens=window))
        return tuple(run for run in runs if run.layers)

    def _gqa_layer(self, kv_heads: int) -> AttentionLayers:
        key, value = self._head_dim(), self._value_dim()
        kv = KVFormat(elements=kv_heads * (key + value))
        return AttentionLayers(layers=1, heads=self._heads, score_dim=key, value_dim=value, kv=kv)

    def _mla_layer(self) -> AttentionLayers:
        latent, rope = self._need("kv_lora_rank"), self._need("qk_rope_head_dim")
        return AttentionLayers(
            layers=1,
            heads=self._heads,
            score_dim=latent + rope,
            value_dim=latent,
            kv=KVFormat(elements=latent, unquantised_elements=rope, scale_group_elements=128),
            indexer=self._indexer(),
        )

    def _indexer(self) -> Indexer | None:
        if self._content.get("index_topk") is None:
            return None
        return Indexer(
            heads=self._need("index_n_heads"), dim=self._need("index_head_dim"), top_k_tokens=self._need("index_topk")
        )

    def _sharing_layers(self) -> int:
        """Layers that take the selection of a layer before, and so keep no index keys."""
        return sum(kind != "full" for kind in self._content.get("indexer_types") or ())

    def _sliding_layers(self) -> int:
        types = self._content.get("layer_types")
        if types is not None:
            if len(types) != self._layers:
                raise self._error("layer_types", f"names {len(types)} layers of {self._layers}")
            for kind in types:
                if kind not in _FULL and kind != _SLIDING:
                    raise self._error("layer_types", f"has {kind!r}; only full, sliding and indexed attention is known")
            return sum(kind == _SLIDING for kind in types)
        if not self._content.get("sliding_window") or self._content.get("use_sliding_window") is False:
            return 0
        family = str(self._content.get("model_type"))
        every = self._content.get("sliding_window_pattern") or _FULL_EVERY.get(family)
        if every:
            return self._layers - self._layers // every
        if family in _ALL_SLIDE:
            return self._layers
        if family.startswith("qwen") and "use_sliding_window" not in self._content:
            return 0
        if family.startswith("qwen"):
            return max(0, self._layers - self._need("max_window_layers"))
        raise self._error("layer_types", "is missing, and the model has a window: say which layers see it")

    def _attention_parameters(self) -> float:
        """Of the mean layer."""
        hidden, heads = self._hidden, self._heads
        if not self._is_mla:
            widths, sliding = self._head_dim() + self._value_dim(), self._sliding_layers()
            kv_heads = self._kv_heads() * (self._layers - sliding) + self._kv_heads(sliding=True) * sliding
            return hidden * widths * heads + hidden * widths * kv_heads / self._layers
        latent, rope = self._need("kv_lora_rank"), self._need("qk_rope_head_dim")
        nope, value = self._need("qk_nope_head_dim"), self._need("v_head_dim")
        q_lora = self._content.get("q_lora_rank")
        query_input = q_lora or hidden
        q = (hidden * q_lora if q_lora else 0) + query_input * heads * (nope + rope)
        kv = hidden * (latent + rope) + latent * heads * (nope + value)
        indexer = self._indexer()
        index = 0.0
        if indexer is not None:
            index = query_input * indexer.heads * indexer.dim + hidden * (indexer.dim + indexer.heads)
            index *= 1 - self._sharing_layers() / self._layers
        return q + kv + heads * value * hidden + index

    def _head_dim(self) -> int:
        if self._content.get("head_dim") is not None:
            return self._need("head_dim")
        if self._hidden % self._heads:
            raise self._error("head_dim", f"is missing and {self._hidden} does not divide by {self._heads} heads")
        return self._hidden // self._heads

    def _value_dim(self) -> int:
        """Elements of a value's head, where it is not MLA's."""
        return self._head_dim() if self._content.get("v_head_dim") is None else self._need("v_head_dim")

    def _kv_heads(self, *, sliding: bool = False) -> int:
        doubled = sliding and self._content.get("model_type") == "mimo_v2_flash"
        heads = self._heads if self._content.get("num_key_value_heads") is None else self._need("num_key_value_heads")
        return 2 * heads if doubled else heads

    # ── experts ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _experts(self) -> int:
        for key in ("n_routed_experts", "num_experts", "num_local_experts"):
            if self._content.get(key) is not None:
                return self._need(key)
        raise self._error("n_routed_experts", "is missing, and so are num_experts and num_local_experts")

    def _moe_layers(self) -> int:
        if not self._content.get("num_experts_per_tok"):
            return 0
        kinds = self._content.get("mlp_layer_types")
        if kinds is not None:
            return sum(kind == "sparse" for kind in kinds)
        step = self._content.get("decoder_sparse_step") or self._content.get("moe_layer_freq") or 1
        dense = set(self._content.get("mlp_only_layers") or ())
        first = self._content.get("first_k_dense_replace") or 0
        offset = 1 if self._content.get("decoder_sparse_step") else 0  # Qwen counts layers from one here
        layers = range(first, self._layers)
        return sum((layer + offset) % step == 0 and layer not in dense for layer in layers)

    def _shared_parameters(self, expert: int) -> int:
        if self._content.get("shared_expert_intermediate_size"):
            return self._mlp(self._need("shared_expert_intermediate_size"))
        return (self._content.get("n_shared_experts") or 0) * expert

    def _dense_width(self) -> int:
        return self._need("intermediate_size")

    def _mlp(self, width: int) -> int:
        return (2 if self._content.get("model_type") in _UNGATED else 3) * self._hidden * width

    # ── dtypes and errors ────────────────────────────────────────────────────────────────────────────────────────────

    def _kv_dtype(self) -> str:
        dtype = self._content.get("dtype") or self._content.get("torch_dtype") or "bfloat16"
        if dtype not in _DTYPES:
            raise self._error("dtype", f"is {dtype!r}; known are {', '.join(_DTYPES)}")
        return _DTYPES[dtype]

    def _weight_bytes(self) -> float:
        quantization = self._content.get("quantization_config")
        if not quantization:
            return 4.0 if self._kv_dtype() == "fp32" else 2.0
        method = quantization.get("quant_method")
        if method not in _WEIGHT_BYTES:
            raise self._error(
                "quantization_config.quant_method", f"is {method!r}; known are {', '.join(_WEIGHT_BYTES)}"
            )
        return _WEIGHT_BYTES[method]

    def _need(self, key: str) -> int:
        value = self._content.get(key)
        if value is None:
            raise self._error(key, "is missing")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._error(key, f"is {value!r}; it must be a whole number from 1 up")
        return value

    def _error(self, key: str, problem: str) -> ModelConfigError:
        return ModelConfigError(f"{self._where}: {key} {problem}")
