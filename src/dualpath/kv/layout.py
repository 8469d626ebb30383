"""The byte layout of a KV-cache block (paper §3).

Layer Block = ``[tokens, bytes]`` of one layer; Full Block = ``[layers, tokens, bytes]``, the concatenation of its Layer
Blocks. A Full Block is one contiguous page and a layer is a byte range of it, so nothing is ever converted.
"""

from typing import Annotated, Any

import msgspec

from dualpath.spec.bounds import Count, Name

WHOLE_KV_LAYER_TYPES = frozenset(
    {"full_attention", "sliding_attention", "indexed_attention", "deepseek_sparse_attention"}
)
"""Layers, by name in a config's `layer_types`, that keep a row of every token; a sliding one reads its window, an
indexed one (the last is its older name) what it selects."""

_ITEMSIZE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class KVPart(msgspec.Struct, frozen=True):
    """A named piece of a token's bytes in one layer, `heads × dim` elements: k and v, or latent, rope and index."""

    name: Name
    heads: Count
    dim: Count

    def __post_init__(self) -> None:
        if self.heads < 1 or self.dim < 1:
            raise ValueError(f"KV part {self.name!r} has {self.heads} heads × {self.dim} elements; both must be ≥ 1")


def parts_of(config: Any) -> tuple[KVPart, ...]:
    """Returns the parts of a model's KV from its Hugging Face `config`. Raises ValueError when it does not say them."""
    if getattr(config, "kv_lora_rank", None):
        return (
            KVPart("latent", 1, config.kv_lora_rank),
            KVPart("rope", 1, config.qk_rope_head_dim),
            *_index_part(config),
        )
    heads: int | None = getattr(config, "num_attention_heads", None)
    if heads is None:
        raise ValueError("its config.json does not say num_attention_heads; its attention is not known")
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return (KVPart("k", kv_heads, head_dim), KVPart("v", kv_heads, head_dim))


def _index_part(config: Any) -> tuple[KVPart, ...]:
    """The key by which a sparse layer's indexer selects tokens, if the model has one.

    All layers have one layout here, so a model is refused whose layers differ in whether they keep a key.
    """
    dim: int | None = getattr(config, "index_head_dim", None)
    if not dim:
        return ()
    kinds = sorted(set(getattr(config, "layer_types", None) or ()))
    if len(kinds) > 1:
        raise ValueError(f"its layers are of types {', '.join(kinds)}, and only some of them keep index keys")
    without = [i for i, kind in enumerate(getattr(config, "indexer_types", None) or ()) if kind != "full"]
    if without:
        raise ValueError(
            f"its layers {', '.join(map(str, without))} share the indexer of a layer before them (indexer_types), so "
            "they keep no index keys while others do"
        )
    return (KVPart("index", 1, dim),)


class KVLayout(msgspec.Struct, frozen=True):
    """The layout of a model's KV, equal on the device, in a buffer and in storage. Sizes are in bytes unless named.

    Raises ValueError for a layout that holds no bytes or whose `dtype` is unknown.
    """

    layers: Count
    parts: Annotated[tuple[KVPart, ...], msgspec.Meta(max_length=16)]
    dtype: Name
    """``float32``, ``bfloat16`` or ``float16``."""
    block_tokens: Count = 64

    def __post_init__(self) -> None:
        if self.dtype not in _ITEMSIZE_BYTES:
            raise ValueError(f"KV dtype {self.dtype!r} is unknown; use one of {', '.join(_ITEMSIZE_BYTES)}")
        if self.layers < 1 or self.block_tokens < 1 or not self.parts:
            raise ValueError(
                f"a KV layout needs at least one layer, one part and one token a block; got {self.layers} layers, "
                f"{len(self.parts)} parts, {self.block_tokens} tokens"
            )

    @property
    def itemsize_bytes(self) -> int:
        return _ITEMSIZE_BYTES[self.dtype]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in one layer (the paper's `bytes`)."""
        return sum(part.heads * part.dim for part in self.parts) * self.itemsize_bytes

    @property
    def layer_block_bytes(self) -> int:
        return self.block_tokens * self.token_bytes

    @property
    def full_block_bytes(self) -> int:
        return self.layers * self.layer_block_bytes

    def layer_range(self, layer: int, first_token: int = 0, tokens: int | None = None) -> tuple[int, int]:
        """Byte range ``(start, stop)`` inside a Full Block of `tokens` tokens of `layer`, from `first_token`."""
        if tokens is None:
            tokens = self.block_tokens - first_token
        if not (
            0 <= layer < self.layers and first_token >= 0 and tokens >= 0 and first_token + tokens <= self.block_tokens
        ):
            raise ValueError(
                f"layer {layer}, tokens {first_token}+{tokens} are outside a block of {self.layers} layers × "
                f"{self.block_tokens} tokens"
            )
        start = layer * self.layer_block_bytes + first_token * self.token_bytes
        return start, start + tokens * self.token_bytes
