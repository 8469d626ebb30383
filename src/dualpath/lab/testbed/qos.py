"""Measures whether KV of the low class delays messages of the high class, with our channels on kernel links.

Theory of operation. In a testbed of two prefill and two decode nodes, 4 KiB messages go from pe0 to de0 and back all
the time. Beside them, in turn:

    idle       nothing
    elsewhere  KV from pe1 to de1, on other NICs: what the processor alone does to the messages
    fifo       KV from pe0 to de0 on the same NICs, one queue for everybody
    classes    the same, two DSCP classes 99 : 1
    kv alone   KV from pe0 to de0, and no messages: what there is to share

Each round goes through all phases, so a machine that gets slower slows all; a figure is the median of its rounds.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from statistics import median
from typing import TypeVar

import msgspec

from dualpath.lab.fabric.htb import Discipline
from dualpath.lab.testbed import network
from dualpath.lab.testbed.failure import TestbedError
from dualpath.lab.testbed.iproute import inside
from dualpath.lab.testbed.network import Testbed
from dualpath.lab.testbed.plan import Node, Rates, make_plan
from dualpath.lab.testbed.qos_peer import MESSAGE_BYTES, Address, Moved, Order, RoundTrips

SUBNET = "10.88"
START_S = 60.0
SETTLE_S = 0.5
"""Time that KV flows before messages are timed."""
ANSWER_S = 30.0
STOP_S = 3.0
WANTED_LATENCY_RATIO = 1.2
WANTED_KV_SHARE = 0.95
Answer = TypeVar("Answer")


class Phase(msgspec.Struct, frozen=True):
    """Medians over the rounds. `kv_bytes_per_s` is None if no KV moved; message times are None if only KV did."""

    name: str
    p50_us: float | None = None
    p99_us: float | None = None
    messages: int = 0
    high_bytes_per_s: float = 0.0
    kv_bytes_per_s: float | None = None


class QosReport(msgspec.Struct, frozen=True):
    """The measurements, and the two figures with a goal: ≤ 1.2 and ≥ 0.95."""

    cnic_bytes_per_s: int
    message_bytes: int
    rounds: int
    seconds: float
    phases: tuple[Phase, ...]
    latency_ratio: float
    """p50 beside KV in two classes ÷ p50 idle."""
    latency_ratio_busy: float
    """p50 beside KV in two classes ÷ p50 with KV elsewhere: the effect without that of a busy processor."""
    latency_ratio_fifo: float
    """p50 beside KV in one queue ÷ p50 idle."""
    kv_share: float
    """KV beside messages ÷ (KV alone − messages)."""

    @property
    def is_as_wanted(self) -> bool:
        return self.latency_ratio <= WANTED_LATENCY_RATIO and self.kv_share >= WANTED_KV_SHARE


def measure(
    rate_bytes_per_s: int, seconds: float, rounds: int, on_phase: Callable[[str], None], name: str = "qos"
) -> QosReport:
    """Builds a testbed, measures, and removes it. Raises TestbedError."""
    testbed = network.up(make_plan(name, 2, 2, SUBNET), Rates(cnic=rate_bytes_per_s))
    try:
        phases = asyncio.run(_measure(testbed, seconds, rounds, on_phase))
    finally:
        network.down(name)
    found = {phase.name: phase for phase in phases}
    classes, alone = found["classes"], found["kv alone"]
    return QosReport(
        cnic_bytes_per_s=rate_bytes_per_s,
        message_bytes=MESSAGE_BYTES,
        rounds=rounds,
        seconds=seconds,
        phases=tuple(phases),
        latency_ratio=_of(classes.p50_us) / _of(found["idle"].p50_us),
        latency_ratio_busy=_of(classes.p50_us) / _of(found["elsewhere"].p50_us),
        latency_ratio_fifo=_of(found["fifo"].p50_us) / _of(found["idle"].p50_us),
        kv_share=_of(classes.kv_bytes_per_s) / (_of(alone.kv_bytes_per_s) - classes.high_bytes_per_s),
    )


async def _measure(testbed: Testbed, seconds: float, rounds: int, on_phase: Callable[[str], None]) -> list[Phase]:
    pairs = (("ping", "pe0", "echo", "de0"), ("bulk", "pe0", "serve", "de0"), ("bulk", "pe1", "serve", "de1"))
    peers: list[Peer] = []
    clients = []
    try:
        for client, source, server, target in pairs:
            node = testbed.plan.node(target)
            peers.append(Peer(node, server, node.address("compute")))
            address = (await peers[-1].start()).address
            peers.append(Peer(testbed.plan.node(source), client, address))
            await peers[-1].start()
            clients.append(peers[-1])
        return await _rounds(testbed, clients, seconds, rounds, on_phase)
    finally:
        for peer in peers:
            await peer.stop()


async def _rounds(
    testbed: Testbed, peers: list["Peer"], seconds: float, rounds: int, on_phase: Callable[[str], None]
) -> list[Phase]:
    messages, same, other = peers
    phases: list[tuple[str, Discipline, Peer | None, bool]] = [
        ("idle", "classes", None, True),
        ("elsewhere", "classes", other, True),
        ("fifo", "fifo", same, True),
        ("classes", "classes", same, True),
        ("kv alone", "classes", same, False),
    ]
    seen: dict[str, list[Phase]] = {name: [] for name, *_ in phases}
    for _ in range(rounds):
        for name, discipline, kv, timed in phases:
            on_phase(name)
            await asyncio.to_thread(network.set_rates, testbed, testbed.rates, compute=discipline)
            seen[name].append(await _phase(name, messages if timed else None, kv, seconds))
    return [_median(name, found) for name, found in seen.items()]


async def _phase(name: str, messages: "Peer | None", kv: "Peer | None", seconds: float) -> Phase:
    """Starts KV first, then times messages while it flows."""
    kv_order = Order(seconds + 2 * SETTLE_S, SETTLE_S)
    moving = asyncio.create_task(kv.ask(kv_order, Moved)) if kv is not None else None
    await asyncio.sleep(SETTLE_S)
    trips = await messages.ask(Order(seconds), RoundTrips) if messages is not None else None
    moved = await moving if moving is not None else None
    return Phase(
        name,
        trips.p50_us if trips else None,
        trips.p99_us if trips else None,
        trips.messages if trips else 0,
        trips.sent_bytes_per_s if trips else 0.0,
        moved.bytes_per_s if moved else None,
    )


def _median(name: str, found: list[Phase]) -> Phase:
    def middle(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return median(known) if known else None

    return Phase(
        name,
        middle([one.p50_us for one in found]),
        middle([one.p99_us for one in found]),
        sum(one.messages for one in found),
        median(one.high_bytes_per_s for one in found),
        middle([one.kv_bytes_per_s for one in found]),
    )


def _of(value: float | None) -> float:
    assert value is not None
    return value


class Peer:
    """A `qos_peer` process in a node. Raises TestbedError if it ends or does not answer in time."""

    def __init__(self, node: Node, kind: str, address: str) -> None:
        self._what = f"{kind} in {node.namespace}"
        self._command = (*inside(node.namespace), sys.executable, "-m", "dualpath.lab.testbed.qos_peer", kind, address)
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> Address:
        """Returns its address, or the one it has connected to."""
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=pipe, stdout=pipe, start_new_session=True
        )
        return await self._answer(Address, START_S)

    async def ask(self, order: Order, kind: type[Answer]) -> Answer:
        """Orders something and returns the answer."""
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(order) + b"\n")
        return await self._answer(kind, order.seconds + ANSWER_S)

    async def stop(self) -> None:
        """Closes its stdin, at which it leaves; ends it if it does not."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_S):
                await self._process.wait()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()

    async def _answer(self, kind: type[Answer], within_s: float) -> Answer:
        assert self._process is not None and self._process.stdout is not None
        try:
            async with asyncio.timeout(within_s):
                line = await self._process.stdout.readline()
            return msgspec.json.decode(line, type=kind)
        except TimeoutError:
            raise TestbedError(f"{self._what}: no answer within {within_s:g} s") from None
        except msgspec.MsgspecError as error:
            raise TestbedError(f"{self._what} ended, or said {line!r} instead of an answer: {error}") from error
