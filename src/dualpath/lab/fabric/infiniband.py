"""InfiniBand: virtual lanes, which OpenSM programs into every port: its options and QoS policy rendered, and checked.

Theory of operation. A packet's service level (SL) chooses a virtual lane (VL) at every port. A port serves the lanes
of its high table until these have sent `high limit` × 4 KiB; then the low table sends one packet. KV's lane is alone in
the low table, so on a link that model messages fill it has one packet of 4 KiB for every `high limit` of theirs: a
limit of 99 is the traffic manager's 99 : 1. On an idle link it has everything.

The paper's own file has a limit of 240, and the lanes of the high class in the low table too (A.1). By this arithmetic
(`kv_share`) that is 99.9 : 0.1, since KV has a quarter of one packet in 241.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from dualpath.core.traffic_classes import CLASSES, WEIGHTS
from dualpath.core.vocabulary import TrafficClass
from dualpath.lab.fabric.findings import CheckReport, Comparison, FabricError, Weights, kv_is_left, not_kept

HIGH, LOW = CLASSES[TrafficClass.HIGH], CLASSES[TrafficClass.LOW]
MAX_VLS = 4
HIGH_LANES = tuple(lane for lane in range(MAX_VLS) if lane != LOW.virtual_lane)
HIGH_WEIGHT, LOW_WEIGHT = 192, 64
"""In 64 bytes, the paper's (A.1): 12 KiB, and 4 KiB, which is one packet."""
DROP_LANE = 15
UNLIMITED = 255
"""As high limit: the low table waits until no lane of the high one has anything."""
POLICY_FILE = "/etc/opensm/qos-policy.conf"
PORT_KINDS = {"ca": "HCAs", "swe": "switches' ports", "sw0": "switches' own port 0", "rtr": "routers"}
UNSET = ("(null)", "-1", "")
"""As OpenSM writes what it was not told; 0 is a value."""
LANE_ROUTING = ("lash", "dfsssp", "nue", "torus-2QoS")
"""Routing engines that give paths service levels of their own, against deadlock."""
Table = Mapping[int, int]
"""Weights in 64 bytes by virtual lane; those of weight 0 are left out."""


class Port(NamedTuple):
    """A port that has a link."""

    name: str
    lid: int
    number: int

    @property
    def place(self) -> str:
        return f"{self.name} port {self.number}"


class PortTables(msgspec.Struct, frozen=True):
    """What a port does with service levels and lanes."""

    high_limit: int | None
    """In 4 KiB; None: it can't be read."""
    high: Table
    low: Table
    sl2vl: Mapping[str, tuple[int, ...]]
    """The lane of each of 16 service levels, by the port that packets come in at (switches)."""


def meant_tables(weights: Weights = WEIGHTS) -> PortTables:
    """Returns what every port should have."""
    limit = min(max(round(weights[0] / weights[1]), 1), UNLIMITED - 1)
    lanes = tuple(sl if sl < MAX_VLS else HIGH.virtual_lane for sl in range(16))
    return PortTables(limit, dict.fromkeys(HIGH_LANES, HIGH_WEIGHT), {LOW.virtual_lane: LOW_WEIGHT}, {"0": lanes})


def options(weights: Weights = WEIGHTS, policy_file: str = POLICY_FILE) -> dict[str, str]:
    """Returns OpenSM's options by name."""
    meant = meant_tables(weights)
    return {
        "qos": "TRUE",
        "qos_policy_file": policy_file,
        "qos_max_vls": str(MAX_VLS),
        "qos_high_limit": str(meant.high_limit),
        "qos_vlarb_high": ",".join(f"{lane}:{meant.high.get(lane, 0)}" for lane in range(MAX_VLS)),
        "qos_vlarb_low": ",".join(f"{lane}:{meant.low.get(lane, 0)}" for lane in range(MAX_VLS)),
        "qos_sl2vl": ",".join(map(str, meant.sl2vl["0"])),
    }


def render(
    weights: Weights = WEIGHTS, storage_guids: Sequence[str] = (), policy_file: str = POLICY_FILE
) -> dict[str, str]:
    """Returns files. `storage_guids` are ports to which all paths are KV's: those of storage nodes on this fabric.

    Raises FabricError for what is no GUID.
    """
    for guid in storage_guids:
        if re.fullmatch(r"0x[0-9a-fA-F]{1,16}", guid) is None or not 0 < int(guid, 16) < 2**64 - 1:
            raise FabricError(f"{guid!r} is not the GUID of a port; give one like 0x98039b0300a1b2c3 (ibstat shows it)")
    policy = [
        "# Service levels of paths that ask for none. UCX and NCCL choose theirs by engine.env.",
        "qos-ulps",
        f"    default : {HIGH.service_level}",
        *(f"    any, target-port-guid {guid} : {LOW.service_level}" for guid in storage_guids),
        "end-qos-ulps",
    ]
    opensm = [f"# {note}" for note in notes(weights)]
    opensm += [f"{name} {value}" for name, value in options(weights, policy_file).items()]
    environment = [
        "# for processes whose UCX carries KV alone; for NCCL, whose messages are of the high class",
        f"UCX_IB_SL={LOW.service_level}",
        f"NCCL_IB_SL={HIGH.service_level}",
    ]
    files = {"opensm-qos.conf": opensm, "qos-policy.conf": policy, "engine.env": environment}
    return {name: "\n".join(text) + "\n" for name, text in files.items()}


def notes(weights: Weights) -> tuple[str, ...]:
    """Returns what is to be said of weights that a high limit can't keep."""
    meant = meant_tables(weights)
    return not_kept(weights, kv_share(meant, meant.sl2vl["0"]))


def check(
    ports: Mapping[Port, PortTables | str | None],
    installed: str | None = None,
    weights: Weights = WEIGHTS,
    policy: str | FabricError | None = None,
    complaints: str = "",
) -> CheckReport:
    """Compares every port with what is meant, and OpenSM's own options (`installed`, a file's text) if given.

    None stands for the tables of a port without LID, which can't be asked, and a text for why another has none.
    `policy` is the text of OpenSM's QoS policy, or why it can't be read; `complaints` are of the tool that found ports.
    """
    comparison = Comparison()
    so = "a host or switch that does not answer is left out here: what it does with KV is not known"
    comparison.compare("the fabric", "discovery", "no complaint", complaints or "no complaint", so)
    if installed is not None:
        _compare_options(comparison, read_options(installed), weights)
    if policy is not None:
        _compare_policy(comparison, policy)
    read = {}
    for port, tables in ports.items():
        so = "the subnet manager has not set this port up: it is left out, and passes no data"
        comparison.compare(port.place, "LID", "assigned", "none" if tables is None else "assigned", so)
        if isinstance(tables, str):
            comparison.compare(port.place, "answer", "its tables", tables, "what it does with KV is not known")
        elif tables:
            read[port] = tables
            _compare_port(comparison, port.place, tables, weights)
    unread = sum(tables.high_limit is None for tables in read.values())
    simulated = f"the high limit of {unread} ports is not compared: a simulated fabric (ibsim) does not keep it"
    places = tuple(port.place for port in ports)
    said = (*notes(weights), *([simulated] if unread else []))
    return CheckReport("infiniband", places, comparison.compared, comparison.differences(), said)


def read_options(text: str) -> dict[str, str]:
    """Reads a file as OpenSM does: a name, white space, a value that may be quoted; the last line of a name holds."""
    found = {}
    for line in text.splitlines():
        name, *value = line.partition("#")[0].split(maxsplit=1) or [""]
        found[name] = "".join(value).strip().strip('"').strip()
    return found


def policy_file(installed: str) -> str:
    """Returns the path of the policy that OpenSM reads by its options."""
    named = read_options(installed).get("qos_policy_file", "")
    return POLICY_FILE if named in UNSET else named


def kv_share(tables: PortTables, lanes: tuple[int, ...]) -> float:
    """Returns KV's part of a link that model messages fill, by the arbitration's rules, with packets of 4 KiB.

    `lanes` are those of the 16 service levels.
    """
    kv, high = lanes[LOW.service_level], lanes[HIGH.service_level]
    limit = tables.high_limit or 0
    both = [table.get(kv, 0) + table.get(high, 0) for table in (tables.high, tables.low)]
    if not any(both):
        return 0.0
    first = 1.0 if limit == UNLIMITED else max(limit, 1) / (max(limit, 1) + 1)
    first = first if all(both) else float(both[0] > 0)
    turns = zip((first, 1 - first), (tables.high, tables.low), both, strict=True)
    return sum(turn * table.get(kv, 0) / total for turn, table, total in turns if total)


def _compare_port(comparison: Comparison, place: str, tables: PortTables, weights: Weights) -> None:
    meant = meant_tables(weights)
    is_read = tables.high_limit is not None
    tables = tables if is_read else msgspec.structs.replace(tables, high_limit=meant.high_limit)
    unless = "" if is_read else ", if the high limit is as meant"
    effects = {lanes: _effect(tables, lanes, weights, unless) for lanes in tables.sl2vl.values()}
    effect = "; ".join(dict.fromkeys(effects.values()))
    if is_read:
        comparison.compare(place, "high limit (× 4 KiB)", meant.high_limit, tables.high_limit, effect)
    comparison.compare(place, "high table, lane:weight", _shown(meant.high), _shown(tables.high), effect)
    comparison.compare(place, "low table, lane:weight", _shown(meant.low), _shown(tables.low), effect)
    for lanes, so in effects.items():
        for level, name in _NAMES.items():
            what = f"virtual lane of service level {level} ({name})"
            comparison.compare(place, what, meant.sl2vl["0"][level], lanes[level], so)
        others, found = (_listed([row[level] for level in _OTHERS]) for row in (meant.sl2vl["0"], lanes))
        what = f"virtual lanes of service levels {_listed(_OTHERS)}"
        comparison.compare(place, what, others, found, _others_effect(lanes))


def _compare_options(comparison: Comparison, found: Mapping[str, str], weights: Weights) -> None:
    place = "OpenSM's options"
    so = "OpenSM programs no port: lanes stay as the hardware has them (it takes nothing but TRUE as on)"
    comparison.compare(place, "qos", "TRUE", found.get("qos", "none"), so)
    for name, value in options(weights).items():
        if name in ("qos", "qos_policy_file", "qos_max_vls"):  # OpenSM 3.3.23 programs the same whatever the last says
            continue
        so = "every port gets this instead, at OpenSM's next sweep"
        comparison.compare(place, name, value, value if _same(found.get(name), value) else found.get(name, "none"), so)
        for kind, ports in PORT_KINDS.items():
            own = name.replace("qos_", f"qos_{kind}_")
            other = found.get(own, "")
            so = f"{ports} are left out: they get this instead"
            comparison.compare(place, own, "unset", "unset" if other in UNSET or _same(other, value) else other, so)
    engines = [one for one in re.split(r"[,\s]+", found.get("routing_engine", "")) if one in LANE_ROUTING]
    so = "it gives paths service levels of its own: KV and model messages may share lanes"
    comparison.compare(place, "routing engine that takes lanes", "none", _listed(engines) or "none", so)


def _same(found: str | None, meant: str) -> bool:
    """Whether OpenSM makes the same of two lists: it takes lanes in any order, and 0 for what is left out."""
    if found is None:
        return False
    lists = [[word.strip() for word in text.split(",")] for text in (found, meant)]
    if ":" in meant:
        one, other = ([word for word in words if not word.endswith(":0")] for words in lists)
        return sorted(one) == sorted(other)
    return [*lists[0], *["0"] * (len(lists[1]) - len(lists[0]))] == lists[1]


def _compare_policy(comparison: Comparison, policy: str | FabricError) -> None:
    place = "OpenSM's policy"
    so = "no path gets KV's level of itself: KV to storage nodes goes with model messages"
    comparison.compare(place, "file", "readable", str(policy) if isinstance(policy, FabricError) else "readable", so)
    lines = [] if isinstance(policy, FabricError) else [line.partition("#")[0] for line in policy.splitlines()]
    rules = [line for line in (" ".join(line.replace(":", " : ").split()) for line in lines) if line]
    levels = [line.removeprefix("default : ") for line in rules if line.startswith("default : ")]
    level = levels[-1] if levels else str(HIGH.service_level)
    name = next((f"that of {name}" for known, name in _NAMES.items() if str(known) == level), "this")
    so = f"every path that asks for no level gets {name}"
    comparison.compare(place, "default level", str(HIGH.service_level), level, so)
    others = [line for line in rules if re.fullmatch(_RENDERED_RULES, line) is None]
    more = f" and {len(others) - 4} more" if len(others) > 4 else ""
    so = "they may give paths of either class the other's service level"
    comparison.compare(place, "rules that render does not write", "none", "; ".join(others[:4]) + more or "none", so)


_RENDERED_RULES = rf"(?:end-)?qos-ulps|default : .*|any ?, target-port-guid (?:0x\w+[, -]*)+ : {LOW.service_level}"
_NAMES = {HIGH.service_level: "model messages", LOW.service_level: "KV"}
_OTHERS = tuple(level for level in range(16) if level not in _NAMES)


def _effect(tables: PortTables, lanes: tuple[int, ...], weights: Weights, unless: str) -> str:
    kv, high = lanes[LOW.service_level], lanes[HIGH.service_level]
    dropped = [name for name, lane in (("KV", kv), ("model messages", high)) if lane == DROP_LANE]
    if dropped:
        return f"the port drops {' and '.join(dropped)}: their service level has no lane"
    if kv == high:
        return f"KV and model messages share lane {kv}: messages wait behind KV"
    meant = meant_tables(weights)
    return kv_is_left(kv_share(tables, lanes), kv_share(meant, meant.sl2vl["0"])) + unless


def _others_effect(lanes: tuple[int, ...]) -> str:
    dropped = [level for level in _OTHERS if lanes[level] == DROP_LANE]
    with_kv = [level for level in _OTHERS if lanes[level] == lanes[LOW.service_level]]
    found = [f"the port drops what is sent on {_listed(dropped)}"] if dropped else []
    found += [f"what is sent on {_listed(with_kv)} queues with KV"] if with_kv else []
    return "; ".join(found) or "no effect on the two classes"


def _listed(numbers: Sequence[object]) -> str:
    return ", ".join(map(str, numbers))


def _shown(table: Table) -> str:
    return ",".join(f"{lane}:{weight}" for lane, weight in sorted(table.items())) or "empty"
