"""Measures copies between host memory and a GPU, by memcpy and through the NIC's loop, and what messages feel of them.

    python benchmarks/device_copies.py [--seconds 0.1] [--rounds 5] [--only submission|messages] [--json FILE]

**Nothing of this has been run on a GPU.** Without one, device memory is host memory and both ways are a core that
copies: figures then say what each way costs that core, and nothing of a NIC. Two parts, each with its ways in turn in
every round; medians and quartiles of the rounds:

* *submission*: CPU time of the submitting thread for a descriptor (a Layer Block at a random place), until the call
  returns, and with the wait for the end; and GB/s of wall time. ``memcpy`` is torch's ``copy_`` (`cudaMemcpyAsync` of
  pinned memory, a call a descriptor), ``cnic`` one NIXL transfer a batch. Without a GPU both have copied on return.
* *messages*: round trips of a small message through the NIC's loop in the high class, host to device and back, alone
  and beside another process that copies all it can: by memcpy, through the NIC in KV's class, and in the messages' own.
  A ratio is to "alone" in the same round. Without an RDMA NIC there are no classes.

What to expect on a GPU with its NIC. The paper (§5) gives 5 to 7 µs for submitting one `cudaMemcpyAsync`, and about
1 µs for an RDMA write, less in a batch. So memcpy should take about 6 µs a descriptor at any batch, and ``cnic`` more
than that alone but 1 to 2 µs in batches of 64 and more, which share NIXL's and our own work for a transfer. GB/s of
both should come near the slower of PCIe and the NIC at 256 KiB. Messages beside ``cnic`` should stay near 1.0 where the
fabric keeps the classes (docs/how-to/fabric.md), and wait in "cnic, one class". See first, with UCX_PROTO_INFO=y, that
puts to CUDA memory go by ``rc``.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
import torch
from channel_throughput import print_table
from torch import Tensor

from dualpath.core.vocabulary import TrafficClass
from dualpath.transfer.transports.nixl.agent import LIBRARIES, Agent, Pieces
from dualpath.transfer.transports.nixl.loop import UCX_OPTIONS, Loop

BATCHES = (1, 8, 64, 512)
BLOCK_KIB = (4, 64, 256)
MESSAGE_BYTES = 4096
COPIED_KIB, COPIED_BATCH = 256, 64
"""Of the process that copies all it can."""
WAYS = ("memcpy", "cnic")
BESIDE = ("alone", "memcpy", "cnic", "cnic, one class")
RDMA = Path("/sys/class/infiniband")
GPU = 0 if torch.cuda.is_available() else None
Row = dict[str, object]


class Blocks:
    """As many blocks of host memory as of the device's."""

    def __init__(self, blocks: int, block_bytes: int) -> None:
        self.host = torch.ones((blocks, block_bytes), dtype=torch.uint8, pin_memory=GPU is not None)
        self.device = torch.zeros(
            (blocks, block_bytes), dtype=torch.uint8, device="cpu" if GPU is None else f"cuda:{GPU}"
        )
        self._hosts, self._devices = list(self.host), list(self.device)

    def drawn(self, batch: int) -> list[tuple[Tensor, Tensor]]:
        """A batch of pairs, host's and device's, at random places."""
        count = len(self._hosts)
        pairs = zip(random.sample(range(count), batch), random.sample(range(count), batch), strict=True)
        return [(self._hosts[near], self._devices[far]) for near, far in pairs]


class Memcpy:
    """torch's copies, on a stream of their own where there is a GPU."""

    def __init__(self, _blocks: Blocks, _traffic_class: TrafficClass = TrafficClass.LOW) -> None:
        self._stream = None if GPU is None else torch.cuda.Stream(GPU)  # type: ignore[no-untyped-call]

    def submit(self, to_device: bool, pairs: Sequence[tuple[Tensor, Tensor]]) -> int:
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            for host, device in pairs:
                to, source = (device, host) if to_device else (host, device)
                to.copy_(source, non_blocking=True)
        return 0

    def wait(self, _number: int) -> None:
        if self._stream is not None:
            self._stream.synchronize()


class Cnic:
    """Through the NIC's loop."""

    def __init__(self, blocks: Blocks, traffic_class: TrafficClass = TrafficClass.LOW) -> None:
        self._blocks = blocks  # for as long as they are registered
        self._loop = Loop(traffic_class)
        self._loop.register(blocks.host.data_ptr(), blocks.host.nbytes)
        self._loop.register(blocks.device.data_ptr(), blocks.device.nbytes, GPU)
        self.wait = self._loop.wait

    def submit(self, to_device: bool, pairs: Sequence[tuple[Tensor, Tensor]]) -> int:
        copies = [(host.data_ptr(), device.data_ptr(), host.nbytes) for host, device in pairs]
        return self._loop.submit(to_device, copies, GPU)


# ── submission ──────────────────────────────────────────────────────────────────────────────────────────────────────


def measure_submission(rounds: int, seconds: float, ways: Sequence[str]) -> list[Row]:
    made: dict[tuple[int, str], tuple[Blocks, Memcpy | Cnic]] = {}
    for kib in BLOCK_KIB:
        blocks = Blocks(max(BATCHES), kib * 1024)
        made |= {(kib, way): (blocks, (Memcpy if way == "memcpy" else Cnic)(blocks)) for way in ways}
    samples: dict[tuple[int, int, bool, str], list[tuple[float, float, float]]] = {}
    for number in range(rounds):
        progress(f"submission: round {number + 1} of {rounds}")
        for kib, batch, to_device, way in product(BLOCK_KIB, BATCHES, (True, False), ways):
            taken = _costs(*made[kib, way], to_device, batch, seconds)
            samples.setdefault((kib, batch, to_device, way), []).append(taken)
    return [_row(*key, *zip(*taken, strict=True)) for key, taken in samples.items()]


def _row(
    kib: int,
    batch: int,
    to_device: bool,
    way: str,
    submit_us: Sequence[float],
    whole_us: Sequence[float],
    rates: Sequence[float],
) -> Row:
    facts: Row = {"KiB": kib, "batch": batch, "to": "device" if to_device else "host", "way": way}
    return facts | spread("submit µs", submit_us) | spread("CPU µs", whole_us) | {"GB/s": statistics.median(rates)}


def _costs(
    blocks: Blocks, way: Memcpy | Cnic, to_device: bool, batch: int, seconds: float
) -> tuple[float, float, float]:
    """Returns CPU µs a descriptor until submitted, and until over, and GB/s; of at least three batches."""
    taken: list[tuple[int, int]] = []
    moved_bytes, begun_s = 0, time.perf_counter()
    copied_s = 0.0
    while len(taken) < 3 or time.perf_counter() - begun_s < seconds:
        pairs = blocks.drawn(batch)
        began_s, began_ns = time.perf_counter(), time.thread_time_ns()
        number = way.submit(to_device, pairs)
        submitted_ns = time.thread_time_ns() - began_ns
        way.wait(number)
        taken.append((submitted_ns, time.thread_time_ns() - began_ns))
        copied_s += time.perf_counter() - began_s
        moved_bytes += batch * pairs[0][0].nbytes
    submit_us, whole_us = (statistics.median(one) / 1000 / batch for one in zip(*taken, strict=True))
    return submit_us, whole_us, moved_bytes / copied_s / 1e9


# ── messages ────────────────────────────────────────────────────────────────────────────────────────────────────────


def measure_messages(rounds: int, seconds: float, ways: Sequence[str]) -> list[Row]:
    beside = [one for one in BESIDE if one == "alone" or one.partition(",")[0] in ways]
    samples: dict[str, list[tuple[float, float]]] = {one: [] for one in beside}
    trips = RoundTrips()
    for number in range(rounds):
        progress(f"messages: round {number + 1} of {rounds}")
        for one in beside:
            with nullcontext() if one == "alone" else copying(one):
                samples[one].append(trips.measure(seconds))
    rows = []
    for one, taken in samples.items():
        ratios = [here[0] / alone[0] for here, alone in zip(taken, samples["alone"], strict=True)]
        p50, p99 = zip(*taken, strict=True)
        rows.append({"beside": one} | spread("p50 µs", p50) | spread("p99 µs", p99) | spread("p50 / alone", ratios))
    return rows


class RoundTrips:
    """A message from the host to the device and back. Polls, as collectives do."""

    def __init__(self) -> None:
        self._blocks = blocks = Blocks(1, MESSAGE_BYTES)
        self._agent = Agent(TrafficClass.HIGH, False, ucx_options=UCX_OPTIONS)
        self._agent.meet_itself()
        self._near = self._registered(blocks.host, None)
        self._far = self._registered(blocks.device, GPU)

    def _registered(self, memory: Tensor, gpu: int | None) -> Pieces:
        self._agent.register(memory.data_ptr(), memory.nbytes, gpu)
        table = np.array([[memory.data_ptr(), memory.nbytes, gpu or 0]], np.uint64)
        return Pieces(table, "DRAM" if gpu is None else "VRAM")

    def measure(self, seconds: float) -> tuple[float, float]:
        """Returns p50 and p99 in µs."""
        taken_us: list[float] = []
        end_s = time.perf_counter() + seconds
        while len(taken_us) < 3 or time.perf_counter() < end_s:
            began_ns = time.perf_counter_ns()
            for is_write in (True, False):
                number = self._agent.transfer(is_write, self._near, self._far)
                while not self._agent.is_done(number):
                    pass
            taken_us.append((time.perf_counter_ns() - began_ns) / 1000)
        return statistics.median(taken_us), statistics.quantiles(taken_us, n=100)[98]


@contextmanager
def copying(way: str) -> Iterator[None]:
    """Another process copies all it can."""
    command = [sys.executable, __file__, "--copy", way]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            if not process.stdout.readline():
                raise SystemExit(f"the process that copies by {way} has ended; it said why above")
            yield
        finally:
            process.kill()


def copy_for_ever(way: str) -> None:
    blocks = Blocks(2 * COPIED_BATCH, COPIED_KIB * 1024)
    traffic_class = TrafficClass.HIGH if "one class" in way else TrafficClass.LOW
    copies = (Memcpy if way == "memcpy" else Cnic)(blocks, traffic_class)
    print("copies", flush=True)
    while True:
        for to_device in (True, False):
            copies.wait(copies.submit(to_device, blocks.drawn(COPIED_BATCH)))


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────────────


def spread(name: str, values: Sequence[float]) -> Row:
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return {name: statistics.median(ordered), f"{name} q": f"{ordered[quarter]:.2f}-{ordered[-1 - quarter]:.2f}"}


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def ways_here() -> list[str]:
    """Returns what can be measured, and says what can't."""
    if not any(map(find_spec, LIBRARIES)):
        progress("Without NIXL (pip install 'dualpath[nixl]') there is no loop: memcpy alone, and no messages.")
        return ["memcpy"]
    if GPU is None:
        progress("No CUDA device: device memory is host memory here, and figures are what each way costs a core.")
    elif not any(RDMA.glob("*")):
        progress(f"{RDMA} shows no RDMA NIC, so a loop would not pass one: memcpy alone, and no messages.")
        return ["memcpy"]
    return list(WAYS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.1, help="length of one measurement (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--only", choices=("submission", "messages"), help="one part (default: both)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here as well")
    parser.add_argument("--copy", choices=BESIDE[1:], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.copy:
        return copy_for_ever(arguments.copy)
    device = "none" if GPU is None else torch.cuda.get_device_name(GPU)
    result: Row = {
        "gpu": device,
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "torch": torch.__version__,
    }
    ways = ways_here()
    for part, measure in (("submission", measure_submission), ("messages", measure_messages)):
        if arguments.only in (None, part) and (part == "submission" or "cnic" in ways):
            rows = measure(arguments.rounds, arguments.seconds, ways)
            print_table(f"{part} (GPU: {device}; load {result['load_before']:.1f} before the start)", rows)
            result[part] = rows
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return None


if __name__ == "__main__":
    main()
