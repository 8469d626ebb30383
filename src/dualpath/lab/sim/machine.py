"""The simulated machine: a cluster's engines as core knows them, calibrated rates, and core's constants.

Engines are numbered from 0, prefill nodes first. A node's engines share its SNIC and divide its DRAM buffer equally.
Groups are the cluster's groups of nodes.
"""

import msgspec

from dualpath.core.policy import QUOTA_NS, Constants, Limits
from dualpath.core.vocabulary import BLOCK_TOKENS, EngineFacts, Role
from dualpath.lab.facts.cluster import ClusterSpec, node_groups
from dualpath.lab.sim.costs import Calibration, StepCosts, step_costs

_NEVER_NS = 10**18


class MachineError(ValueError):
    """A cluster can't be simulated. The message says why."""


class BatchLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of a PE's batches; the defaults are core's (`PrefillQueue`)."""

    quota_ns: float = QUOTA_NS
    requests: int = 64
    kv_tokens: int | None = None
    """Hit and new tokens together, in every system; None: only memory limits the batches of whole-prompt systems."""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What a simulation runs on."""

    name: str
    engines: tuple[EngineFacts, ...]
    costs: StepCosts
    synchronised: bool
    """Engines of a group step together."""
    snic_bytes_per_s: tuple[float, ...]
    """By node."""
    cnic_bytes_per_s: tuple[float, ...]
    """By engine."""
    read_latency_ns: int
    prefill_kv_tokens: int
    """Whole-context KV that a PE's device memory holds, in tokens."""
    batches: BatchLimits = BatchLimits()
    full_speed_engines: float | None = None
    """Engines that compute at full speed at once, if all share the cores of one host; None: every engine has its own
    hardware. Exact simulations ignore it."""

    @property
    def nodes(self) -> int:
        return 1 + max(facts.node for facts in self.engines)

    def of_role(self, role: Role) -> list[EngineFacts]:
        return [facts for facts in self.engines if facts.role is role]


def build_machine(cluster: ClusterSpec, calibration: Calibration) -> Machine:
    """Builds the machine. Raises MachineError if the weights leave no room for KV."""
    costs = step_costs(cluster, calibration)
    block_bytes = costs.kv_bytes_per_token * BLOCK_TOKENS
    node_blocks = cluster.dram_buffer_bytes / block_bytes
    buffer_blocks = int(node_blocks / max(cluster.topology.sizes))
    hbm_blocks = int(cluster.decode_kv_bytes / block_bytes)
    prefill_kv_tokens = int(cluster.prefill_kv_bytes / costs.kv_bytes_per_token)
    if min(buffer_blocks, hbm_blocks, prefill_kv_tokens) < 1:
        raise MachineError(
            f"cluster {cluster.name!r}: an engine's buffer holds {buffer_blocks} blocks, a DE's device memory "
            f"{hbm_blocks} and a PE's {prefill_kv_tokens} tokens after the weights; all must hold something, so give "
            "more memory, larger groups or smaller weights"
        )
    return Machine(
        name=cluster.name,
        engines=tuple(_engines(cluster, node_blocks, hbm_blocks)),
        costs=costs,
        synchronised=cluster.expert_parallel,
        snic_bytes_per_s=tuple(
            rate * calibration.snic_efficiency for rate in cluster.topology.by_node(cluster.snic_bytes_per_s)
        ),
        cnic_bytes_per_s=tuple(
            rate * cluster.efficiency.cnic * (1 - calibration.collective_share)
            for rate, engines in zip(
                cluster.topology.by_node(cluster.cnic_bytes_per_s), cluster.topology.sizes, strict=True
            )
            for _ in range(engines)
        ),
        read_latency_ns=calibration.read_latency_ns,
        prefill_kv_tokens=prefill_kv_tokens,
    )


def _engines(cluster: ClusterSpec, node_blocks: float, hbm_blocks: int) -> list[EngineFacts]:
    engines: list[EngineFacts] = []
    sizes = cluster.topology.sizes
    first_node = first_group = 0
    for role, nodes, group_nodes in (
        (Role.PREFILL, cluster.prefill_nodes, cluster.prefill_group_nodes),
        (Role.DECODE, cluster.decode_nodes, cluster.decode_group_nodes),
    ):
        groups = node_groups(nodes, group_nodes)
        for node, group in enumerate(groups):
            size = sizes[first_node + node]
            for _ in range(size):
                engines.append(
                    EngineFacts(
                        engine=len(engines),
                        role=role,
                        node=first_node + node,
                        group=first_group + group,
                        buffer_blocks=int(node_blocks / size),
                        hbm_blocks=hbm_blocks if role is Role.DECODE else 0,
                    )
                )
        first_node += nodes
        first_group += groups[-1] + 1
    return engines


def constants_for(machine: Machine, prompt_tokens: float, hit_tokens: float) -> Constants:
    """Returns alpha and beta (§6.1) for turns of a typical length.

    Both count prompt tokens, hit ones included, as `read_q` and `tok` do: beta is 5 s of such turns. Where prefill
    nodes' SNICs differ, alpha is of their mean.
    """
    snics = [machine.snic_bytes_per_s[node] for node in {facts.node for facts in machine.of_role(Role.PREFILL)}]
    costs = machine.costs
    new_tokens = max(1, round(prompt_tokens - hit_tokens))
    turn_ns = costs.attention.chunk_ns(round(hit_tokens), new_tokens) + new_tokens * costs.ffn_ns_per_token
    return Constants.from_rates(
        snic_tokens_per_s=sum(snics) / len(snics) / max(1, costs.kv.whole_bytes_per_token),
        prefill_tokens_per_s=prompt_tokens / turn_ns * 1e9,
    )


def limits_for(agents: int) -> Limits:
    """Returns limits with which no deadline fires and no queue refuses: a simulation shows what takes too long."""
    return Limits(
        max_waiting=max(4096, 2 * agents), queue_ns=_NEVER_NS, load_ns=_NEVER_NS, prefill_ns=_NEVER_NS,
        decode_ns=_NEVER_NS, release_ns=_NEVER_NS,
    )  # fmt: skip
