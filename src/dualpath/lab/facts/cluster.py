"""A cluster: P prefill and D decode nodes of g engines each, their links, and the usable share of their rates.

One engine manages one GPU, which has a compute NIC (CNIC) of its own; a node has one storage NIC (SNIC) and DRAM that
all its engines share (paper §2). A `ClusterSpec` is read from TOML: a preset (`load_cluster("ds660b-2p4d")`) or a file.
"""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated

import msgspec

from dualpath.lab.facts.hardware import GPUS, NIC_400G_BYTES_PER_S, STORAGE_CLIENT_BYTES_PER_S, GpuSpec
from dualpath.lab.facts.model_spec import ModelSpec
from dualpath.lab.facts.models import ModelConfigError, find_model
from dualpath.lab.facts.step_times import MeasuredEngine
from dualpath.spec.units import parse_bytes, parse_rate

Share = Annotated[float, msgspec.Meta(gt=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=1)]


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
    prefill_nodes: int
    """P."""
    decode_nodes: int
    """D."""
    engines_per_node: int = 8
    """g."""
    gpu: GpuSpec
    cnic_bytes_per_s: float
    """B, per engine."""
    snic_bytes_per_s: float
    """s·B, per node."""
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
    def prefill_engines(self) -> int:
        return self.prefill_nodes * self.engines_per_node

    @property
    def decode_engines(self) -> int:
        return self.decode_nodes * self.engines_per_node

    @property
    def snic_ratio(self) -> float:
        """s: a node's SNIC over one CNIC."""
        return self.snic_bytes_per_s / self.cnic_bytes_per_s

    @property
    def usable_snic_bytes_per_s(self) -> float:
        return self.snic_bytes_per_s * self.efficiency.snic

    @property
    def usable_cnic_bytes_per_s(self) -> float:
        return self.cnic_bytes_per_s * self.efficiency.cnic

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
    def kv_bytes_per_token(self) -> int:
        """A token's KV in storage and in buffers, sparse attention's keys included."""
        return self.model.kv_bytes_per_token(self.kv_dtype)

    @property
    def prefill_weight_bytes(self) -> float:
        """Weights on one PE."""
        return self._weight_bytes(self.prefill_nodes, self.prefill_group_nodes)

    @property
    def decode_weight_bytes(self) -> float:
        """Weights on one DE."""
        return self._weight_bytes(self.decode_nodes, self.decode_group_nodes)

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
        """Returns the same nodes in another split."""
        name = f"{self.name} as {prefill_nodes}P{decode_nodes}D"
        return msgspec.structs.replace(self, name=name, prefill_nodes=prefill_nodes, decode_nodes=decode_nodes)

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

    def _weight_bytes(self, nodes: int, group_nodes: int) -> float:
        smallest_group = nodes // max(1, nodes // group_nodes) * self.engines_per_node
        return self.model.weight_bytes(smallest_group if self.expert_parallel else 1, self.weight_bytes_per_parameter)


def node_groups(nodes: int, group_nodes: int) -> list[int]:
    """Returns the group number of each node: as many groups of at least `group_nodes` as possible, sizes even to within
    one; one group if there are fewer nodes than that."""
    groups = max(1, nodes // group_nodes)
    return [node * groups // nodes for node in range(nodes)]


# ── Reading TOML. Rates and sizes are text with units, so a file says what it means. ─────────────────────────────────


class _NodeTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    gpu: str
    cnic: str
    snic: str
    dram: str
    dram_buffer: str
    engines: Count = 8


class _ClusterTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    model: str
    prefill_nodes: Count
    decode_nodes: Count
    node: _NodeTable
    expert_parallel: bool
    prefill_group_nodes: Count = 1
    decode_group_nodes: Count = 1
    kv_dtype: str | None = None
    weight_bytes_per_parameter: Annotated[float, msgspec.Meta(gt=0)] | None = None
    efficiency: Efficiency = Efficiency()
    description: str = ""


def preset_names() -> list[str]:
    """Names of the presets that come with the package, sorted."""
    return sorted(entry.name.removesuffix(".toml") for entry in _presets().iterdir() if entry.name.endswith(".toml"))


def load_cluster(name: str | Path) -> ClusterSpec:
    """Loads the preset called `name`, or the TOML file at path `name`. Raises ClusterError."""
    if str(name) in preset_names():
        text = (_presets() / f"{name}.toml").read_text(encoding="utf-8")
        return parse_cluster(text, str(name), f"{name}.toml", None)
    path = Path(name)
    if path.suffix != ".toml":
        raise ClusterError(f"no cluster {str(name)!r}: give one of {', '.join(preset_names())}, or a .toml file")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterError(f"{path}: can't be read: {error}") from error
    return parse_cluster(text, path.stem, str(path), path.parent)


def parse_cluster(text: str, name: str, where: str, beside: Path | None) -> ClusterSpec:
    """Reads TOML `text`; `where` names it in errors, `beside` is the base of a model's relative path."""
    try:
        table = msgspec.convert(tomllib.loads(text), _ClusterTable)
    except tomllib.TOMLDecodeError as error:
        raise ClusterError(f"{where}: is not TOML: {error}") from error
    except msgspec.ValidationError as error:
        raise ClusterError(f"{where}: {_with_key(str(error))}") from error
    try:
        model = find_model(table.model, beside)
    except ModelConfigError as error:
        raise ClusterError(f"{where}: model: {error}") from error
    return _cluster(table, model, name, where)


def _cluster(table: _ClusterTable, model: ModelSpec, name: str, where: str) -> ClusterSpec:
    node = table.node
    if node.gpu not in GPUS:
        raise ClusterError(f"{where}: node.gpu: no GPU {node.gpu!r}; known are {', '.join(GPUS)}")
    kv_dtype = table.kv_dtype or model.kv_dtype
    try:
        model.kv_bytes_per_token(kv_dtype)
    except ValueError as error:
        raise ClusterError(f"{where}: kv_dtype: {error}") from error
    return ClusterSpec(
        name=name,
        model=model,
        prefill_nodes=table.prefill_nodes,
        decode_nodes=table.decode_nodes,
        engines_per_node=node.engines,
        gpu=GPUS[node.gpu],
        cnic_bytes_per_s=_rate(node.cnic, f"{where}: node.cnic"),
        snic_bytes_per_s=_rate(node.snic, f"{where}: node.snic"),
        dram_bytes_per_s=_rate(node.dram, f"{where}: node.dram"),
        dram_buffer_bytes=_size(node.dram_buffer, f"{where}: node.dram_buffer"),
        expert_parallel=table.expert_parallel,
        prefill_group_nodes=table.prefill_group_nodes,
        decode_group_nodes=table.decode_group_nodes,
        kv_dtype=kv_dtype,
        weight_bytes_per_parameter=table.weight_bytes_per_parameter or model.weight_bytes_per_parameter,
        efficiency=table.efficiency,
        description=table.description,
    )


def _rate(text: str, where: str) -> float:
    try:
        rate = parse_rate(text)
    except ValueError as error:
        raise ClusterError(f"{where}: {error}") from error
    if rate is None:
        raise ClusterError(f"{where}: a cluster's link needs a rate, such as 400Gb/s")
    return float(rate)


def _size(text: str, where: str) -> float:
    try:
        n_bytes = parse_bytes(text)
    except ValueError as error:
        raise ClusterError(f"{where}: {error}") from error
    if n_bytes == 0:
        raise ClusterError(f"{where}: must be above zero")
    return float(n_bytes)


def _with_key(message: str) -> str:
    """``"Expected `int` - at `$.node.engines`"`` → ``"node.engines: Expected `int`"``."""
    problem, at, path = message.partition(" - at `$.")
    return f"{path.rstrip('`')}: {problem}" if at else message


def _presets() -> resources.abc.Traversable:
    return resources.files("dualpath.lab.facts") / "presets"
