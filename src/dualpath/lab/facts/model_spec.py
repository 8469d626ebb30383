"""A model as arithmetic for caches, links and cost models: bytes of KV, FLOPs, parameters."""

from __future__ import annotations

import msgspec

from dualpath.lab.facts.attention import KV_DTYPES, AttentionLayers
from dualpath.spec.kv_bytes import KVBytes, Window


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Raises ValueError for no layers, an unknown KV dtype or more active parameters than there are."""

    name: str
    attention: tuple[AttentionLayers, ...]
    """Runs of layers that attend alike, in no particular order."""
    active_parameters: float
    """Parameters that multiply each token: layers (active experts only) and output head, without the embedding."""
    total_parameters: float
    routed_parameters: float
    """Parameters in routed experts, which expert parallelism spreads over the engines of a role."""
    attention_parameters: float
    """Parameters of the attention layers' projections (included in the active ones)."""
    kv_dtype: str
    """The usual KV dtype, ``fp8``, ``fp16``, ``bf16`` or ``fp32``: the default of the methods."""
    weight_bytes_per_parameter: float
    source: str
    """Source of the shapes and figures."""

    def __post_init__(self) -> None:
        if self.layers < 1 or self.kv_dtype not in KV_DTYPES:
            raise ValueError(
                f"model {self.name!r}: {self.layers} attention layers and KV dtype {self.kv_dtype!r}; at least one "
                f"layer is needed and a dtype of {', '.join(KV_DTYPES)}"
            )
        if not 0 < self.active_parameters <= self.total_parameters:
            raise ValueError(
                f"model {self.name!r}: {self.active_parameters:g} active parameters of {self.total_parameters:g}; "
                "they must be above zero and no more than all"
            )

    @property
    def layers(self) -> int:
        return sum(run.layers for run in self.attention)

    @property
    def dense_flops_per_token(self) -> float:
        """Two per parameter; `attention_flops` has attention's scores and values."""
        return 2 * self.active_parameters

    @property
    def projection_flops_per_token(self) -> float:
        """The part of `dense_flops_per_token` in attention layers: q, k, v, o."""
        return 2 * self.attention_parameters

    def kv(self, dtype: str | None = None, index_keys: bool = True) -> KVBytes:
        """Bytes of a token's KV, all layers; `index_keys` includes sparse attention's keys."""
        runs = [(run.window_tokens, run.token_bytes(dtype or self.kv_dtype, index_keys)) for run in self.attention]
        whole = sum(n_bytes for window_tokens, n_bytes in runs if window_tokens is None)
        return KVBytes(whole, tuple(Window(tokens, n_bytes) for tokens, n_bytes in runs if tokens is not None))

    def attention_flops(self, hit_tokens: float, new_tokens: float) -> float:
        """FLOPs of scores, values and indexer of `new_tokens` after `hit_tokens`: Σ over new tokens, causal."""
        return sum(run.flops(hit_tokens, new_tokens) for run in self.attention)

    def prefill_flops(self, hit_tokens: float, new_tokens: float) -> float:
        """All FLOPs of computing `new_tokens` after `hit_tokens`."""
        return new_tokens * self.dense_flops_per_token + self.attention_flops(hit_tokens, new_tokens)

    def attention_line(self) -> tuple[float, float]:
        """Attention as ``(FLOPs per new token, FLOPs per pair)``, the form of core's `AttentionCost`.

        Exact if the context is longer than every window and top-k, otherwise an upper bound. Projections are left out.
        """
        per_token = sum(run.flops_per_pair * run.limit_tokens for run in self.attention if run.limit_tokens is not None)
        per_pair = sum(
            run.index_flops_per_pair + (run.flops_per_pair if run.limit_tokens is None else 0) for run in self.attention
        )
        return float(per_token), float(per_pair)

    def decode_flops(self, context_tokens: float) -> float:
        """FLOPs of one token of one sequence."""
        return self.prefill_flops(context_tokens, 1)

    def decode_read_bytes(self, context_tokens: float, dtype: str | None = None) -> float:
        """KV bytes that a decode step of one sequence reads from device memory."""
        return sum(run.read_bytes(context_tokens, dtype or self.kv_dtype) for run in self.attention)

    def weight_bytes(self, expert_parallel: int = 1, bytes_per_parameter: float | None = None) -> float:
        """Weights on one GPU: routed experts are spread over `expert_parallel` GPUs, the rest is on each of them."""
        each = self.total_parameters - self.routed_parameters * (1 - 1 / expert_parallel)
        return each * (bytes_per_parameter or self.weight_bytes_per_parameter)
