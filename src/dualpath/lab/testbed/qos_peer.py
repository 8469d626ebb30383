"""A process of `dualpath testbed qos` in a node: it serves a pool, sends messages, or moves KV over our channels.

Processes that exchange messages get the processor first: on hardware they run on other cores, and the NIC is what is
measured here.

Orders are lines of JSON on stdin; each is answered by one on stdout. The process ends with its stdin, so it does not
outlive its parent.

::

    python -m dualpath.lab.testbed.qos_peer echo HOST            → {"address": "tcp://…"}, for messages
    python -m dualpath.lab.testbed.qos_peer serve HOST           the same, for KV
    python -m dualpath.lab.testbed.qos_peer ping ADDRESS         {"seconds": 2} → round trips of the high class
    python -m dualpath.lab.testbed.qos_peer bulk ADDRESS         {"seconds": 2, "skip_s": 0.5} → bytes of the low class
"""

import os
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

import msgspec
import numpy as np

from dualpath.core.vocabulary import TrafficClass
from dualpath.transfer.pool import BufferPool
from dualpath.transfer.traffic import TrafficManager
from dualpath.transfer.transport import PageRange
from dualpath.transfer.transports.framed.channel import FramedChannel
from dualpath.transfer.transports.tcp import TcpTransport

MESSAGE_BYTES = 4096
BLOCK_BYTES = 1 << 20
FLOWS = 4
"""Channels that move KV at once."""
IN_FLIGHT = 4
"""Blocks in flight on each channel."""
PAUSE_S = 0.002
"""Pause between two messages, which must be waited for and not fill the link."""
OP_TIMEOUT_NS = 20_000_000_000
KEY = bytes(32)
"""Of nobody's cluster: these pools have bytes of no meaning."""


class Order(msgspec.Struct, frozen=True):
    """What to do. `skip_s` leaves out the KV of the first moments, while connections find their rate."""

    seconds: float
    skip_s: float = 0.0


class RoundTrips(msgspec.Struct, frozen=True):
    """Times of messages there and back, as percentiles."""

    messages: int
    p50_us: float
    p99_us: float
    sent_bytes_per_s: float


class Moved(msgspec.Struct, frozen=True):
    """KV that arrived."""

    bytes_per_s: float


class Address(msgspec.Struct, frozen=True):
    """Address of a served pool."""

    address: str


def ping(channel: FramedChannel, order: Order) -> RoundTrips:
    """Sends messages of the high class, one at a time."""
    payload = bytes(MESSAGE_BYTES)
    times_ns: list[int] = []
    began_ns = time.monotonic_ns()
    while time.monotonic_ns() - began_ns < order.seconds * 1e9:
        sent_ns = time.monotonic_ns()
        channel.ping(payload, sent_ns + OP_TIMEOUT_NS).result()
        times_ns.append(time.monotonic_ns() - sent_ns)
        time.sleep(PAUSE_S)
    p50_ns, p99_ns = map(float, np.percentile(times_ns, (50, 99)))
    bytes_per_s = len(times_ns) * MESSAGE_BYTES / ((time.monotonic_ns() - began_ns) / 1e9)
    return RoundTrips(len(times_ns), p50_ns / 1e3, p99_ns / 1e3, bytes_per_s)


def bulk(channels: list[FramedChannel], order: Order) -> Moved:
    """Writes whole blocks of the low class, as fast as they go."""
    block = np.zeros(BLOCK_BYTES, dtype=np.uint8)
    flows: list[tuple[int, FramedChannel, deque[Future[int]]]] = [(n, one, deque()) for n, one in enumerate(channels)]
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


def _serve(host: str) -> None:
    pool = BufferPool.create("qos", BLOCK_BYTES, FLOWS)
    server = TcpTransport().serve(pool, TrafficManager(), host=host, name="qos", key=KEY)
    try:
        _answer(Address(server.address))
        sys.stdin.read()
    finally:
        server.close()
        pool.close()


def _client(
    address: str, traffic_class: TrafficClass, flows: int, do: Callable[[list[FramedChannel], Order], object]
) -> None:
    transport, traffic = TcpTransport(), TrafficManager()
    channels = [
        transport.connect(address, traffic, traffic_class=traffic_class, peer_tag=f"{traffic_class.name} {n}", key=KEY)
        for n in range(flows)
    ]
    try:
        _answer(Address(address))
        for line in sys.stdin:
            _answer(do(channels, msgspec.json.decode(line, type=Order)))
    finally:
        for channel in channels:
            channel.close()


def _answer(record: object) -> None:
    print(msgspec.json.encode(record).decode(), flush=True)


def _go_first() -> None:
    """Raises the priority before any thread starts, which inherits it. A container may forbid it; then it stays."""
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


def main(kind: str, address: str) -> None:
    """Runs one of the four kinds."""
    if kind in ("echo", "ping"):
        _go_first()
    match kind:
        case "echo":
            _serve(address)
        case "serve":
            _serve(address)
        case "ping":
            _client(address, TrafficClass.HIGH, 1, lambda channels, order: ping(channels[0], order))
        case "bulk":
            _client(address, TrafficClass.LOW, FLOWS, bulk)
        case _:
            raise SystemExit(f"{kind!r} is unknown; use echo, serve, ping or bulk")


if __name__ == "__main__":
    main(*sys.argv[1:])
