"""Reads clusters from TOML: a preset (`load_cluster("ds660b-2p4d")`) or a file.

Rates and sizes are text with units, so a file says what it means.
"""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated

import msgspec

from dualpath.lab.facts.cluster import ClusterError, ClusterSpec, Efficiency
from dualpath.lab.facts.hardware import GPUS
from dualpath.lab.facts.model_spec import ModelSpec
from dualpath.lab.facts.models import ModelConfigError, find_model
from dualpath.spec.topology import Topology
from dualpath.spec.units import parse_bytes, parse_rate

Count = Annotated[int, msgspec.Meta(ge=1)]


class _NodeTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    gpu: str
    cnic: str
    snic: str
    dram: str
    dram_buffer: str


class _ClusterTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    model: str
    topology: str
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
        model.kv(kv_dtype)
    except ValueError as error:
        raise ClusterError(f"{where}: kv_dtype: {error}") from error
    try:
        topology = Topology.parse(table.topology)
    except ValueError as error:
        raise ClusterError(f"{where}: topology: {error}") from error
    return ClusterSpec(
        name=name,
        model=model,
        topology=topology,
        gpu=GPUS[node.gpu],
        cnic_bytes_per_s=_rates(node.cnic, topology, f"{where}: node.cnic"),
        snic_bytes_per_s=_rates(node.snic, topology, f"{where}: node.snic"),
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


def _rates(text: str, topology: Topology, where: str) -> float | tuple[float, ...]:
    rates = tuple(_rate(part, where) for part in text.split("+"))
    try:
        topology.by_node(rates if len(rates) > 1 else rates[0])
    except ValueError as error:
        raise ClusterError(f"{where}: {error}") from error
    return rates if len(rates) > 1 else rates[0]


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
