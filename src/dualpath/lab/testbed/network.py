"""Builds, inspects and removes a testbed.

Theory of operation. All of a testbed is a network namespace whose name starts with its prefix, or lives in one and goes
with it. The only exception is the host's end of its management link, whose name is fixed as well. So `down` needs no
record of what `up` did: it works after a crash, half-way through an `up`, twice, and on nothing. The record in ``/run``
only tells `status` and the commands that use the testbed what there is.

A namespace lives on as long as a process is in it, so `down` ends those first; only the testbed's can be in there.
"""

import os
import signal
import time
from contextlib import suppress
from ipaddress import ip_network
from pathlib import Path

import msgspec

from dualpath.lab.fabric.htb import HIGH_CLASS, LOW_CLASS, Discipline, shaping
from dualpath.lab.testbed import iproute
from dualpath.lab.testbed.failure import TestbedError
from dualpath.lab.testbed.plan import NETWORKS, Node, Plan, Rates, host_link, namespace_prefix, rate_of
from dualpath.spec.whole_file import write_whole
from dualpath.transfer.pool_files import sweep_dead_pools

STATE_DIRECTORY = Path("/run/dualpath-testbed")
KILL_S = 5.0
_DISCIPLINES: dict[str, Discipline] = {"storage": "fifo", "compute": "classes"}


class DeviceStatus(msgspec.Struct, frozen=True):
    """A NIC: its rate, and bytes it has sent by class since the rate was set; None if it has no rate."""

    name: str
    address: str
    rate_bytes_per_s: int | None
    sent_high_bytes: int | None
    sent_low_bytes: int | None


class NodeStatus(msgspec.Struct, frozen=True):
    """A node of a testbed that is up."""

    name: str
    namespace: str
    pids: tuple[int, ...]
    devices: tuple[DeviceStatus, ...]


class Testbed(msgspec.Struct, frozen=True):
    """A testbed that is up, as kept in the state file."""

    __test__ = False

    plan: Plan
    rates: Rates


def up(plan: Plan, rates: Rates, *, replace: bool = False) -> Testbed:
    """Builds a testbed. Refuses leftovers of that name, or removes them with `replace`. A failure leaves nothing.

    Raises TestbedError.
    """
    iproute.check_tools()
    if replace:
        down(plan.name)
    elif leftovers(plan.name):
        raise TestbedError(
            f"testbed {plan.name!r} is up, or was left over ({', '.join(leftovers(plan.name))}); end it with "
            f"dualpath testbed down --name {plan.name}"
        )
    _check_subnet(plan)
    try:
        _build(plan)
        testbed = set_rates(Testbed(plan, rates), rates)
    except BaseException:
        down(plan.name)
        raise
    return testbed


def down(name: str) -> list[str]:
    """Removes every process, namespace and link of testbed `name` in whatever state; returns what was removed.

    Raises TestbedError if something can't be removed.
    """
    iproute.check_tools()
    found = leftovers(name)
    spaces = iproute.namespaces(namespace_prefix(name))
    for namespace in spaces:
        _end_processes(namespace)
    if host_link(name) in found:
        iproute.run("ip", "link", "delete", host_link(name))
    for namespace in spaces:
        iproute.run("ip", "netns", "delete", namespace)
    sweep_dead_pools()
    with suppress(FileNotFoundError):
        _state_file(name).unlink()
    return found


def leftovers(name: str) -> list[str]:
    """Names the namespaces and the host's link that exist. Raises TestbedError."""
    links = {str(link["ifname"]) for link in iproute.read_json("ip", "link", "show")}
    return iproute.namespaces(namespace_prefix(name)) + [link for link in (host_link(name),) if link in links]


def load(name: str) -> Testbed:
    """Returns the testbed that is up. Raises TestbedError if none is."""
    try:
        testbed = msgspec.json.decode(_state_file(name).read_bytes(), type=Testbed)
    except FileNotFoundError:
        raise TestbedError(f"there is no testbed {name!r}: dualpath testbed up --name {name}") from None
    except msgspec.MsgspecError as error:
        raise TestbedError(f"{_state_file(name)} is damaged ({error}): dualpath testbed down --name {name}") from error
    there = set(iproute.namespaces(testbed.plan.prefix))
    missing = [node.namespace for node in testbed.plan.nodes if node.namespace not in there]
    if missing:
        raise TestbedError(f"testbed {name!r} lacks {', '.join(missing)}: dualpath testbed up --replace --name {name}")
    return testbed


def set_rates(testbed: Testbed, rates: Rates, *, compute: Discipline = "classes") -> Testbed:
    """Gives every NIC its rate, at both ends of its veth pair; queued packets are lost. Raises TestbedError."""
    ports: list[str] = []
    disciplines = _DISCIPLINES | {"compute": compute}
    for node in testbed.plan.nodes:
        lines: list[str] = []
        for device in node.devices:
            if device.network in disciplines:
                rate, discipline = rate_of(node, device, rates), disciplines[device.network]
                lines += shaping(device.name, rate, discipline)
                ports += shaping(device.port, rate, discipline)
        iproute.batch("tc", node.namespace, lines)
    iproute.batch("tc", testbed.plan.switch, ports)
    changed = msgspec.structs.replace(testbed, rates=rates)
    _write_state(changed)
    return changed


def status(testbed: Testbed) -> list[NodeStatus]:
    """Returns the present state of every node. Raises TestbedError."""
    return [_node_status(node, testbed.rates) for node in testbed.plan.nodes]


def _check_subnet(plan: Plan) -> None:
    """Refuses a subnet that the host has already, because it could not tell the two networks apart."""
    wanted = ip_network(f"{plan.host_address}/24", strict=False)
    for link in iproute.read_json("ip", "-4", "address", "show"):
        for address in link["addr_info"]:
            if wanted.overlaps(ip_network(f"{address['local']}/{address['prefixlen']}", strict=False)):
                raise TestbedError(
                    f"the host's {link['ifname']} has {address['local']}/{address['prefixlen']}, which overlaps "
                    f"{wanted}; give another --subnet"
                )


def _build(plan: Plan) -> None:
    for namespace in (plan.switch, *(node.namespace for node in plan.nodes)):
        iproute.run("ip", "netns", "add", namespace)
    lines = [f"link add {network} type bridge mcast_snooping 0" for network in NETWORKS]
    lines += [f"link set {network} up" for network in NETWORKS]
    iproute.batch("ip", plan.switch, lines)
    for node in plan.nodes:
        _build_node(plan, node)
    port = "m.host"
    iproute.run("ip", "link", "add", plan.host_link, "type", "veth", "peer", "name", port, "netns", plan.switch)
    iproute.batch("ip", plan.switch, [f"link set {port} master management up"])
    iproute.run("ip", "address", "add", f"{plan.host_address}/24", "dev", plan.host_link)
    iproute.run("ip", "link", "set", plan.host_link, "up")


def _build_node(plan: Plan, node: Node) -> None:
    lines, ports = ["link set lo up"], []
    for device in node.devices:
        lines += [
            f"link add {device.name} type veth peer name {device.port} netns {plan.switch}",
            f"address add {device.address}/24 dev {device.name}",
            f"link set {device.name} up",
        ]
        ports.append(f"link set {device.port} master {device.network} up")
    iproute.batch("ip", node.namespace, lines)
    iproute.batch("ip", plan.switch, ports)


def _end_processes(namespace: str) -> None:
    deadline = time.monotonic() + KILL_S
    while found := iproute.pids(namespace):
        if time.monotonic() > deadline:
            raise TestbedError(
                f"{namespace}: processes {', '.join(map(str, found))} do not end; find out why, then try again"
            )
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _node_status(node: Node, rates: Rates) -> NodeStatus:
    devices = []
    for device in node.devices:
        rate = rate_of(node, device, rates)
        sent = sent_bytes_by_class(node.namespace, device.name) if rate is not None else {}
        devices.append(
            DeviceStatus(
                device.name, device.address, rate, sent.get(HIGH_CLASS, 0) if sent else None, sent.get(LOW_CLASS)
            )
        )
    return NodeStatus(node.name, node.namespace, tuple(iproute.pids(node.namespace)), tuple(devices))


def sent_bytes_by_class(namespace: str, device: str) -> dict[str, int]:
    """Returns bytes sent by class, from tc's text: iproute2 6.1 has no JSON for HTB classes."""
    sent: dict[str, int] = {}
    current = ""
    for line in iproute.run("tc", "-n", namespace, "-s", "class", "show", "dev", device).splitlines():
        words = line.split()
        if words[:2] == ["class", "htb"]:
            current = words[2]
        elif words[:1] == ["Sent"]:
            sent[current] = int(words[1])
    return sent


def _state_file(name: str) -> Path:
    return STATE_DIRECTORY / f"{name}.json"


def _write_state(testbed: Testbed) -> None:
    path = _state_file(testbed.plan.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, msgspec.json.encode(testbed))
    except OSError as error:
        raise TestbedError(f"the testbed's record can't be kept: {error}") from error
