"""The byte layout of a KV-cache block (paper §3).

Layer Block = ``[tokens, bytes]`` of one layer; Full Block = ``[layers, tokens, bytes]``, the concatenation of its Layer
Blocks. A Full Block is one contiguous page and a layer is a byte range of it, so nothing is ever converted.
"""

from collections.abc import Collection, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Annotated, Any

import msgspec

from dualpath.spec.bounds import Count, Name
from dualpath.spec.kv_bytes import BLOCK_TOKENS, KVBytes, Window, first_seen

WHOLE_KV_LAYER_TYPES = frozenset(
    {"full_attention", "sliding_attention", "indexed_attention", "deepseek_sparse_attention"}
)
"""Layers, by name in a config's `layer_types`, that keep a row of every token; a sliding one reads its window, an
indexed one (the last is its older name) what it selects."""

MAX_LAYERS = 4096
"""More than any model has: a bound of what another process may send."""

_ITEMSIZE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def extents(layer_block_bytes: Sequence[int], layers: Collection[int] | None = None) -> list[tuple[int, int]]:
    """Returns the byte ranges ``(start, stop)`` of `layers` in their Full Block, joined where they touch; None: all."""
    joined: list[tuple[int, int]] = []
    wanted = None if layers is None else set(layers)
    for layer, (start, stop) in enumerate(pairwise(accumulate(layer_block_bytes, initial=0))):
        if wanted is None or layer in wanted:
            first = joined.pop()[0] if joined and joined[-1][1] == start else start
            joined.append((first, stop))
    return joined


class KVPart(msgspec.Struct, frozen=True):
    """A named piece of a token's bytes in one layer, `heads × dim` elements: k and v, or latent, rope and index."""

    name: Name
    heads: Count
    dim: Count

    def __post_init__(self) -> None:
        if self.heads < 1 or self.dim < 1:
            raise ValueError(f"KV part {self.name!r} has {self.heads} heads × {self.dim} elements; both must be ≥ 1")


def layer_parts(config: Any) -> tuple[tuple[KVPart, ...], ...]:
    """Returns the parts of each layer's KV from a model's Hugging Face `config`.

    Raises ValueError when it does not say them.
    """
    layers: int | None = getattr(config, "num_hidden_layers", None)
    if layers is None:
        raise ValueError("its config.json does not say num_hidden_layers")
    for by_layer in ("layer_types", "indexer_types"):
        named = getattr(config, by_layer, None)
        if named is not None and len(named) != layers:
            raise ValueError(f"its config.json has {by_layer} for {len(named)} layers, and {layers} layers")
    if getattr(config, "kv_lora_rank", None):
        latent = (KVPart("latent", 1, config.kv_lora_rank), KVPart("rope", 1, config.qk_rope_head_dim))
        return tuple((*latent, *_index_part(config, layer)) for layer in range(layers))
    heads: int | None = getattr(config, "num_attention_heads", None)
    if heads is None:
        raise ValueError("its config.json does not say num_attention_heads; its attention is not known")
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    value_dim = getattr(config, "v_head_dim", None) or head_dim
    types = getattr(config, "layer_types", None) or ("",) * layers
    # MiMo's layers with a window have twice the heads, which its code says, not its config.
    doubled = "sliding_attention" if getattr(config, "model_type", None) == "mimo_v2_flash" else None
    heads_of = [kv_heads * 2 if kind == doubled else kv_heads for kind in types]
    return tuple((KVPart("k", own, head_dim), KVPart("v", own, value_dim)) for own in heads_of)


def _index_part(config: Any, layer: int) -> tuple[KVPart, ...]:
    """The key by which a sparse layer's indexer selects tokens.

    A layer has none that takes the selection of a layer before it (`indexer_types`), or that attends to all.
    """
    dim: int | None = getattr(config, "index_head_dim", None)
    kinds, indexers = getattr(config, "layer_types", None), getattr(config, "indexer_types", None)
    attends_to_all = kinds is not None and kinds[layer] == "full_attention"
    if not dim or attends_to_all or (indexers is not None and indexers[layer] != "full"):
        return ()
    return (KVPart("index", 1, dim),)


class LayerKV(msgspec.Struct, frozen=True):
    """What a layer keeps of a token, and how long it is read. Raises ValueError for one that keeps or sees nothing."""

    parts: Annotated[tuple[KVPart, ...], msgspec.Meta(max_length=16)]
    window_tokens: Count | None = None
    """How many tokens a token sees, itself included; None: all before it."""

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("a layer of a KV layout needs at least one part")
        if self.window_tokens is not None and self.window_tokens < 1:
            raise ValueError(f"a sliding window of {self.window_tokens} tokens; a token sees itself at least")

    @property
    def row_elements(self) -> int:
        """Elements of one token."""
        return sum(part.heads * part.dim for part in self.parts)

    def first_seen(self, tokens: int) -> int:
        """Returns the first of `tokens` cached tokens that the next token, or any after it, sees."""
        return first_seen(tokens, self.window_tokens)


class KVLayout(msgspec.Struct, frozen=True, dict=True):
    """The layout of a model's KV, equal on the device, in a buffer and in storage. Sizes are in bytes unless named.

    Layers may differ: in what they keep of a token (`parts`), and in how far back they see (`window_tokens`). Storage
    has whole Full Blocks of every layer, because what a window has passed in one prompt another prompt may still see.

    Raises ValueError for a layout that holds no bytes or whose `dtype` is unknown.
    """

    kinds: Annotated[tuple[LayerKV, ...], msgspec.Meta(min_length=1, max_length=16)]
    layer_kinds: Annotated[tuple[Count, ...], msgspec.Meta(max_length=MAX_LAYERS)]
    """For each layer, the index of its kind."""
    dtype: Name
    """``float32``, ``bfloat16`` or ``float16``."""
    block_tokens: Count = BLOCK_TOKENS

    def __post_init__(self) -> None:
        if self.dtype not in _ITEMSIZE_BYTES:
            raise ValueError(f"KV dtype {self.dtype!r} is unknown; use one of {', '.join(_ITEMSIZE_BYTES)}")
        if not self.layer_kinds or self.block_tokens < 1:
            raise ValueError(
                f"a KV layout needs at least one layer and one token a block; got {self.layers} layers and "
                f"{self.block_tokens} tokens"
            )
        if max(self.layer_kinds) >= len(self.kinds):
            raise ValueError(f"layers are of kinds {sorted(set(self.layer_kinds))}, and there are {len(self.kinds)}")

    @classmethod
    def of(cls, layers: Sequence[LayerKV], dtype: str, block_tokens: int = BLOCK_TOKENS) -> "KVLayout":
        """Returns the layout of these layers. Equal layers give equal layouts."""
        kinds = tuple(dict.fromkeys(layers))
        return cls(kinds, tuple(kinds.index(layer) for layer in layers), dtype, block_tokens)

    @classmethod
    def alike(cls, layers: int, parts: tuple[KVPart, ...], dtype: str, block_tokens: int = BLOCK_TOKENS) -> "KVLayout":
        """Returns the layout of layers that all keep `parts` and see every token."""
        return cls.of([LayerKV(parts)] * layers, dtype, block_tokens)

    @property
    def layers(self) -> int:
        return len(self.layer_kinds)

    @property
    def itemsize_bytes(self) -> int:
        return _ITEMSIZE_BYTES[self.dtype]

    def kind(self, layer: int) -> LayerKV:
        return self.kinds[self.layer_kinds[layer]]

    @cached_property
    def row_bytes(self) -> tuple[int, ...]:
        """For each layer, the bytes of one token (the paper's `bytes`): a row of its Layer Blocks."""
        sizes = [kind.row_elements * self.itemsize_bytes for kind in self.kinds]
        return tuple(sizes[kind] for kind in self.layer_kinds)

    @cached_property
    def kv_bytes(self) -> KVBytes:
        """Bytes of one token in all layers, and of a hit."""
        by_window: dict[int | None, int] = {}
        for kind, row in zip(self.layer_kinds, self.row_bytes, strict=True):
            window = self.kinds[kind].window_tokens
            by_window[window] = by_window.get(window, 0) + row
        whole = by_window.pop(None, 0)
        return KVBytes(whole, tuple(Window(tokens, row) for tokens, row in by_window.items() if tokens))

    @cached_property
    def layer_block_bytes(self) -> tuple[int, ...]:
        """For each layer, the bytes of a Layer Block."""
        return tuple(self.block_tokens * row for row in self.row_bytes)

    @property
    def full_block_bytes(self) -> int:
        return self._starts[-1]

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        """Where each layer starts in a Full Block, and its end."""
        return tuple(accumulate(self.layer_block_bytes, initial=0))

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
        start = self._starts[layer] + first_token * self.row_bytes[layer]
        return start, start + tokens * self.row_bytes[layer]

    def extents(self, layers: Collection[int] | None = None) -> list[tuple[int, int]]:
        """Returns the byte ranges ``(start, stop)`` of `layers` in a Full Block, joined where they touch; None: all."""
        return extents(self.layer_block_bytes, layers)

    def layers_seen(self, block: int, hit_tokens: int) -> tuple[int, ...]:
        """Returns the layers whose rows of a hit's `block` are seen by what is computed after the `hit_tokens`.

        Layers without a window see all. Another sees the block if it ends after its first seen token: only those
        ranges are read from storage.
        """
        end = (block + 1) * self.block_tokens
        seen = [end > kind.first_seen(hit_tokens) for kind in self.kinds]
        return tuple(layer for layer, kind in enumerate(self.layer_kinds) if seen[kind])
