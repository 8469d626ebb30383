"""A cluster: its topology, as `dualpath serve` has it, the nodes' links, and the usable share of their rates.

One engine manages one GPU, which has a compute NIC (CNIC) of its own; a node has one storage NIC (SNIC) and DRAM that
all its engines share (paper §2).
"""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec

from dualpath.lab.facts.hardware import NIC_400G_BYTES_PER_S, STORAGE_CLIENT_BYTES_PER_S, GpuSpec
from dualpath.lab.facts.model_spec import ModelSpec
from dualpath.lab.facts.models import ModelConfigError, find_model
from dualpath.lab.facts.step_times import MeasuredEngine
from dualpath.spec.kv_bytes import KVBytes
from dualpath.spec.topology import Topology

Share = Annotated[float, msgspec.Meta(gt=0, le=1)]
Number = TypeVar("Number", int, float)


class ClusterError(ValueError):
    """A cluster that can't be read. The message names the file and the key."""


class Efficiency(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Usable shares of nominal rates: priors from published measurements, which a profile replaces."""

    compute: Share = 0.385
    """Share of the GPU's bf16 rate in prefill: 0.38e15 FLOP/s on an H800, the low end of the 0.37 to 0.66e15 that
    published throughput of DeepSeek-V3 on such GPUs implies."""
    snic: Share = STORAGE_CLIENT_BYTES_PER_S / NIC_400G_BYTES_PER_S
    """Share of the storage NIC; `hardware` has the source of 0.86."""
    cnic: Share = 1.0
    dram: Share = 1.0
    """Share of DRAM; the paper's 500 GB/s is a usable rate already."""
    hbm: Share = 0.9
    """Share of HBM: 4.3 of 4.8e12 B/s measured on one H200."""


class ClusterSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Nominal rates in bytes per second, one direction; DRAM's for reads and writes together. See `usable_…`."""

    name: str
    model: ModelSpec
    topology: Topology
    gpu: GpuSpec
    cnic_bytes_per_s: float | tuple[float, ...]
    """B, per engine; or of each group of nodes."""
    snic_bytes_per_s: float | tuple[float, ...]
    """s·B, per node; or of each group."""
    dram_bytes_per_s: float
    """M, per node."""
    dram_buffer_bytes: float
    """PE buffers or DE buffers of a node, all its engines together."""
    expert_parallel: bool
    """Engines of a group share the routed experts and run in step (EP+DP); False: independent replicas (DP)."""
    prefill_group_nodes: int = 1
    """Nodes per group of PEs, see `node_groups`."""
    decode_group_nodes: int = 1
    kv_dtype: str
    weight_bytes_per_parameter: float
    efficiency: Efficiency = Efficiency()
    description: str = ""
    measured: MeasuredEngine | None = None
    """Steps from a profile, see `profile.applied`; None: the roofline of `gpu`."""

    @property
    def prefill_nodes(self) -> int:
        """P."""
        return self.topology.prefill_nodes

    @property
    def decode_nodes(self) -> int:
        """D."""
        return self.topology.decode_nodes

    @property
    def engines_per_node(self) -> int:
        """g. Raises ClusterError when nodes differ, as all properties of *the* node do."""
        return self._only("engines", self.topology.sizes)

    @property
    def prefill_engines(self) -> int:
        return self.topology.prefill_engines

    @property
    def decode_engines(self) -> int:
        return self.topology.decode_engines

    @property
    def snic_ratio(self) -> float:
        """s: a node's SNIC over one CNIC."""
        return self.usable_snic_bytes_per_s / self.efficiency.snic / self.nominal_cnic_bytes_per_s

    @property
    def nominal_cnic_bytes_per_s(self) -> float:
        return self._only("cnic", self.topology.by_node(self.cnic_bytes_per_s))

    @property
    def usable_snic_bytes_per_s(self) -> float:
        return self._only("snic", self.topology.by_node(self.snic_bytes_per_s)) * self.efficiency.snic

    @property
    def usable_cnic_bytes_per_s(self) -> float:
        return self.nominal_cnic_bytes_per_s * self.efficiency.cnic

    def _only(self, what: str, of_nodes: list[Number]) -> Number:
        if len(set(of_nodes)) > 1:
            raise ClusterError(
                f"cluster {self.name!r} has nodes that differ in {what}; a plan is of equal nodes: simulate this one"
            )
        return of_nodes[0]

    @property
    def usable_dram_bytes_per_s(self) -> float:
        return self.dram_bytes_per_s * self.efficiency.dram

    @property
    def prefill_flop_per_s(self) -> float:
        """Effective rate of one GPU in prefill."""
        return self.gpu.bf16_flop_per_s * self.efficiency.compute

    @property
    def usable_hbm_bytes_per_s(self) -> float:
        return self.gpu.hbm_bytes_per_s * self.efficiency.hbm

    @property
    def kv(self) -> KVBytes:
        """A token's KV in storage, in buffers and on devices, sparse attention's keys included."""
        return self.model.kv(self.kv_dtype)

    @property
    def kv_bytes_per_token(self) -> int:
        return self.kv.bytes_per_token

    @property
    def prefill_weight_bytes(self) -> float:
        """Weights on one PE."""
        return self._weight_bytes(self.topology.sizes[: self.prefill_nodes], self.prefill_group_nodes)

    @property
    def decode_weight_bytes(self) -> float:
        """Weights on one DE."""
        return self._weight_bytes(self.topology.sizes[self.prefill_nodes :], self.decode_group_nodes)

    @property
    def prefill_kv_bytes(self) -> float:
        """Device memory of one PE for KV: 0.9 of it less the weights. Negative: the weights don't fit.

        The whole-context KV of a batch must fit into it unless prefill is layerwise.
        """
        return 0.9 * self.gpu.hbm_bytes - self.prefill_weight_bytes

    @property
    def decode_kv_bytes(self) -> float:
        """Device memory of one DE for KV, which its batch must fit into."""
        return 0.9 * self.gpu.hbm_bytes - self.decode_weight_bytes

    def with_nodes(self, prefill_nodes: int, decode_nodes: int) -> ClusterSpec:
        """Returns the same nodes in another split. Raises ClusterError when nodes differ."""
        name = f"{self.name} as {prefill_nodes}P{decode_nodes}D"
        topology = Topology(prefill_nodes, decode_nodes, self.engines_per_node)
        return msgspec.structs.replace(self, name=name, topology=topology)

    def with_compute(self, factor: float) -> ClusterSpec:
        """Returns the cluster with engines that compute `factor` times as fast. A profile's decode steps stay."""
        gpu = msgspec.structs.replace(self.gpu, bf16_flop_per_s=self.gpu.bf16_flop_per_s * factor)
        measured = None if self.measured is None else self.measured.with_prefill(factor)
        return msgspec.structs.replace(self, gpu=gpu, measured=measured)

    def with_model(self, name: str) -> ClusterSpec:
        """Returns the nodes with another model (`find_model`), its usual KV dtype and weights. Raises ClusterError."""
        try:
            model = find_model(name)
        except ModelConfigError as error:
            raise ClusterError(str(error)) from error
        weight_bytes = model.weight_bytes_per_parameter
        return msgspec.structs.replace(
            self, model=model, kv_dtype=model.kv_dtype, weight_bytes_per_parameter=weight_bytes, measured=None
        )

    def _weight_bytes(self, sizes: list[int], group_nodes: int) -> float:
        engines: dict[int, int] = {}
        for group, size in zip(node_groups(len(sizes), group_nodes), sizes, strict=True):
            engines[group] = engines.get(group, 0) + size
        smallest = min(engines.values()) if self.expert_parallel else 1
        return self.model.weight_bytes(smallest, self.weight_bytes_per_parameter)


def node_groups(nodes: int, group_nodes: int) -> list[int]:
    """Returns the group number of each node: as many groups of at least `group_nodes` as possible, sizes even to within
    one; one group if there are fewer nodes than that."""
    groups = max(1, nodes // group_nodes)
    return [node * groups // nodes for node in range(nodes)]
