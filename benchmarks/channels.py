"""Measures channels, lanes and classes: throughput, accuracy of rates, fairness.

    python benchmarks/channels.py [--seconds 1.0] [--rounds 3] [--transport NAME ...] [--json FILE]

1. Throughput of reads and writes of every transport without a rate (`channel_throughput.py`, which measures it alone).
2. Achieved over configured rate: of a lane with four threads contending, and of a channel whose lanes have that rate.
3. The rule of isolation, as `dualpath testbed qos` has it, with lanes of 125 MB/s in place of a kernel: pings and
   all-to-alls idle, beside KV on other lanes, and beside KV on their own, in one class and in two.

The example's transport takes part with ``PYTHONPATH=examples/transport_plugin`` and ``--transport
dualpath_procmem:TRANSPORT``. ``--only isolation`` leaves 1 and 2 out. 3 runs at real-time priority where it may, so
that other jobs don't delay messages.
"""

import argparse
import os
import statistics
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import product

import msgspec
from channel_throughput import (
    Row,
    add_options,
    channel_rate,
    connect,
    kinds_of,
    measure_throughput,
    print_table,
    serving,
)
from rich.console import Console

from dualpath.core.vocabulary import TrafficClass
from dualpath.lab.testbed.expert_traffic import expert_traffic
from dualpath.lab.testbed.qos import PINGS, SETTLE_S
from dualpath.lab.testbed.qos_peer import FLOWS, Exchange, Move, exchange, go_first, move
from dualpath.lab.testbed.qos_report import Phase, QosReport, make_report, times_of
from dualpath.lab.testbed.tables import qos_lines, qos_table
from dualpath.transfer.traffic import TrafficManager
from dualpath.transfer.transport import Channel

HIGH, LOW = TrafficClass.HIGH, TrafficClass.LOW
RATE = 125_000_000
PEERS = 3
ALL_TO_ALL = expert_traffic(RATE, PEERS + 1)
PHASES = ("idle", "elsewhere", "fifo", "classes", "kv alone")


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


def measure_isolation(kinds: Sequence[str], seconds: float, rounds: int) -> list[QosReport]:
    """As `dualpath testbed qos`, but for one rank, whose messages and KV share a process and its lanes.

    All transports go through each phase in turn, round after round.
    """
    go_first()  # before the threads and processes, which inherit it
    with ExitStack() as stack:
        sides = {kind: Side(kind, seconds, stack) for kind in kinds}
        seen: dict[str, dict[str, list[Phase]]] = {kind: {} for kind in kinds}
        for _, name, kind in product(range(rounds), PHASES, kinds):
            seen[kind].setdefault(name, []).append(sides[kind].phase(name))
    return [make_report(kind, RATE, ALL_TO_ALL, seconds, seen[kind]) for kind in kinds]


class Side:
    """A rank and its channels to PEERS others; KV goes to the first, or past the rank's lanes to one more."""

    def __init__(self, kind: str, seconds: float, stack: ExitStack) -> None:
        self._seconds = seconds
        lanes, others = TrafficManager(cnic_bytes_per_s=RATE), TrafficManager(cnic_bytes_per_s=RATE)
        *peers, beside = [stack.enter_context(serving(kind, RATE)).address for _ in range(PEERS + 1)]

        def channels(addresses: Sequence[str], traffic: TrafficManager, traffic_class: TrafficClass) -> list[Channel]:
            made = [connect(kind, one, traffic, traffic_class, f"{n}") for n, one in enumerate(addresses)]
            for channel in made:
                stack.callback(channel.close)
            return made

        self._high, self._low = channels(peers, lanes, HIGH), channels(peers, lanes, LOW)
        self._same, self._other = channels(peers[:1] * FLOWS, lanes, LOW), channels([beside] * FLOWS, others, LOW)

    def phase(self, name: str) -> Phase:
        """In "fifo" messages are of the low class as well."""
        kv = {"idle": None, "elsewhere": self._other}.get(name, self._same)
        messages = self._low if name == "fifo" else self._high
        counted_s = 2 * self._seconds + SETTLE_S
        with ThreadPoolExecutor(1) as thread:
            moving = thread.submit(move, kv, Move(SETTLE_S + counted_s, SETTLE_S)) if kv is not None else None
            time.sleep(SETTLE_S)
            phase, sent_bytes = Phase(name), 0
            if name != "kv alone":
                pings = exchange(messages, Exchange(self._seconds, time.monotonic_ns(), PINGS, (0,)))
                everybody = tuple(range(PEERS))
                all_to_alls = exchange(messages, Exchange(self._seconds, time.monotonic_ns(), ALL_TO_ALL, everybody))
                sent_bytes = pings.sent_bytes + all_to_alls.sent_bytes
                phase = Phase(name, times_of([pings]), times_of([all_to_alls]), sent_bytes / counted_s)
            moved = moving.result() if moving is not None else None
        return msgspec.structs.replace(phase, kv_bytes_per_s=moved.bytes_per_s if moved else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_options(parser)
    parser.add_argument("--only", choices=["isolation"])
    arguments = parser.parse_args()
    kinds, seconds, rounds = kinds_of(arguments), arguments.seconds, arguments.rounds
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before the start")
    result: dict[str, object] = {"cores": os.cpu_count(), "load_before": os.getloadavg()[0]}
    if arguments.only is None:
        result |= {"throughput": (rows := measure_throughput(kinds, seconds, rounds))}
        print_table("Throughput without a rate", rows)
        result |= {"efficiency": (rows := measure_efficiency(kinds, seconds, rounds))}
        print_table("Achieved over configured rate", rows)
    result |= {"isolation": (reports := measure_isolation(kinds, seconds, rounds))}
    for report in reports:
        Console().print(qos_table(report))
        print(*qos_lines(report), sep="\n")
    if arguments.json:
        arguments.json.write_text(msgspec.json.format(msgspec.json.encode(result)).decode() + "\n")


if __name__ == "__main__":
    main()
