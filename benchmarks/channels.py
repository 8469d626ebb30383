"""Measures channels, lanes and classes: throughput, accuracy of rates, fairness.

    python benchmarks/channels.py [--seconds 1.0] [--rounds 3] [--json FILE]

Server and initiator are two processes. Every throughput row is measured in turn, round after round, beside a memcpy of
the same blocks; medians are kept. Look at the ratios, because absolute figures drift with the machine.

1. Throughput of reads and writes of every transport without a rate, 16 blocks an operation, 8 operations in flight.
2. Achieved over configured rate: of a lane with four threads contending, and of a channel whose lanes have that rate.
3. Round trip of a 4 KiB ping: alone; among bulk in the same class, in first-in first-out order; and in the high class
   at 99:1 with the bulk low. The bulk is 8 connections that write at the lanes' full rate, 125 MB/s.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import cast

import numpy as np

from dualpath.core.vocabulary import TrafficClass
from dualpath.transfer import TRANSPORTS
from dualpath.transfer.pool import BufferPool
from dualpath.transfer.traffic import TrafficManager
from dualpath.transfer.transport import Channel, PageRange
from dualpath.transfer.transports.framed.channel import FramedChannel

HIGH, LOW = TrafficClass.HIGH, TrafficClass.LOW
PAGE_BYTES = 1 << 20
PAGES = 64
BLOCKS_PER_OP = 16
OPS_IN_FLIGHT = 8
BULK_CONNECTIONS = 8
BULK_BYTES_PER_S = 125_000_000
KEY = bytes(32)
"""Of nobody's cluster: what is measured here are bytes of no meaning."""
MINUTE_NS = 60_000_000_000
Row = dict[str, object]


def serve(kind: str, rate: int | None) -> None:
    """Runs the server process until its input ends."""
    name = f"benchmark-{time.monotonic_ns()}"
    with closing(BufferPool.create(name, PAGE_BYTES, PAGES)) as pool:
        traffic = TrafficManager(cnic_bytes_per_s=rate)
        server = TRANSPORTS.get(kind).serve(pool, traffic, host="127.0.0.1", name=name, key=KEY)
        print(server.address, flush=True)
        sys.stdin.read()
        server.close()


@contextmanager
def serving(kind: str, rate: int | None) -> Iterator[str]:
    command = [sys.executable, __file__, "--serve", kind, "--rate", str(rate or 0)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.communicate(timeout=30)


def connect(
    kind: str, address: str, traffic: TrafficManager, traffic_class: TrafficClass = LOW, peer_tag: str = "benchmark"
) -> Channel:
    return TRANSPORTS.get(kind).connect(address, traffic, traffic_class=traffic_class, peer_tag=peer_tag, key=KEY)


def deadline_ns() -> int:
    return time.monotonic_ns() + MINUTE_NS


def keep_in_flight(post: Callable[[int], "Future[int]"], seconds: float) -> float:
    """Returns bytes per second of `post(index)`, with OPS_IN_FLIGHT at a time."""
    begun = time.perf_counter()
    pending = [post(index) for index in range(OPS_IN_FLIGHT)]
    moved_bytes = 0
    index = OPS_IN_FLIGHT
    while time.perf_counter() - begun < seconds:
        moved_bytes += pending.pop(0).result()
        pending.append(post(index))
        index += 1
    moved_bytes += sum(future.result() for future in pending)
    return moved_bytes / (time.perf_counter() - begun)


def channel_rate(channel: Channel, verb: str, block_bytes: int, seconds: float) -> float:
    memory = np.ones((PAGES, block_bytes), np.uint8)
    post_one = getattr(channel, verb)

    def post(index: int) -> "Future[int]":
        pages = [(index * BLOCKS_PER_OP + block) % PAGES for block in range(BLOCKS_PER_OP)]
        return post_one(
            [PageRange(page, 0, block_bytes) for page in pages], [memory[page] for page in pages], deadline_ns()
        )

    return keep_in_flight(post, seconds)


def memcpy_rate(block_bytes: int, seconds: float) -> float:
    source = np.ones((PAGES, block_bytes), np.uint8)
    destination = np.full((PAGES, block_bytes), 2, np.uint8)
    begun = time.perf_counter()
    moved_bytes = 0
    while time.perf_counter() - begun < seconds:
        for page in range(PAGES):
            np.copyto(destination[page], source[page])
        moved_bytes += source.nbytes
    return moved_bytes / (time.perf_counter() - begun)


def measure_throughput(seconds: float, rounds: int) -> list[Row]:
    rates: dict[tuple[str, str, int], list[float]] = {}
    with ExitStack() as servers:
        addresses = {kind: servers.enter_context(serving(kind, None)) for kind in TRANSPORTS.names()}
        channels = {kind: connect(kind, address, TrafficManager()) for kind, address in addresses.items()}
        for _ in range(rounds):
            for block_bytes in (64 * 1024, 1024 * 1024):
                rates.setdefault(("memcpy", "copy", block_bytes), []).append(memcpy_rate(block_bytes, seconds))
                for kind, channel in channels.items():
                    for verb in ("read", "write"):
                        rate = channel_rate(channel, verb, block_bytes, seconds)
                        rates.setdefault((kind, verb, block_bytes), []).append(rate)
        for channel in channels.values():
            channel.close()
    medians = {key: statistics.median(values) for key, values in rates.items()}
    return [
        {
            "kind": kind,
            "verb": verb,
            "block_bytes": block_bytes,
            "gb_per_s": rate / 1e9,
            "ratio_to_memcpy": rate / medians["memcpy", "copy", block_bytes],
        }
        for (kind, verb, block_bytes), rate in medians.items()
    ]


def lane_rate(rate: int, seconds: float, threads: int = 4) -> float:
    """Returns bytes per second that `threads` get through one lane, in chunks of 256 KiB."""
    lane = TrafficManager(cnic_bytes_per_s=rate).cnic.rx
    begun = time.monotonic()

    def contend() -> None:
        while time.monotonic() - begun < seconds:
            lane.acquire(LOW, 256 * 1024)

    workers = [threading.Thread(target=contend) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return lane.statistics().low_bytes / (time.monotonic() - begun)


def measure_efficiency(seconds: float, rounds: int) -> list[Row]:
    rows: list[Row] = []
    for rate in (100_000_000, 800_000_000):
        achieved = statistics.median(lane_rate(rate, seconds) for _ in range(rounds))
        rows.append({"what": "lane, 4 threads", "configured_bytes_per_s": rate, "efficiency": achieved / rate})
        for kind in TRANSPORTS.names():
            with serving(kind, rate) as address:
                traffic = TrafficManager(cnic_bytes_per_s=rate)
                channel = connect(kind, address, traffic)
                for verb in ("read", "write"):
                    achieved = statistics.median(channel_rate(channel, verb, 64 * 1024, seconds) for _ in range(rounds))
                    what = f"{kind} {verb}"
                    rows.append({"what": what, "configured_bytes_per_s": rate, "efficiency": achieved / rate})
                channel.close()
    return rows


def ping_us(channel: FramedChannel, seconds: float) -> dict[str, float]:
    begun = time.perf_counter()
    samples = []
    while time.perf_counter() - begun < seconds:
        sent = time.perf_counter()
        channel.ping(bytes(4096), deadline_ns()).result()
        samples.append((time.perf_counter() - sent) * 1e6)
    samples.sort()
    return {"p50_us": samples[len(samples) // 2], "p99_us": samples[len(samples) * 99 // 100], "pings": len(samples)}


def measure_classes(seconds: float) -> list[Row]:
    rows: list[Row] = []
    for kind in ("shm", "tcp"):
        with serving(kind, BULK_BYTES_PER_S) as address:
            traffic = TrafficManager(cnic_bytes_per_s=BULK_BYTES_PER_S)
            low, high = (
                cast(FramedChannel, connect(kind, address, traffic, traffic_class)) for traffic_class in (LOW, HIGH)
            )
            rows.append({"kind": kind, "case": "idle", **ping_us(high, seconds)})
            with bulk(kind, address, traffic) as bulk_bytes:
                for case, channel in (("FIFO", low), ("99:1", high)):
                    before_bytes, begun = bulk_bytes(), time.perf_counter()
                    row: Row = {"kind": kind, "case": case, **ping_us(channel, seconds)}
                    rate = (bulk_bytes() - before_bytes) / (time.perf_counter() - begun)
                    rows.append({**row, "bulk_of_rate": rate / BULK_BYTES_PER_S})
            low.close()
            high.close()
    return rows


@contextmanager
def bulk(kind: str, address: str, traffic: TrafficManager) -> Iterator[Callable[[], int]]:
    """Runs BULK_CONNECTIONS that write all the time; yields a function that counts low-class bytes sent."""
    channels = [connect(kind, address, traffic, peer_tag=f"bulk{index}") for index in range(BULK_CONNECTIONS)]
    stop = threading.Event()
    block = np.zeros(PAGE_BYTES, np.uint8)

    def write(page: int, channel: Channel) -> None:
        pending = [channel.write([PageRange(page, 0, PAGE_BYTES)], [block], deadline_ns()) for _ in range(2)]
        while not stop.is_set():
            pending.pop(0).result()
            pending.append(channel.write([PageRange(page, 0, PAGE_BYTES)], [block], deadline_ns()))
        for future in pending:
            future.result()

    writers = [threading.Thread(target=write, args=pair) for pair in enumerate(channels)]
    for writer in writers:
        writer.start()
    time.sleep(0.3)
    try:
        yield lambda: traffic.statistics().cnic.tx.low_bytes
    finally:
        stop.set()
        for writer in writers:
            writer.join()
        for channel in channels:
            channel.close()


def print_table(title: str, rows: list[Row]) -> None:
    print(f"\n{title}")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[_cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for line in [columns, *cells]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="length of one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the result here as well")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--rate", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.rate or None)
        return
    result = {
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "throughput": measure_throughput(arguments.seconds, arguments.rounds),
        "efficiency": measure_efficiency(arguments.seconds, arguments.rounds),
        "classes": measure_classes(arguments.seconds * 2),
    }
    print(f"{result['cores']} cores, load {result['load_before']:.1f} before the start")
    print_table("Throughput without a rate", result["throughput"])  # type: ignore[arg-type]
    print_table("Achieved over configured rate", result["efficiency"])  # type: ignore[arg-type]
    print_table("Ping of 4 KiB at 125 MB/s", result["classes"])  # type: ignore[arg-type]
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
