"""Measures channels, lanes and classes: throughput, accuracy of rates, fairness.

    python benchmarks/channels.py [--seconds 1.0] [--rounds 3] [--transport NAME ...] [--json FILE]

1. Throughput of reads and writes of every transport without a rate (`channel_throughput.py`, which measures it alone).
2. Achieved over configured rate: of a lane with four threads contending, and of a channel whose lanes have that rate.
3. Round trip of a 4 KiB ping: alone; among bulk in the same class, in first-in first-out order; and in the high class
   at 99:1 with the bulk low. The bulk is 8 connections that write at the lanes' full rate, 125 MB/s.
"""

import argparse
import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import numpy as np
from channel_throughput import (
    PAGE_BYTES,
    Row,
    add_options,
    channel_rate,
    connect,
    deadline_ns,
    kinds_of,
    measure_throughput,
    print_table,
    serving,
)

from dualpath.core.vocabulary import TrafficClass
from dualpath.transfer.traffic import TrafficManager
from dualpath.transfer.transport import Channel, PageRange
from dualpath.transfer.transports.framed.channel import FramedChannel

HIGH, LOW = TrafficClass.HIGH, TrafficClass.LOW
BULK_CONNECTIONS = 8
BULK_BYTES_PER_S = 125_000_000


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


def measure_efficiency(kinds: Sequence[str], seconds: float, rounds: int) -> list[Row]:
    rows: list[Row] = []
    for rate in (100_000_000, 800_000_000):
        achieved = statistics.median(lane_rate(rate, seconds) for _ in range(rounds))
        rows.append({"what": "lane, 4 threads", "configured_bytes_per_s": rate, "efficiency": achieved / rate})
        for kind in kinds:
            with serving(kind, rate) as served:
                traffic = TrafficManager(cnic_bytes_per_s=rate)
                channel = connect(kind, served.address, traffic)
                for verb in ("read", "write"):
                    rates = [channel_rate(channel, verb, 64 * 1024, seconds) for _ in range(rounds)]
                    achieved = statistics.median(rates)
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
        with serving(kind, BULK_BYTES_PER_S) as served:
            address = served.address
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_options(parser)
    arguments = parser.parse_args()
    kinds, seconds, rounds = kinds_of(arguments), arguments.seconds, arguments.rounds
    result = {
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "throughput": measure_throughput(kinds, seconds, rounds),
        "efficiency": measure_efficiency(kinds, seconds, rounds),
        "classes": measure_classes(seconds * 2),
    }
    print(f"{result['cores']} cores, load {result['load_before']:.1f} before the start")
    print_table("Throughput without a rate", result["throughput"])  # type: ignore[arg-type]
    print_table("Achieved over configured rate", result["efficiency"])  # type: ignore[arg-type]
    print_table("Ping of 4 KiB at 125 MB/s", result["classes"])  # type: ignore[arg-type]
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
