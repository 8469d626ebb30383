"""A cluster in a testbed's network namespaces, whose links can be cut one way or both (root).

An engine that leaves is started again, as a service manager does on a host of its own. A cut direction has a queue
into which no packet fits, at the end where packets leave.
"""

import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from dualpath.lab.fabric.htb import shaping
from dualpath.lab.faults.matrix import Combination, Fault, Victim
from dualpath.lab.faults.real.served import Served
from dualpath.lab.testbed import iproute
from dualpath.lab.testbed.network import Testbed
from dualpath.lab.testbed.plan import NETWORKS, Node

CONTROL_PORT = 5555
RESTART_S = 0.5
SLOW_BYTES_PER_S = 200_000
_NODES = {
    Victim.PE: ("pe0", NETWORKS),
    Victim.DE: ("de0", NETWORKS),
    Victim.COORDINATOR: ("head", ("management",)),
    Victim.STORE: ("storage", ("storage",)),
    Victim.LINK: ("pe0", ("compute",)),
}
"""Whose NICs, in which networks, are cut."""
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


class Namespaced(Served):
    """`dualpath serve` in the head's namespace, a node of engines in each other."""

    def __init__(self, testbed: Testbed, options: Sequence[str], work: Path) -> None:
        self._plan = testbed.plan
        head = self._plan.node("head")
        address = head.address("management")
        control = f"tcp://{address}:{CONTROL_PORT}"
        secret = work / "secret"
        secret.touch(0o600)
        secret.write_text(secrets.token_hex(32))
        given = ("--transport", "tcp", *options, "--cluster-secret-file", str(secret))
        super().__init__(
            (*given, "--host", address, "--join-address", control), work, inside=iproute.inside(head.namespace)
        )
        self._engines = {
            node.name: (*iproute.inside(node.namespace), *_engine(node), "--coordinator", control, *given)
            for node in self._plan.nodes
            if node.is_engine
        }
        self._left = threading.Event()
        self._keepers = [threading.Thread(target=self._keep, args=(name,), daemon=True) for name in self._engines]

    def __enter__(self) -> "Namespaced":
        for keeper in self._keepers:
            keeper.start()
        super().__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        super().__exit__()  # kills what is in the namespaces
        for keeper in self._keepers:
            keeper.join()

    def pids(self) -> list[int]:
        nodes = [node for node in self._plan.nodes if node.name != "storage"]
        return [pid for node in nodes for pid in iproute.pids(node.namespace)]

    def _keep(self, name: str) -> None:
        environment = {key: value for key, value in self._environment.items() if key.lower() not in _PROXIES}
        while not self._left.is_set():
            with self.log.with_name(f"{name}.log").open("ab") as log:
                engine = subprocess.Popen(
                    self._engines[name], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
                )
            engine.wait()
            self._left.wait(RESTART_S)


def _engine(node: Node) -> tuple[str, ...]:
    role = {"pe": "prefill", "de": "decode"}[node.name[:2]]
    name = (sys.executable, "-m", "dualpath", "engine", "--role", role, "--rank", node.name[2:])
    return (*name, "--data-host", node.address("compute"))


def cut(at: Combination, testbed: Testbed) -> Callable[[], None]:
    """Cut, or slow down, the links of the victim. Returns what heals them. Raises TestbedError."""
    name, networks = _NODES[at.victim]
    node, switch = testbed.plan.node(name), testbed.plan.switch
    devices = [device for device in node.devices if device.network in networks]
    ends = [(node.namespace, device.name) for device in devices if at.fault is not Fault.PARTITION_TO]
    ends += [(switch, device.port) for device in devices if at.fault is not Fault.PARTITION_FROM]
    for namespace, device in ends:
        closed = [f"qdisc replace dev {device} root tbf rate 8bit burst 16 limit 16"]
        slow = shaping(device, SLOW_BYTES_PER_S, "fifo")
        iproute.batch("tc", namespace, slow if at.fault is Fault.SLOW else closed)

    def heal() -> None:
        for namespace, device in ends:
            iproute.batch("tc", namespace, shaping(device, None, "fifo"))

    return heal
