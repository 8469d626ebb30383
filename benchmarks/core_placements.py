"""Measures how many placements per CPU-second core makes, at 12, 144 and 1,152 engines.

A placement is a request's whole life: submit, PE and DE choice, read path, allocation, loads, prefill, decode, finish.
Engines answer at once but decode in turn, so that every DE has work. One turn arrives per second and engine, as in the
paper's largest runs, with its 64K trace's lengths (§9). Run: ``python benchmarks/core_placements.py [--json FILE]``.
"""

import argparse
import json
import random
import time
from collections import deque
from pathlib import Path

from dualpath.core.policy import Constants, Limits
from dualpath.core.scheduler import Scheduler
from dualpath.core.systems import SYSTEMS, find_system
from dualpath.core.vocabulary import (
    BLOCK_TOKENS,
    Command,
    Decode,
    EngineFacts,
    Finish,
    Load,
    Prefill,
    Prepare,
    RequestFacts,
    Role,
)

NODE_ENGINES = 8
DECODING_PER_ENGINE = 4


class Cluster:
    """A scheduler with engines that answer at once, except that decoding ends in order of arrival."""

    def __init__(self, engines: int, system: str) -> None:
        constants = Constants.from_rates(snic_tokens_per_s=1_000_000, prefill_tokens_per_s=20_000)
        self.scheduler = Scheduler(find_system(system).policy, constants, Limits(max_waiting=1 << 20))
        self.decoding: deque[tuple[int, int]] = deque()
        self.finished = 0
        node_engines = min(NODE_ENGINES, engines // 3)
        for engine in range(engines):
            node = engine // node_engines
            role = Role.PREFILL if engine < engines // 3 else Role.DECODE
            blocks = 20_000
            self.scheduler.engine_joined(0, EngineFacts(engine, role, node, node, blocks, blocks))

    def carry_out(self, now: int, command: Command) -> None:
        scheduler = self.scheduler
        match command:
            case Prepare():
                scheduler.prepared(now, command.request, command.attempt)
            case Load():
                scheduler.loaded(now, command.request, command.attempt, command.leg.side)
            case Prefill():
                scheduler.prefill_done(now, command.request, command.attempt)
            case Decode():
                self.decoding.append((command.request, command.attempt))
            case Finish():
                self.finished += 1
            case _:
                raise AssertionError(f"nothing fails here, yet core says {command}")

    def drive(self, now: int) -> None:
        while commands := self.scheduler.take_commands():
            for command in commands:
                self.carry_out(now, command)

    def finish_oldest(self, now: int) -> None:
        request, attempt = self.decoding.popleft()
        self.scheduler.buffer_freed(now, request, attempt, 1)
        self.scheduler.finished(now, request, attempt)
        self.drive(now)


def measure(engines: int, system: str, placements: int, seed: int) -> dict[str, float | int | str]:
    draw = random.Random(seed)
    lengths = [(draw.randrange(2_000, 60_000), draw.randrange(100, 900)) for _ in range(1_000)]
    cluster = Cluster(engines, system)
    gap_ns = 1_000_000_000 // engines
    started = time.process_time()
    now = 0
    for request in range(placements):
        now += gap_ns
        context, append = lengths[request % len(lengths)]
        hit = context // BLOCK_TOKENS * BLOCK_TOKENS
        scheduler = cluster.scheduler
        scheduler.submit(now, RequestFacts(request, 0, context + append, hit, 176))
        wake = scheduler.next_wake()
        if wake is not None and wake <= now:
            scheduler.wake(now)
        cluster.drive(now)
        if len(cluster.decoding) > DECODING_PER_ENGINE * engines:
            cluster.finish_oldest(now)
    now += 1_000_000_000
    cluster.scheduler.wake(now)
    cluster.drive(now)
    while cluster.decoding:
        cluster.finish_oldest(now)
    spent_s = time.process_time() - started
    assert cluster.finished == placements, f"{cluster.finished} of {placements} finished"
    assert not cluster.scheduler.held()
    return {
        "system": system,
        "engines": engines,
        "placements": placements,
        "cpu_s": round(spent_s, 3),
        "placements_per_cpu_s": round(placements / spent_s),
        "fetches": cluster.scheduler.statistics()["fetches"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--placements", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--systems", nargs="+", default=["dualpath", "basic"], choices=list(SYSTEMS.names()))
    arguments = parser.parse_args()
    rows = []
    print(f"{'system':<16}{'engines':>8}{'placements':>12}{'CPU s':>8}{'per CPU-s':>11}{'fetches':>9}")
    for system in arguments.systems:
        for engines in (12, 144, 1_152):
            row = measure(engines, system, arguments.placements, arguments.seed)
            rows.append(row)
            print(
                f"{row['system']:<16}{row['engines']:>8}{row['placements']:>12}{row['cpu_s']:>8.2f}"
                f"{row['placements_per_cpu_s']:>11,}{row['fetches']:>9}"
            )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
