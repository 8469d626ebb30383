"""Decode rates: the largest batch that memory and the time-per-token limit allow, and its step time.

    step(batch) = weights / HBM + layers · fixed
                + batch · (FLOPs / effective rate + KV read / HBM + layers · per_request)

The two constants are fitted to decode latencies of DeepSeek-V3.2 on H100 in groups of 64 at a context of 32K, from
aiconfigurator, a public performance database: 29, 39, 59 and 102 ms for batches of 16, 32, 64 and 128. A test holds the
formula to these within 4 %. The effective rate is prefill's. A cluster with a profile uses its measured steps instead.
"""

import msgspec

from dualpath.lab.facts.cluster import ClusterSpec
from dualpath.lab.planning.turn_load import TurnLoad

FIXED_S_PER_LAYER = 150e-6
"""Time of a layer's launches and collectives, whatever the batch."""
REQUEST_S_PER_LAYER = 2.7e-6
"""Time that a request adds to that, beyond its FLOPs and reading its KV."""


class DecodeRate(msgspec.Struct, frozen=True, kw_only=True):
    """One decode engine at its best batch."""

    batch: int
    """Requests that decode together; 0: not even one fits."""
    limit: str
    """What limits the batch: ``memory`` or ``TPOT``."""
    tpot_s: float
    """Time per output token at that batch."""
    tokens_per_s: float


def step_s(cluster: ClusterSpec, batch: float, context_tokens: float) -> float:
    """Duration of one engine's decode step."""
    if cluster.measured is not None:
        return cluster.measured.times.decode_ns(batch, context_tokens) / 1e9
    hbm = cluster.usable_hbm_bytes_per_s
    layers = cluster.model.layers
    read_bytes = cluster.model.decode_read_bytes(context_tokens, cluster.kv_dtype)
    fixed_s = cluster.decode_weight_bytes / hbm + layers * FIXED_S_PER_LAYER
    compute_s = cluster.model.decode_flops(context_tokens) / cluster.prefill_flop_per_s
    return fixed_s + batch * (compute_s + read_bytes / hbm + layers * REQUEST_S_PER_LAYER)


def decode_rate(cluster: ClusterSpec, load: TurnLoad, tpot_s: float) -> DecodeRate:
    """Returns the largest batch of mean turns within `tpot_s` and device memory. Throughput grows with the batch."""
    context_tokens = load.prompt_tokens + load.generate_tokens
    by_memory = max(0.0, cluster.decode_kv_bytes) / (context_tokens * cluster.kv_bytes_per_token)
    fixed_s = step_s(cluster, 0, context_tokens)
    by_tpot = max(0.0, tpot_s - fixed_s) / (step_s(cluster, 1, context_tokens) - fixed_s)
    batch = int(min(by_memory, by_tpot))
    duration_s = step_s(cluster, batch, context_tokens)
    return DecodeRate(
        batch=batch,
        limit="memory" if by_memory <= by_tpot else "TPOT",
        tpot_s=duration_s,
        tokens_per_s=batch / duration_s,
    )
