"""What a cluster can do for a workload, in closed form: binding resource, best split of nodes, upper bounds.

Theory of operation. The mean turn asks something of every resource (`demand`). Each resource alone would allow
capacity / demand turns per second; the least of them binds. Basic reads with prefill nodes only; dual-path splits the
reads so that the slowest resource is as fast as possible. Turns per second over turns per agent is agents per second
(APS).

These rates are **upper bounds**: loading overlaps computing fully, nothing queues, load is even, no agent idles. Real
systems reach less, basic in particular. Use the plan to decide what to simulate.
"""

from __future__ import annotations

import msgspec

from dualpath.lab.facts.bottleneck import BottleneckFree, bottleneck_free
from dualpath.lab.facts.cluster import ClusterSpec
from dualpath.lab.planning.decode import DecodeRate, decode_rate, step_s
from dualpath.lab.planning.demand import Demand, balanced_share, demands, prefill_flops, prefill_s
from dualpath.lab.planning.turn_load import TurnLoad
from dualpath.results.online import Slo

COMPUTE_FACTORS = (0.5, 2.0)
"""Factors on the effective compute, for `Sensitivity`."""


class PlanError(ValueError):
    """The question has no answer: the message says what doesn't fit."""


class SystemPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The answer for one way of reading."""

    system: str
    """``basic`` or ``dualpath``."""
    pe_share: float
    """Share of hit KV that prefill nodes read."""
    demands: tuple[Demand, ...]
    binding: str
    """The resource that allows the fewest turns; equal ones are joined by `` + ``."""
    turns_per_s: float
    agents_per_s: float
    """Upper bound."""


class Split(msgspec.Struct, frozen=True, kw_only=True):
    """The same nodes, divided differently."""

    prefill_nodes: int
    decode_nodes: int
    is_bottleneck_free: bool
    """Whether it is inside the bottleneck-free range (§4.2)."""
    basic_agents_per_s: float
    dualpath_agents_per_s: float
    dualpath_binding: str


class Sensitivity(msgspec.Struct, frozen=True, kw_only=True):
    """The answer if GPUs compute `compute_factor` times as fast as assumed, the least certain number here."""

    compute_factor: float
    dualpath_agents_per_s: float
    gain: float
    binding: str


class WorkingSet(msgspec.Struct, frozen=True, kw_only=True):
    """KV of the agents in flight, λ·T̄·total/2 (§10), against the DRAM buffers of all nodes."""

    agents_per_s: float
    """λ: the rate asked about, or the dual-path upper bound."""
    agent_s_unloaded: float
    """T̄ of an agent that has the cluster to itself."""
    agent_s_at_slo: float
    """T̄ if every turn takes all the time that the SLO allows."""
    bytes_unloaded: float
    bytes_at_slo: float
    dram_buffer_bytes: float
    """Buffers of all nodes."""


class CapacityPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Everything `dualpath plan` says. Rates are upper bounds."""

    cluster: str
    model: str
    gpu: str
    prefill_nodes: int
    decode_nodes: int
    engines_per_node: int
    load: TurnLoad
    slo: Slo
    kv_bytes_per_token: int
    hit_bytes: float
    """Bytes to load for the mean turn."""
    unread_bytes: float
    """Bytes of its hit KV that stay in storage, because the windows of their layers have passed them."""
    prefill_flops: float
    """FLOPs to compute for the mean turn."""
    gb_per_pflop: float
    """The cache-compute ratio of this workload."""
    unloaded_ttft_s: float
    """TTFT of the mean turn on an idle cluster: its reads by one SNIC, or its prefill on one GPU if that is longer."""
    decode: DecodeRate
    basic: SystemPlan
    dualpath: SystemPlan
    gain: float
    """Dual-path's rate over basic's."""
    snic_bytes_per_s: float
    """Usable storage NIC rate of one node."""
    bottleneck_free: BottleneckFree
    splits: tuple[Split, ...]
    """Every division of the nodes, by prefill nodes; rate 0 if the weights or one context don't fit."""
    best_split: Split
    """The split with the highest dual-path rate; of equal ones, the one with most decode nodes."""
    sensitivity: tuple[Sensitivity, ...]
    working_set: WorkingSet


def plan_capacity(
    cluster: ClusterSpec, load: TurnLoad, slo: Slo | None = None, agents_per_s: float | None = None
) -> CapacityPlan:
    """Plans `cluster` for `load`; `agents_per_s` is the rate of the working set (default: the dual-path upper bound).

    Raises PlanError if weights or one context don't fit a GPU, or one request alone misses the SLO.
    """
    slo = slo or Slo()
    _check(cluster, load, slo)
    decode = decode_rate(cluster, load, slo.tpot_s)
    basic, dualpath = _systems(cluster, load, slo)
    splits = _splits(cluster, load, slo)
    flops = prefill_flops(cluster, load)
    hit_bytes = cluster.kv.hit_bytes(round(load.hit_tokens))
    return CapacityPlan(
        cluster=cluster.name,
        model=cluster.model.name,
        gpu=cluster.gpu.name,
        prefill_nodes=cluster.prefill_nodes,
        decode_nodes=cluster.decode_nodes,
        engines_per_node=cluster.engines_per_node,
        load=load,
        slo=slo,
        kv_bytes_per_token=cluster.kv_bytes_per_token,
        hit_bytes=hit_bytes,
        unread_bytes=round(load.hit_tokens) * cluster.kv_bytes_per_token - hit_bytes,
        prefill_flops=flops,
        gb_per_pflop=(hit_bytes / 1e9) / (flops / 1e15),
        unloaded_ttft_s=_unloaded_ttft_s(cluster, load),
        decode=decode,
        basic=basic,
        dualpath=dualpath,
        gain=dualpath.turns_per_s / basic.turns_per_s,
        snic_bytes_per_s=cluster.usable_snic_bytes_per_s,
        bottleneck_free=_range(cluster),
        splits=splits,
        best_split=max(splits, key=lambda split: (split.dualpath_agents_per_s, split.decode_nodes)),
        sensitivity=tuple(_sensitivity(cluster, load, slo, factor) for factor in COMPUTE_FACTORS),
        working_set=_working_set(cluster, load, slo, agents_per_s or dualpath.agents_per_s),
    )


def _check(cluster: ClusterSpec, load: TurnLoad, slo: Slo) -> None:
    for role, kv_bytes in (("prefill", cluster.prefill_kv_bytes), ("decode", cluster.decode_kv_bytes)):
        if kv_bytes <= 0:
            raise PlanError(
                f"{cluster.name}: the weights of {cluster.model.name} don't fit a {role} engine's {cluster.gpu.name} "
                f"({-kv_bytes / 1e9:.0f} GB too many); use more nodes of expert parallelism or smaller weights"
            )
    longest = load.max_context_tokens * cluster.kv_bytes_per_token
    if longest > cluster.decode_kv_bytes:
        raise PlanError(
            f"{cluster.name}: the longest context ({load.max_context_tokens:,} tokens, {longest / 1e9:.1f} GB of KV) "
            f"does not fit the {cluster.decode_kv_bytes / 1e9:.1f} GB that a decode engine has for KV"
        )
    if decode_rate(cluster, load, slo.tpot_s).batch == 0:
        alone_s = step_s(cluster, 1, load.prompt_tokens)
        raise PlanError(
            f"TPOT of {slo.tpot_s * 1e3:g} ms can't be held: one request alone takes {alone_s * 1e3:.0f} ms"
        )
    ttft_s = _unloaded_ttft_s(cluster, load)
    if ttft_s > slo.ttft_s:
        raise PlanError(f"TTFT of {slo.ttft_s:g} s can't be held: the mean turn alone takes {ttft_s:.1f} s")


def _systems(cluster: ClusterSpec, load: TurnLoad, slo: Slo) -> tuple[SystemPlan, SystemPlan]:
    decode = decode_rate(cluster, load, slo.tpot_s)
    share = balanced_share(cluster, load, decode)
    return (
        _system("basic", cluster, load, decode, 1.0),
        _system("dualpath", cluster, load, decode, share),
    )


def _system(system: str, cluster: ClusterSpec, load: TurnLoad, decode: DecodeRate, pe_share: float) -> SystemPlan:
    asked = demands(cluster, load, decode, pe_share)
    limited = [(demand.turns_per_s, demand.resource) for demand in asked if demand.turns_per_s is not None]
    turns_per_s = min(rate for rate, _ in limited)
    binding = " + ".join(resource for rate, resource in limited if rate <= turns_per_s * (1 + 1e-6))
    return SystemPlan(
        system=system,
        pe_share=pe_share,
        demands=asked,
        binding=binding,
        turns_per_s=turns_per_s,
        agents_per_s=turns_per_s / load.turns_per_agent,
    )


def _splits(cluster: ClusterSpec, load: TurnLoad, slo: Slo) -> tuple[Split, ...]:
    nodes = cluster.prefill_nodes + cluster.decode_nodes
    return tuple(_split(cluster.with_nodes(prefill, nodes - prefill), load, slo) for prefill in range(1, nodes))


def _split(cluster: ClusterSpec, load: TurnLoad, slo: Slo) -> Split:
    basic, dualpath = _systems(cluster, load, slo)
    return Split(
        prefill_nodes=cluster.prefill_nodes,
        decode_nodes=cluster.decode_nodes,
        is_bottleneck_free=_range(cluster).is_free,
        basic_agents_per_s=basic.agents_per_s,
        dualpath_agents_per_s=dualpath.agents_per_s,
        dualpath_binding=dualpath.binding,
    )


def _sensitivity(cluster: ClusterSpec, load: TurnLoad, slo: Slo, factor: float) -> Sensitivity:
    basic, dualpath = _systems(cluster.with_compute(factor), load, slo)
    return Sensitivity(
        compute_factor=factor,
        dualpath_agents_per_s=dualpath.agents_per_s,
        gain=dualpath.turns_per_s / basic.turns_per_s,
        binding=dualpath.binding,
    )


def _range(cluster: ClusterSpec) -> BottleneckFree:
    return bottleneck_free(
        cluster.prefill_nodes,
        cluster.decode_nodes,
        cluster.engines_per_node,
        cluster.usable_snic_bytes_per_s / cluster.usable_cnic_bytes_per_s,
        cluster.usable_cnic_bytes_per_s,
        cluster.usable_dram_bytes_per_s,
    )


def _unloaded_ttft_s(cluster: ClusterSpec, load: TurnLoad) -> float:
    read_s = cluster.kv.hit_bytes(round(load.hit_tokens)) / cluster.usable_snic_bytes_per_s
    request_s = cluster.measured.request_ns / 1e9 if cluster.measured is not None else 0.0
    return request_s + max(read_s, prefill_s(cluster, load, alone=True))


def _working_set(cluster: ClusterSpec, load: TurnLoad, slo: Slo, agents_per_s: float) -> WorkingSet:
    alone_tpot_s = step_s(cluster, 1, load.prompt_tokens)

    def agent_s(ttft_s: float, tpot_s: float) -> float:
        return load.turns_per_agent * (ttft_s + load.generate_tokens * tpot_s + load.gap_s)

    unloaded_s = agent_s(_unloaded_ttft_s(cluster, load), alone_tpot_s)
    at_slo_s = agent_s(slo.ttft_s, slo.tpot_s)
    bytes_per_agent_s = agents_per_s * load.total_tokens * cluster.kv_bytes_per_token / 2
    return WorkingSet(
        agents_per_s=agents_per_s,
        agent_s_unloaded=unloaded_s,
        agent_s_at_slo=at_slo_s,
        bytes_unloaded=bytes_per_agent_s * unloaded_s,
        bytes_at_slo=bytes_per_agent_s * at_slo_s,
        dram_buffer_bytes=cluster.dram_buffer_bytes * (cluster.prefill_nodes + cluster.decode_nodes),
    )
