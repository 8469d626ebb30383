"""Measures throughput: GB/s and CPU seconds a GB of every transport, by block size and batch, quiet and contended.

    python benchmarks/channel_throughput.py [--seconds 1.0] [--rounds 3] [--transport NAME ...] [--json FILE]

Server and initiator are two processes, lanes have no rate, 8 operations of 1 or 16 blocks are in flight. Contended:
another process computes all the time, as an engine does. Every row is measured in turn, round after round, beside a
memcpy of the same blocks; medians are kept, and the quartiles of the CPU time, which is both processes'. Look at the
ratios, because absolute figures drift with the machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager, nullcontext
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

from dualpath.core.vocabulary import TrafficClass
from dualpath.spec.registry import UnknownNameError
from dualpath.transfer import TRANSPORTS
from dualpath.transfer.pool import BufferPool
from dualpath.transfer.traffic import TrafficManager
from dualpath.transfer.transport import Channel, PageRange

PAGE_BYTES = 1 << 20
PAGES = 64
BLOCKS_PER_OP = (1, 16)
OPS_IN_FLIGHT = 8
QUIET, CONTENDED = "quiet", "contended"
KEY = bytes(32)
"""Of nobody's cluster: what is measured here are bytes of no meaning."""
MINUTE_NS = 60_000_000_000
Row = dict[str, object]
Way = tuple[str, str, int, int, str]
"""Kind, verb, bytes of a block, blocks of an operation, quiet or contended."""


class Served(NamedTuple):
    """A server process."""

    address: str
    pid: int

    def cpu_s(self) -> float:
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)


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
def serving(kind: str, rate: int | None) -> Iterator[Served]:
    command = [sys.executable, __file__, "--serve", kind, "--rate", str(rate or 0)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield Served(process.stdout.readline().strip(), process.pid)
    finally:
        process.communicate(timeout=30)


def connect(
    kind: str,
    address: str,
    traffic: TrafficManager,
    traffic_class: TrafficClass = TrafficClass.LOW,
    peer_tag: str = "benchmark",
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


def channel_rate(channel: Channel, verb: str, block_bytes: int, seconds: float, blocks_per_op: int = 16) -> float:
    memory = np.ones((PAGES, block_bytes), np.uint8)
    post_one = getattr(channel, verb)

    def post(index: int) -> "Future[int]":
        pages = [(index * blocks_per_op + block) % PAGES for block in range(blocks_per_op)]
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


class _Spent:
    """CPU time from now on, of this process and of a server's."""

    def __init__(self, server: Served | None) -> None:
        self._server = server
        self._begun = time.perf_counter(), self._cpu_s()

    def cores(self) -> float:
        return (self._cpu_s() - self._begun[1]) / (time.perf_counter() - self._begun[0])

    def _cpu_s(self) -> float:
        return time.process_time() + (self._server.cpu_s() if self._server else 0)


def measure_throughput(kinds: Sequence[str], seconds: float, rounds: int) -> list[Row]:
    """Every way to move blocks in turn, round after round; CPU time is both processes'."""
    samples: dict[Way, list[tuple[float, float]]] = {}
    with ExitStack() as servers:
        served = {kind: servers.enter_context(serving(kind, None)) for kind in kinds}
        channels = {kind: connect(kind, one.address, TrafficManager()) for kind, one in served.items()}
        for _, case in product(range(rounds), (QUIET, CONTENDED)):
            with busy_core() if case == CONTENDED else nullcontext():
                for block_bytes, blocks_per_op in product((64 * 1024, 1024 * 1024), BLOCKS_PER_OP):
                    for kind, verb in [("memcpy", "copy"), *product(kinds, ("read", "write"))]:
                        spent = _Spent(served.get(kind))
                        if kind in channels:
                            rate = channel_rate(channels[kind], verb, block_bytes, seconds, blocks_per_op)
                        else:
                            rate = memcpy_rate(block_bytes, seconds)
                        way = kind, verb, block_bytes, blocks_per_op, case
                        samples.setdefault(way, []).append((rate / 1e9, spent.cores() / (rate / 1e9)))
        for channel in channels.values():
            channel.close()
    return [_row(way, taken) for way, taken in samples.items()]


def _row(way: Way, samples: list[tuple[float, float]]) -> Row:
    rates, cpu = (sorted(values) for values in zip(*samples, strict=True))
    quarter = len(cpu) // 4
    return {
        **dict(zip(("kind", "verb", "block_bytes", "blocks_per_op", "case"), way, strict=True)),
        "gb_per_s": statistics.median(rates),
        "cpu_s_per_gb": statistics.median(cpu),
        "quartiles": f"{cpu[quarter]:.2f}-{cpu[-1 - quarter]:.2f}",
    }


@contextmanager
def busy_core() -> Iterator[None]:
    """Another process computes all the time, as an engine does."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


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
    add_options(parser)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--rate", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.rate or None)
        return
    result = {"cores": os.cpu_count(), "load_before": os.getloadavg()[0]}
    rows = measure_throughput(kinds_of(arguments), arguments.seconds, arguments.rounds)
    print(f"{result['cores']} cores, load {result['load_before']:.1f} before the start")
    print_table("Throughput without a rate", rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(result | {"throughput": rows}, indent=2) + "\n")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=1.0, help="length of one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    which = "of these alone (default: all there are)"
    parser.add_argument("--transport", action="append", metavar="NAME", type=_transport, help=which)
    parser.add_argument("--json", type=Path, help="write the result here as well")


def kinds_of(arguments: argparse.Namespace) -> list[str]:
    return arguments.transport or [name for name in TRANSPORTS.names() if _is_there(name)]


def _transport(name: str) -> str:
    try:
        TRANSPORTS.get(name)
    except (UnknownNameError, ModuleNotFoundError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


def _is_there(name: str) -> bool:
    """Whether the extra that a transport needs is installed."""
    try:
        TRANSPORTS.get(name)
    except ModuleNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
