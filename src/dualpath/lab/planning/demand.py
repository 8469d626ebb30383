"""What the mean turn asks of every resource of a cluster, given how the reads are split.

Let H, M and G be the bytes of hit, miss and generated KV, and f the share of H that prefill nodes read. A turn moves
(§4.1, §4.2; copies between DRAM and a GPU pass its CNIC both ways)::

    PE SNIC read    f·H                          storage → PE buffer
    DE SNIC read    (1−f)·H                      storage → DE buffer
    DE SNIC write   M + G                        new blocks → storage
    PE CNIC read    2f·H + M                     PE buffer → GPU; hit and miss KV of the PE path → DE buffer
    PE CNIC write   H                            → GPU, from either buffer
    DE CNIC read    (1−f)·H + H + M + G          DE buffer → PE; prompt → GPU; generated KV → buffer
    DE CNIC write   f·H + M + H + M + G          PE → DE buffer; prompt → GPU; generated KV → buffer
    PE DRAM         2f·H                         in and out
    DE DRAM         2(1−f)·H + f·H + M + H + M + G + M + G

A prefill GPU computes M's tokens and a decode engine generates. Of layers with a window, H has what the window sees.
"""

from __future__ import annotations

import msgspec

from dualpath.lab.facts.cluster import ClusterSpec
from dualpath.lab.planning.decode import DecodeRate
from dualpath.lab.planning.turn_load import TurnLoad


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of resource, summed over the cluster."""

    resource: str
    unit: str
    """``bytes``, ``FLOP``, ``tokens``, or ``s`` of an engine's time."""
    per_turn: float
    capacity_per_s: float
    """Usable capacity."""
    turns_per_s: float | None
    """Rate that it allows if nothing else binds; None: no limit, because nothing is asked of it."""


def demands(cluster: ClusterSpec, load: TurnLoad, decode: DecodeRate, pe_share: float) -> tuple[Demand, ...]:
    """Returns every resource, in the order above, with `pe_share` (f) of the hit KV read by prefill nodes."""
    kv = cluster.kv_bytes_per_token
    hit = cluster.kv.hit_bytes(round(load.hit_tokens))
    miss, generated = load.miss_tokens * kv, load.generate_tokens * kv
    by_pe, by_de = pe_share * hit, (1 - pe_share) * hit
    to_decode_gpu = hit + miss + generated
    p_nodes, d_nodes = cluster.prefill_nodes, cluster.decode_nodes
    snic, dram = cluster.usable_snic_bytes_per_s, cluster.usable_dram_bytes_per_s
    pe_cnic = cluster.prefill_engines * cluster.usable_cnic_bytes_per_s
    de_cnic = cluster.decode_engines * cluster.usable_cnic_bytes_per_s
    return (
        _demand("PE SNIC read", by_pe, p_nodes * snic),
        _demand("DE SNIC read", by_de, d_nodes * snic),
        _demand("DE SNIC write", miss + generated, d_nodes * snic),
        _demand("PE CNIC read", 2 * by_pe + miss, pe_cnic),
        _demand("PE CNIC write", hit, pe_cnic),
        _demand("DE CNIC read", by_de + to_decode_gpu, de_cnic),
        _demand("DE CNIC write", by_pe + miss + to_decode_gpu, de_cnic),
        _demand("PE DRAM", 2 * by_pe, p_nodes * dram),
        _demand("DE DRAM", 2 * by_de + by_pe + miss + to_decode_gpu + miss + generated, d_nodes * dram),
        _prefill_demand(cluster, load),
        _demand("decode", load.generate_tokens, cluster.decode_engines * decode.tokens_per_s, "tokens"),
    )


def balanced_share(cluster: ClusterSpec, load: TurnLoad, decode: DecodeRate) -> float:
    """Returns the prefill side's share of reads at which the slowest resource is fastest; of equal ones the evenest.

    Every demand is linear in the share, so the slowest is convex in it, and a ternary search finds the best. Ties are
    broken towards equal use of all SNICs, P / (P + D).
    """
    even = cluster.prefill_nodes / (cluster.prefill_nodes + cluster.decode_nodes)

    def slowest(share: float) -> float:
        return max(_seconds(demand) for demand in demands(cluster, load, decode, share))

    low, high = 0.0, 1.0
    for _ in range(60):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, right) if slowest(left) <= slowest(right) else (left, high)
    best = (low + high) / 2
    return even if slowest(even) <= slowest(best) * (1 + 1e-9) else best


def prefill_flops(cluster: ClusterSpec, load: TurnLoad) -> float:
    """FLOPs of one mean turn, all layers."""
    per_token, per_pair = cluster.model.attention_line()
    return load.miss_tokens * (cluster.model.dense_flops_per_token + per_token) + load.miss_pairs * per_pair


def prefill_s(cluster: ClusterSpec, load: TurnLoad, alone: bool = False) -> float:
    """Seconds of one engine per mean turn. A batch's fixed cost is shared, unless the turn is alone."""
    if cluster.measured is None:
        return prefill_flops(cluster, load) / cluster.prefill_flop_per_s
    times = cluster.measured.times
    fixed_ns = times.prefill_fixed_ns if alone else 0.0
    return (fixed_ns + times.chunk_ns(load.miss_tokens, load.miss_pairs)) / 1e9


def _prefill_demand(cluster: ClusterSpec, load: TurnLoad) -> Demand:
    engines = cluster.prefill_engines if cluster.prefill_kv_bytes > 0 else 0
    if cluster.measured is None:
        return _demand("prefill compute", prefill_flops(cluster, load), engines * cluster.prefill_flop_per_s, "FLOP")
    return _demand("prefill compute", prefill_s(cluster, load), engines, "s")


def _demand(resource: str, per_turn: float, capacity_per_s: float, unit: str = "bytes") -> Demand:
    return Demand(
        resource=resource,
        unit=unit,
        per_turn=per_turn,
        capacity_per_s=capacity_per_s,
        turns_per_s=capacity_per_s / per_turn if per_turn > 0 else None,
    )


def _seconds(demand: Demand) -> float:
    """Seconds of the resource's time per turn."""
    if demand.per_turn == 0:
        return 0.0
    return demand.per_turn / demand.capacity_per_s if demand.capacity_per_s else float("inf")
