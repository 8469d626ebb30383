"""A process of `dualpath testbed qos` in a node: it serves a pool and writes into others', messages or KV.

Processes of the high class get the processor first: on hardware they run on other cores, and the NIC is what is
measured here.

Orders are lines of JSON on stdin; each is answered by one on stdout. The process ends with its stdin, so it does not
outlive its parent.

::

    python -m dualpath.lab.testbed.qos_peer TRANSPORT HIGH|LOW HOST     → {"address": "tcp://…"}
    {"type": "Connect", "addresses": ["tcp://…"]}                       → {"address": …} again
    {"type": "Exchange", "seconds": 2, …}                               → how long each exchange took
    {"type": "Move", "seconds": 2, "skip_s": 0.5}                       → how fast the bytes went
"""

import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress

import msgspec
import numpy as np

from dualpath.core.vocabulary import TrafficClass
from dualpath.lab.testbed.expert_traffic import Messages
from dualpath.transfer import TRANSPORTS
from dualpath.transfer.pool import BufferPool
from dualpath.transfer.traffic import TrafficManager
from dualpath.transfer.transport import Channel, PageRange

PAGE_BYTES = 4 << 20
"""Takes any message of `expert_traffic`."""
BLOCK_BYTES = 1 << 20
"""Of KV."""
FLOWS = 4
"""Channels that move KV at once."""
IN_FLIGHT = 4
"""Blocks in flight on each channel."""
OP_TIMEOUT_NS = 20_000_000_000
KEY = bytes(32)
"""Of nobody's cluster: these pools have bytes of no meaning."""


class Connect(msgspec.Struct, frozen=True, tag=True):
    """Connect to these pools, in this order, `flows` times each."""

    addresses: tuple[str, ...]
    flows: int = 1


class Exchange(msgspec.Struct, frozen=True, tag=True):
    """Send messages from `start_ns` of the host's monotonic clock on, which all ranks share. `peers` are channels."""

    seconds: float
    start_ns: int
    messages: Messages
    peers: tuple[int, ...]


class Move(msgspec.Struct, frozen=True, tag=True):
    """Move KV. `skip_s` leaves out the first moments, while connections find their rate."""

    seconds: float
    skip_s: float


class Exchanged(msgspec.Struct, frozen=True):
    """How long a rank's writes took in each period, by its number; periods that began too late are missing."""

    took_ns: dict[int, int]
    sent_bytes: int


class Moved(msgspec.Struct, frozen=True):
    """KV that arrived."""

    bytes_per_s: float


class Address(msgspec.Struct, frozen=True):
    """Address of the process's pool."""

    address: str


def exchange(channels: Sequence[Channel], order: Exchange) -> Exchanged:
    """Sends every peer its messages at once, again and again; each of a period's sizes has its own moment in it."""
    messages, memory = order.messages, np.zeros(PAGE_BYTES, dtype=np.uint8)
    took_ns: dict[int, int] = {}
    period, end_ns = 0, order.start_ns + order.seconds * 1e9
    while (start_ns := order.start_ns + period * messages.period_ns) < end_ns:
        took_ns[period] = 0
        for number, n_bytes in enumerate(messages.sizes_bytes):
            at_ns = start_ns + number * messages.period_ns // len(messages.sizes_bytes)
            time.sleep(max(at_ns - time.monotonic_ns(), 0) / 1e9)
            began_ns = time.monotonic_ns()
            where, what, deadline_ns = [PageRange(0, 0, n_bytes)], [memory[:n_bytes]], began_ns + OP_TIMEOUT_NS
            for written in [channels[peer].write(where, what, deadline_ns) for peer in order.peers]:
                written.result()
            took_ns[period] += time.monotonic_ns() - began_ns
        period = max(period + 1, -((order.start_ns - time.monotonic_ns()) // messages.period_ns))
    return Exchanged(took_ns, len(took_ns) * sum(messages.sizes_bytes) * len(order.peers))


def move(channels: Sequence[Channel], order: Move) -> Moved:
    """Writes whole blocks, as fast as they go."""
    block = np.zeros(BLOCK_BYTES, dtype=np.uint8)
    flows: list[tuple[int, Channel, deque[Future[int]]]] = [(n, one, deque()) for n, one in enumerate(channels)]
    began = time.monotonic()
    moved_bytes = 0
    while time.monotonic() - began < order.seconds:
        for page, channel, flying in flows:
            while len(flying) < IN_FLIGHT:
                deadline_ns = time.monotonic_ns() + OP_TIMEOUT_NS
                flying.append(channel.write([PageRange(page, 0, BLOCK_BYTES)], [block], deadline_ns))
        for _, _, flying in flows:
            n_bytes = flying.popleft().result()
            if time.monotonic() - began > order.skip_s:
                moved_bytes += n_bytes
    rate = moved_bytes / (time.monotonic() - began - order.skip_s)
    for _, _, flying in flows:
        for one in flying:
            one.result()
    return Moved(rate)


def _answer(record: object) -> None:
    print(msgspec.json.encode(record).decode(), flush=True)


def go_first() -> None:
    """Raises the priority before any thread starts, which inherits it. A container may forbid it; then it stays."""
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


def main(transport_name: str, class_name: str, host: str) -> None:
    """Serves a pool and obeys, until stdin ends."""
    traffic_class = TrafficClass[class_name]
    if traffic_class is TrafficClass.HIGH:
        go_first()
    transport, traffic = TRANSPORTS.get(transport_name), TrafficManager()
    pool = BufferPool.create(f"qos{os.getpid()}", PAGE_BYTES, FLOWS)
    server = transport.serve(pool, traffic, host=host, name="qos", key=KEY)
    channels: list[Channel] = []
    try:
        _answer(Address(server.address))
        for line in sys.stdin:
            match msgspec.json.decode(line, type=Connect | Exchange | Move):
                case Connect(addresses, flows):
                    for n, address in enumerate(addresses * flows):
                        tag = f"{host} {class_name} {n}"
                        channel = transport.connect(
                            address, traffic, traffic_class=traffic_class, peer_tag=tag, key=KEY
                        )
                        channels.append(channel)
                    _answer(Address(server.address))
                case Exchange() as order:
                    _answer(exchange(channels, order))
                case Move() as order:
                    _answer(move(channels, order))
    finally:
        for channel in channels:
            channel.close()
        server.close()
        pool.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
