"""Measures whether KV of the low class delays messages of the high class, with our channels on kernel links.

Theory of operation. Four nodes of a testbed, pe0, pe1, de0 and de1, are ranks of a model. In each phase they send, in
the high class and by `Channel.write`, first *pings* (4 KiB from pe0 to de0, one at a time), then *all-to-alls* like
expert parallelism's (`expert_traffic`), whose time is the slowest rank's. Beside them, in turn:

    idle       nothing
    elsewhere  KV from pe2 to de2, on other NICs: what the processor alone does to the messages
    fifo       KV from pe0 to de0 on the same NICs, one queue for everybody
    classes    the same, two DSCP classes 99 : 1
    kv alone   KV from pe0 to de0, and no messages: what there is to share

Each round goes through all phases, so a machine that gets slower slows all; a ratio is the median of the rounds' own.
"""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import msgspec

from dualpath.lab.fabric.htb import HIGH_CLASS, Discipline
from dualpath.lab.testbed import network
from dualpath.lab.testbed.expert_traffic import Messages, expert_traffic
from dualpath.lab.testbed.failure import TestbedError
from dualpath.lab.testbed.iproute import inside
from dualpath.lab.testbed.network import Testbed
from dualpath.lab.testbed.plan import DEVICE, Node, Rates, make_plan
from dualpath.lab.testbed.qos_peer import FLOWS, Address, Connect, Exchange, Exchanged, Move, Moved
from dualpath.lab.testbed.qos_report import Phase, QosReport, Times, make_report, times_of

SUBNET = "10.88"
RANKS = ("pe0", "pe1", "de0", "de1")
PINGED = 1
"""Of pe0's peers: de0."""
KV_NODES = ("pe0", "de0", "pe2", "de2")
PINGS = Messages((4096,), 2_500_000)
START_S = 60.0
SETTLE_S = 0.5
"""Time that KV flows before messages are timed."""
LEAD_S = 0.05
"""From an order to the ranks' common start."""
ANSWER_S = 30.0
STOP_S = 3.0
Answer = TypeVar("Answer")


def measure(
    transport: str,
    rate_bytes_per_s: int,
    seconds: float,
    rounds: int,
    on_phase: Callable[[str], None],
    name: str = "qos",
) -> QosReport:
    """Builds a testbed, measures, and removes it. Raises TestbedError."""
    all_to_all = expert_traffic(rate_bytes_per_s, len(RANKS))
    testbed = network.up(make_plan(name, 3, 3, SUBNET), Rates(cnic=rate_bytes_per_s))
    try:
        seen = asyncio.run(_measure(testbed, transport, all_to_all, seconds, rounds, on_phase))
    finally:
        network.down(name)
    return make_report(transport, rate_bytes_per_s, all_to_all, seconds, seen)


async def _measure(
    testbed: Testbed, transport: str, all_to_all: Messages, seconds: float, rounds: int, on_phase: Callable[[str], None]
) -> dict[str, list[Phase]]:
    plan = testbed.plan
    ranks = [Peer(plan.node(name), transport, "HIGH") for name in RANKS]
    kv = [Peer(plan.node(name), transport, "LOW") for name in KV_NODES]
    try:
        addresses = [await peer.start() for peer in (*ranks, *kv)]
        for rank, own in zip(ranks, addresses, strict=False):
            await rank.ask(Connect(tuple(one for one in addresses[: len(RANKS)] if one != own)), Address)
        for source, target in ((0, 1), (2, 3)):
            await kv[source].ask(Connect((addresses[len(RANKS) + target],), FLOWS), Address)
        model = Model(testbed, ranks, all_to_all, seconds)
        return await _rounds(testbed, model, kv[0], kv[2], rounds, on_phase)
    finally:
        for peer in (*ranks, *kv):
            await peer.stop()


async def _rounds(
    testbed: Testbed, model: "Model", same: "Peer", other: "Peer", rounds: int, on_phase: Callable[[str], None]
) -> dict[str, list[Phase]]:
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
            seen[name].append(await _phase(name, model, kv, timed))
    return seen


async def _phase(name: str, model: "Model", kv: "Peer | None", timed: bool) -> Phase:
    """Starts KV first, then times messages while it flows."""
    counted_s = 2 * (model.seconds + LEAD_S) + SETTLE_S
    moving = asyncio.create_task(kv.ask(Move(SETTLE_S + counted_s, SETTLE_S), Moved)) if kv is not None else None
    await asyncio.sleep(SETTLE_S)
    phase = await model.phase(name, counted_s) if timed else Phase(name)
    moved = await moving if moving is not None else None
    return msgspec.structs.replace(phase, kv_bytes_per_s=moved.bytes_per_s if moved else None)


class Model:
    """The ranks, connected each to all others."""

    def __init__(self, testbed: Testbed, ranks: list["Peer"], messages: Messages, seconds: float) -> None:
        self.seconds = seconds
        self._testbed = testbed
        self._ranks = ranks
        self._all_to_all = messages
        self._checked = False

    async def phase(self, name: str, counted_s: float) -> Phase:
        """Times both kinds of messages. Raises TestbedError if the kernel can't tell their class."""
        pings, pinged_bytes = await self._exchange(self._ranks[:1], PINGS, (PINGED,))
        everybody = tuple(range(len(self._ranks) - 1))
        all_to_alls, sent_bytes = await self._exchange(self._ranks, self._all_to_all, everybody)
        sent_bytes += pinged_bytes
        if not self._checked:
            await asyncio.to_thread(self._check_class, sent_bytes)
        return Phase(name, pings, all_to_alls, sent_bytes / counted_s)

    async def _exchange(self, ranks: list["Peer"], messages: Messages, peers: tuple[int, ...]) -> tuple[Times, int]:
        """Returns the slowest rank's times, and how many bytes pe0 sent."""
        order = Exchange(self.seconds, time.monotonic_ns() + round(LEAD_S * 1e9), messages, peers)
        found = await asyncio.gather(*(rank.ask(order, Exchanged) for rank in ranks))
        return times_of(found), found[0].sent_bytes

    def _check_class(self, sent_bytes: int) -> None:
        """Some transports go past the kernel's NICs on one host, or mark no packets: then there is nothing to show."""
        node = self._testbed.plan.node(RANKS[0])
        counted = network.sent_bytes_by_class(node.namespace, DEVICE["compute"]).get(HIGH_CLASS, 0)
        if counted < sent_bytes:
            raise TestbedError(
                f"the kernel saw {counted:,} of the {sent_bytes:,} bytes of messages in the high class: it tells the "
                "classes only of a transport that sends packets marked with their DSCP, such as tcp"
            )
        self._checked = True


class Peer:
    """A `qos_peer` process in a node. Raises TestbedError if it ends or does not answer in time."""

    def __init__(self, node: Node, transport: str, traffic_class: str) -> None:
        self._what = f"{traffic_class} in {node.namespace}"
        command = (sys.executable, "-m", "dualpath.lab.testbed.qos_peer", transport, traffic_class)
        self._command = (*inside(node.namespace), *command, node.address("compute"))
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> str:
        """Returns the address of its pool."""
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=pipe, stdout=pipe, start_new_session=True
        )
        return (await self._answer(Address, START_S)).address

    async def ask(self, order: Connect | Exchange | Move, kind: type[Answer]) -> Answer:
        """Orders something and returns the answer."""
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(order) + b"\n")
        return await self._answer(kind, ANSWER_S + (0 if isinstance(order, Connect) else order.seconds))

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
