"""The cost of attention: bytes of KV per token, FLOPs and bytes that a new token needs for its context.

A model's layers come in runs that attend alike (`AttentionLayers`):

* full: a new token is multiplied with every token before it.
* sliding: a new token sees the last `window_tokens` only. KV outside the window is stored, for prompts that end
  earlier, but is not read.
* sparse (DeepSeek's DSA): an *indexer*, a small attention of its own, scores every token before it, and the attention
  proper sees the `top_k_tokens` best. KV and the indexer's keys are kept for the whole context.

One multiply-add is two FLOPs. A *pair* is a new token and one token that it sees.
"""

from __future__ import annotations

import msgspec

KV_DTYPES = ("fp8", "fp16", "bf16", "fp32")
_ITEMSIZE_BYTES = {"fp8": 1, "fp16": 2, "bf16": 2, "fp32": 4}
_SCALE_BYTES = 4


class KVFormat(msgspec.Struct, frozen=True, kw_only=True):
    """KV of one token in one layer, in elements."""

    elements: int
    """Elements in the KV dtype: k and v of every KV head, or MLA's latent."""
    unquantised_elements: int = 0
    """Elements that take two bytes if the dtype is fp8: MLA's rope part."""
    scale_group_elements: int = 0
    """Elements that share a four-byte scale if the dtype is fp8; 0: one scale per tensor, which costs nothing."""

    def token_bytes(self, dtype: str) -> int:
        """Returns the bytes of one token in one layer. Raises ValueError for an unknown dtype."""
        if dtype not in _ITEMSIZE_BYTES:
            raise ValueError(f"KV dtype {dtype!r} is unknown; use one of {', '.join(KV_DTYPES)}")
        if dtype != "fp8":
            return (self.elements + self.unquantised_elements) * _ITEMSIZE_BYTES[dtype]
        groups = -(-self.elements // self.scale_group_elements) if self.scale_group_elements else 0
        return self.elements + groups * _SCALE_BYTES + self.unquantised_elements * 2


class Indexer(msgspec.Struct, frozen=True, kw_only=True):
    """The scorer of sparse attention: `heads` queries of `dim` elements against one key per token."""

    heads: int
    dim: int
    top_k_tokens: int
    """Number of tokens that the attention proper sees."""

    @property
    def key(self) -> KVFormat:
        """One key per token and layer, with a scale per 128 elements if it is fp8."""
        return KVFormat(elements=self.dim, scale_group_elements=128)

    @property
    def flops_per_pair(self) -> int:
        return 2 * self.heads * self.dim


class AttentionLayers(msgspec.Struct, frozen=True, kw_only=True):
    """A run of `layers` layers that attend alike."""

    layers: int
    heads: int
    """Query heads."""
    score_dim: int
    """Elements of a query and a key; for MLA, which computes on latents, those of the latent and rope."""
    value_dim: int
    """Elements of a value; for MLA those of the latent."""
    kv: KVFormat
    window_tokens: int | None = None
    indexer: Indexer | None = None
    own_indexer: bool = True
    """False for layers that take the selection of a layer before: they keep no index keys and score none."""

    @property
    def flops_per_pair(self) -> int:
        """FLOPs of scores and values in all the layers, without the indexer."""
        return self.layers * self.heads * 2 * (self.score_dim + self.value_dim)

    @property
    def index_flops_per_pair(self) -> int:
        return self.layers * self.indexer.flops_per_pair if self.indexer and self.own_indexer else 0

    @property
    def limit_tokens(self) -> int | None:
        """The most tokens that a new token sees; None: all of them."""
        return self.indexer.top_k_tokens if self.indexer else self.window_tokens

    def flops(self, hit_tokens: float, new_tokens: float) -> float:
        """FLOPs (scores, values, indexer) of `new_tokens` after `hit_tokens`; a new token sees itself too."""
        pairs = new_tokens * hit_tokens + new_tokens * (new_tokens + 1) / 2
        return _seen_pairs(hit_tokens, new_tokens, self.limit_tokens) * self.flops_per_pair + (
            pairs * self.index_flops_per_pair
        )

    def read_bytes(self, context_tokens: float, dtype: str) -> float:
        """KV bytes that a decode step of one sequence reads from device memory, all the layers."""
        seen = context_tokens if self.limit_tokens is None else min(context_tokens, self.limit_tokens)
        index = self.indexer.key.token_bytes(dtype) * context_tokens if self.indexer and self.own_indexer else 0
        return self.layers * (seen * self.kv.token_bytes(dtype) + index)

    def token_bytes(self, dtype: str, index_keys: bool = True) -> int:
        """Returns the bytes of a token's KV in all the layers."""
        key = self.indexer.key.token_bytes(dtype) if self.indexer and self.own_indexer and index_keys else 0
        return self.layers * (self.kv.token_bytes(dtype) + key)


def _seen_pairs(hit_tokens: float, new_tokens: float, limit: int | None) -> float:
    """Σ over new tokens i = 1…n of min(hit + i, limit)."""
    if limit is None:
        return new_tokens * hit_tokens + new_tokens * (new_tokens + 1) / 2
    below = min(new_tokens, max(0.0, limit - hit_tokens))
    return below * hit_tokens + below * (below + 1) / 2 + (new_tokens - below) * limit
