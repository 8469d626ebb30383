"""Plans a testbed's nodes, NICs, names and addresses. Pure: the same arguments make the same plan.

::

    host ── management ──┐                     namespaces            devices
    head ── management, storage               <prefix>-head         mgmt0 snic0           the coordinator
    storage ── management, storage            <prefix>-storage      mgmt0 snic0           the object server
    pe0 … ── management, storage, compute     <prefix>-pe0          mgmt0 snic0 cnic0     a prefill engine
    de0 … ── management, storage, compute     <prefix>-de0          mgmt0 snic0 cnic0     a decode engine
                         └──────────────────► <prefix>-switch       a bridge per network, a port per device: s.pe0, …
"""

import re

import msgspec

NETWORKS = ("management", "storage", "compute")
DEVICE = {"management": "mgmt0", "storage": "snic0", "compute": "cnic0"}
PREFIX = "dualpath"
MAX_ENGINES = 200
_NAME = re.compile(r"[a-z0-9]{1,8}")
_HOST, _HEAD, _STORAGE, _FIRST_ENGINE = 1, 2, 3, 10


class Rates(msgspec.Struct, frozen=True):
    """Bytes per second of one direction; None: no limit."""

    snic: int | None = None
    """Rate of each engine's storage NIC."""
    cnic: int | None = None
    """Rate of each engine's compute NIC."""
    storage_node: int | None = None
    """Rate of the storage node's NIC, which all engines share."""


class Device(msgspec.Struct, frozen=True):
    """A NIC of a node: its end of a veth pair. `port` is the other end, in the switch."""

    network: str
    name: str
    port: str
    address: str


class Node(msgspec.Struct, frozen=True):
    """A namespace with its NICs."""

    name: str
    namespace: str
    devices: tuple[Device, ...]

    def address(self, network: str) -> str:
        """Returns the node's address in a network. Raises KeyError if it has no NIC there."""
        return {device.network: device.address for device in self.devices}[network]

    @property
    def is_engine(self) -> bool:
        return self.name[:2] in ("pe", "de")


class Plan(msgspec.Struct, frozen=True):
    """A testbed's plan. `host_link` is its only device in the host's own namespace."""

    name: str
    subnet: str
    prefill_engines: int
    decode_engines: int
    nodes: tuple[Node, ...]

    @property
    def prefix(self) -> str:
        """Prefix of the names of all its namespaces."""
        return namespace_prefix(self.name)

    @property
    def switch(self) -> str:
        return f"{self.prefix}switch"

    @property
    def host_link(self) -> str:
        return host_link(self.name)

    @property
    def host_address(self) -> str:
        return _address(self.subnet, "management", _HOST)

    def node(self, name: str) -> Node:
        """Returns a node. Raises KeyError if the plan does not have it."""
        return {node.name: node for node in self.nodes}[name]


def make_plan(name: str, prefill_engines: int, decode_engines: int, subnet: str = "10.87") -> Plan:
    """Makes a plan. Raises ValueError for a bad name, subnet or number of engines."""
    check_name(name)
    if not re.fullmatch(r"\d{1,3}\.\d{1,3}", subnet) or any(int(part) > 255 for part in subnet.split(".")):
        raise ValueError(f"{subnet!r} is not the first half of an IPv4 address, such as 10.87")
    if prefill_engines < 1 or decode_engines < 1 or prefill_engines + decode_engines > MAX_ENGINES:
        raise ValueError(
            f"a testbed has at least 1 prefill and 1 decode engine and at most {MAX_ENGINES} in all, not "
            f"{prefill_engines} and {decode_engines}"
        )
    engines = [f"pe{n}" for n in range(prefill_engines)] + [f"de{n}" for n in range(decode_engines)]
    nodes = [_node(name, "head", subnet, _HEAD, NETWORKS[:2]), _node(name, "storage", subnet, _STORAGE, NETWORKS[:2])]
    nodes += [_node(name, engine, subnet, _FIRST_ENGINE + n, NETWORKS) for n, engine in enumerate(engines)]
    return Plan(name, subnet, prefill_engines, decode_engines, tuple(nodes))


def check_name(name: str) -> None:
    """Raises ValueError if `name` can't be a testbed's."""
    if _NAME.fullmatch(name) is None:
        raise ValueError(f"{name!r} can't be a testbed's name: write 1 to 8 lower-case letters and digits")


def namespace_prefix(name: str) -> str:
    return f"{PREFIX}-{name}-"


def host_link(name: str) -> str:
    """At most 15 characters, the kernel's limit."""
    return f"dpbed-{name}"


def rate_of(node: Node, device: Device, rates: Rates) -> int | None:
    """Returns the rate of a NIC, in each direction."""
    if node.is_engine:
        return {"management": None, "storage": rates.snic, "compute": rates.cnic}[device.network]
    return rates.storage_node if (node.name, device.network) == ("storage", "storage") else None


def _node(testbed: str, name: str, subnet: str, number: int, networks: tuple[str, ...]) -> Node:
    devices = tuple(
        Device(network, DEVICE[network], f"{network[0]}.{name}", _address(subnet, network, number))
        for network in networks
    )
    return Node(name, f"{namespace_prefix(testbed)}{name}", devices)


def _address(subnet: str, network: str, number: int) -> str:
    return f"{subnet}.{NETWORKS.index(network)}.{number}"
