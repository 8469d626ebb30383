"""Finds out in the simulator what another order than that of arrival does to a rollout. Nothing of core's is changed.

Every line in which requests wait (for a PE and a DE, for buffer, for a storage NIC, for prefill) is served by *rank*,
smallest first, equal ones by arrival. A storage NIC takes up a better read at once and goes on with the other one later,
as an engine could between two blocks. `RANKS` are the orders; docs/design/request-order.md says what came of them.

Run: ``python benchmarks/request_order.py [CASE ...] [--orders LIST] [--lines LIST] [--seeds N] [--traces DIR]``.
"""

import argparse
import functools
import json
import sys
from collections import OrderedDict
from collections.abc import Callable
from heapq import heappop, heappush
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from dualpath.core.batching import AttentionCost, PrefillQueue
from dualpath.core.ledger import Key, Ledger
from dualpath.core.policy import Policy
from dualpath.core.request import Request
from dualpath.core.vocabulary import BLOCK_TOKENS, EngineFacts, EngineId, NodeId, RequestId, Role, Side
from dualpath.lab.facts.cluster_files import load_cluster
from dualpath.lab.sim.calibration import calibration_for
from dualpath.lab.sim.costs import StepCosts
from dualpath.lab.sim.machine import BatchLimits, Machine, build_machine, constants_for, limits_for
from dualpath.lab.sim.run import without_garbage_collection
from dualpath.lab.sim.simulator import Simulator
from dualpath.lab.sim.storage import Storage
from dualpath.lab.sim.turns import LiveTurn
from dualpath.lab.sim.workloads import agents_of, typical_turn
from dualpath.spec.topology import Topology
from dualpath.traces.arrivals import poisson_arrivals_ns
from dualpath.traces.limits import TraceLimits
from dualpath.traces.sources import load_source
from dualpath.traces.turn_table import Agents, TurnTable

LINES = ("place", "buffer", "read", "prefill")
Order = Callable[[LiveTurn, "Facts"], float]
Rank = Callable[[RequestId], tuple[float, int]]


class Facts(NamedTuple):
    """What an order may look at besides the turn."""

    now: int
    left_ns: list[list[int]]
    """By agent and turn: what it has before it, this turn included, alone on the cluster."""
    guess: list[float]
    """By agent: a factor that an estimate of it is off by."""
    generated: list[int]
    read: list[int]
    busy_ns: list[int]
    """By agent: what it has been served in earlier turns."""


def _pace(turn: LiveTurn, facts: Facts) -> float:
    """Slowest agent first: its time so far over its turns so far."""
    return -(facts.now - turn.agent.start_ns) / max(1, turn.agent.taken)


RANKS: dict[str, Order] = {
    "arrival": lambda turn, facts: 0,
    # What a server can know by itself.
    "fewest-turns": lambda turn, facts: turn.agent.taken,
    "turns-by-4": lambda turn, facts: turn.agent.taken // 4,
    "least-generated": lambda turn, facts: facts.generated[turn.agent.number],
    "least-read": lambda turn, facts: facts.read[turn.agent.number],
    "least-busy": lambda turn, facts: facts.busy_ns[turn.agent.number],
    "turns+context": lambda turn, facts: turn.agent.taken * turn.prompt_tokens,
    "most-turns": lambda turn, facts: -turn.agent.taken,
    "short-context": lambda turn, facts: turn.prompt_tokens,
    "long-context": lambda turn, facts: -turn.prompt_tokens,
    "short-read": lambda turn, facts: turn.hit_tokens,
    "slowest-pace": _pace,
    "oldest-agent": lambda turn, facts: turn.agent.start_ns,
    # What only the client can know, right or about right.
    "longest-left": lambda turn, facts: -facts.left_ns[turn.agent.number][turn.agent.taken],
    "shortest-left": lambda turn, facts: facts.left_ns[turn.agent.number][turn.agent.taken],
    "guess-left": lambda turn, facts: -facts.left_ns[turn.agent.number][turn.agent.taken]
    * facts.guess[turn.agent.number],
}


class OrderedStorage(Storage):
    """Storage NICs that serve the best rank first."""

    def __init__(self, plain: Storage, rank: Rank) -> None:
        vars(self).update(vars(plain))
        self._rank = rank
        self._waiting: list[list[tuple[tuple[float, int], int, list[float], tuple[LiveTurn, Side, int]]]] = [
            [] for _ in self._free_ns
        ]
        self._serving = [0] * len(self._free_ns)
        """Number of the present service; an event of an earlier one comes in vain."""
        self._since_ns = [0] * len(self._free_ns)
        self._number = 0

    def read(self, node: NodeId, n_bytes: int, turn: LiveTurn, side: Side) -> None:
        spent_ns = n_bytes * self._ns_per_byte[node]
        self.busy_ns[node] += spent_ns
        self.read_bytes[node] += n_bytes
        waiting = self._waiting[node]
        if waiting:
            waiting[0][2][0] -= self._events.now - self._since_ns[node]
        self._number += 1
        heappush(waiting, (self._rank(turn.request), self._number, [spent_ns], (turn, side, turn.attempt)))
        self._serve(node)

    def _serve(self, node: NodeId) -> None:
        self._serving[node] += 1
        self._since_ns[node] = now = self._events.now
        if self._waiting[node]:
            left_ns = max(0, int(self._waiting[node][0][2][0]))
            self._events.at(now + left_ns, self._served, (node, self._serving[node]))

    def _served(self, service: tuple[NodeId, int]) -> None:
        node, number = service
        if number == self._serving[node]:
            leg = heappop(self._waiting[node])[3]
            self._events.at(self._events.now + self._latency_ns, self._on_loaded, leg)
            self._serve(node)


def put_in_order(simulator: Simulator, rank: Rank, lines: tuple[str, ...]) -> None:
    """Makes these lines of a simulator that has not begun serve by rank."""
    life = simulator.scheduler.life  # type: ignore[union-attr]
    if "place" in lines:
        _order_placement(life.waiting, rank)
    if "buffer" in lines:
        _order_buffers(life.ledger, rank)
    if "read" in lines and not simulator.policy.free_io:
        simulator.storage = OrderedStorage(simulator.storage, rank)
    if "prefill" in lines:
        for engine in simulator.prefill.engines.values():
            _order_prefill(engine.queue, rank)


def _order_placement(room: Any, rank: Rank) -> None:
    join = room.join

    def join_in_order(request: Request) -> None:
        join(request)
        order = sorted(room.requests, key=rank)
        if order[-1] != request.id:
            # Half-made choices go too: two lines in different orders would wait for each other.
            room.requests = {one: room.requests[one] for one in order}
            room.start_over()

    room.join = join_in_order


def _order_buffers(ledger: Ledger, rank: Rank) -> None:
    line_up = ledger.line_up

    def line_up_in_order(engine: EngineId, key: Key, blocks: int) -> bool:
        granted = line_up(engine, key, blocks)
        if not granted:
            account = ledger.accounts[engine]
            account.line = OrderedDict(sorted(account.line.items(), key=lambda item: rank(item[0][0])))
        return granted

    ledger.line_up = line_up_in_order  # type: ignore[method-assign]


def _order_prefill(queue: PrefillQueue, rank: Rank) -> None:
    push = queue.push

    def push_in_order(request: RequestId, attempt: int, past_tokens: int, new_tokens: int) -> None:
        push(request, attempt, past_tokens, new_tokens)
        queue._lines = dict(sorted(queue._lines.items(), key=lambda item: rank(item[0][0])))

    queue.push = push_in_order  # type: ignore[method-assign]


# ── cases ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Case(NamedTuple):
    """A cluster, its agents, and how they start."""

    machine: Machine
    agents: Agents
    starts_ns: list[int]
    """Empty: all at once."""


SMALL = {
    "token": 214e3, "pair": 323.0, "fixed": 11.6e6, "chunk": 2.8e6,
    "step": 10.1e6, "step_request": 0.95e6, "step_context_token": 3.3e3, "request": 9.9e6,
}  # fmt: skip
LINKS_BYTES_PER_S = 320e6
"""A compute NIC of the small cluster, as `dualpath experiment` has it."""


def small_machine(topology: Topology, snic_bytes_per_s: float) -> Machine:
    """The demo's model on CPUs, as `dualpath profile` measured it on two shared cores."""
    kv_bytes, prefill = 16_384, topology.prefill_engines
    node_of = [node for node, engines in enumerate(topology.sizes) for _ in range(engines)]
    blocks = (2 << 30) // (kv_bytes * BLOCK_TOKENS)
    return Machine(
        name="small",
        engines=tuple(
            EngineFacts(
                engine=number,
                role=Role.PREFILL if number < prefill else Role.DECODE,
                node=node,
                group=int(number >= prefill),
                buffer_blocks=blocks,
                hbm_blocks=0 if number < prefill else blocks,
            )
            for number, node in enumerate(node_of)
        ),
        costs=StepCosts(
            layers=8,
            kv_bytes_per_token=kv_bytes,
            attention=AttentionCost(fixed_ns=0.0, ns_per_flop=1.0, flops_per_token=SMALL["token"], flops_per_pair=SMALL["pair"]),
            ffn_ns_per_token=0.0,
            prefill_floor_ns=0.0,
            prefill_fixed_ns=SMALL["fixed"],
            prefill_chunk_ns=SMALL["chunk"],
            decode_fixed_ns=SMALL["step"],
            decode_request_ns=SMALL["step_request"],
            decode_context_token_ns=SMALL["step_context_token"],
            copy_ns_per_block=0.0,
            loop_steps=0.0,
            request_ns=SMALL["request"],
        ),
        synchronised=False,
        snic_bytes_per_s=(snic_bytes_per_s,) * len(topology.sizes),
        cnic_bytes_per_s=(LINKS_BYTES_PER_S,) * len(node_of),
        read_latency_ns=0,
        prefill_kv_tokens=32_768,
        batches=BatchLimits(quota_ns=0.3e9 * 8, requests=64, kv_tokens=32_768),
        full_speed_engines=2.0,
    )


def recorded(names: list[str], scale: float, cap: int, turns: int | None, gaps: float) -> TurnTable:
    source = load_source(names, TraceLimits(scale=scale, max_context_tokens=cap, max_turns=turns))
    table = TurnTable.from_trajectories([one for agent in source.trajectories for one in agent.contexts()])
    return table.with_gaps(np.minimum((table.gap_ns * gaps), 30e9).astype(np.int64))


def chosen(table: TurnTable, count: int, cap: int, seed: int) -> Agents:
    """`count` of the recorded agents and of those made of them."""
    many = Agents.prepended(table, max(len(table), 2 * count), cap, seed)
    pick = np.random.default_rng([seed, 1]).choice(len(many), count, replace=False)
    return Agents(table, many.template[pick], many.prefix_tokens[pick], many.turns[pick])


def make_case(text: str, traces: Path, seed: int) -> Case:
    """``TRACE:TOPOLOGY:AGENTS[:key=value...]``: snic (bytes/s, or a factor of the preset's), aps, gaps."""
    trace, layout, count, *rest = text.split(":")
    options = dict(one.split("=") for one in rest)
    topology, small = Topology.parse(layout), "x" not in layout
    names = {"weka": [str(traces / "weka-claude-code/sessions")], "miniswe": [str(traces / "lmcache-miniswe")]}
    names["both"] = names["weka"] + names["miniswe"]
    cap = 6144 if small else int(options.get("cap", 65_536))
    if trace in names:
        turns = int(options["turns"]) if "turns" in options else None
        scale = float(options.get("scale", 16 if small else 1))
        agents = chosen(recorded(names[trace], scale, cap, turns, float(options.get("gaps", 0))), int(count), cap, seed)
    else:
        agents = agents_of([trace], int(count), seed=seed)
    if small:
        machine = small_machine(topology, float(options.get("snic", 40e6)))
    else:
        spec = load_cluster(options.get("preset", "ds27b-1p1d"))
        rate = spec.snic_bytes_per_s
        assert not isinstance(rate, tuple)
        spec = msgspec.structs.replace(
            spec, topology=topology, snic_bytes_per_s=rate * float(options.get("snic", 1)),
            dram_buffer_bytes=spec.dram_buffer_bytes * float(options.get("buffer", 1)),
        )  # fmt: skip
        machine = build_machine(spec, calibration_for(spec))
    starts = poisson_arrivals_ns(float(options["aps"]), len(agents), seed).tolist() if "aps" in options else []
    return Case(machine, agents, starts)


def simulator_of(case: Case, policy: Policy) -> Simulator:
    constants = constants_for(case.machine, *typical_turn(case.agents))
    return Simulator(case.machine, policy, constants, limits_for(len(case.agents)))


def alone_ns(case: Case) -> list[list[int]]:
    """By agent and turn: what the agent has before it, this turn included, if it had the cluster to itself."""
    simulator = simulator_of(case, Policy())
    apart_ns = 10**15
    submitted: list[list[int]] = [[] for _ in range(len(case.agents))]
    ends = [0] * len(case.agents)

    def note(turn: LiveTurn) -> None:
        submitted[turn.agent.number].append(turn.submitted_ns)
        ends[turn.agent.number] = simulator.events.now

    simulator.on_turn = note
    simulator.arrive(case.agents, [apart_ns * number for number in range(len(case.agents))])
    with without_garbage_collection():
        simulator.run()
    return [[end - at for at in begun] for begun, end in zip(submitted, ends, strict=True)]


def run(case: Case, order: str, lines: tuple[str, ...], left_ns: list[list[int]], seed: int, sigma: float, bound_s: float) -> dict[str, float]:
    simulator = simulator_of(case, Policy(free_io=order == "no-io"))
    guess = np.exp(np.random.default_rng([seed, 2]).normal(0, sigma, len(case.agents))).tolist()
    ranks: dict[RequestId, tuple[float, int]] = {}
    order_of = RANKS.get(order)
    count = len(case.agents)
    generated, read, busy_ns = [0] * count, [0] * count, [0] * count

    def rank(request: RequestId) -> tuple[float, int]:
        known = ranks.get(request)
        if known is None:
            turn = simulator.lives[request]
            value = order_of(turn, Facts(simulator.events.now, left_ns, guess, generated, read, busy_ns))  # type: ignore[misc]
            known = ranks[request] = (value, request)
        return known

    if order_of is not None and order != "plain":
        put_in_order(simulator, rank, lines)
    ended: dict[int, int] = {}
    waits: list[float] = []

    def note(turn: LiveTurn) -> None:
        agent = turn.agent.number
        ended[agent] = simulator.events.now - turn.agent.start_ns
        generated[agent] += turn.generate_tokens
        read[agent] += turn.hit_tokens
        busy_ns[agent] += simulator.events.now - turn.submitted_ns
        waits.append((turn.first_token_ns - turn.submitted_ns) / 1e9)

    simulator.on_turn = note
    simulator.arrive(case.agents, case.starts_ns or None)
    with without_garbage_collection():
        simulator.run()
    ends_s = np.array(list(ended.values())) / 1e9
    makespan_s = simulator.events.now / 1e9
    p50, p95, last = np.percentile(ends_s, (50, 95, 100))
    ttft = np.array(waits)
    return {
        "makespan_s": makespan_s,
        "p50_s": p50, "p95_s": p95, "max_s": last, "mean_s": ends_s.mean(),
        "ttft_s": ttft.mean(), "ttft_p99_s": np.percentile(ttft, 99), "ttft_max_s": ttft.max(),
        "tokens_per_s": simulator.measured.generated_tokens / makespan_s,
        "snic": sum(simulator.storage.busy_ns) / simulator.events.now / len(simulator.storage.busy_ns),
        "prefill": simulator.prefill.busy_ns / simulator.events.now / len(simulator.prefill.groups),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--orders", default=",".join(RANKS))
    parser.add_argument("--lines", default=",".join(LINES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sigma", type=float, default=1.0)
    parser.add_argument("--traces", type=Path, default=Path("traces"))
    arguments = parser.parse_args()
    lines = tuple(arguments.lines.split(","))
    for text in arguments.cases:
        rows: dict[str, list[dict[str, float]]] = {}
        chains = []
        for seed in range(arguments.seeds):
            case = make_case(text, arguments.traces, seed)
            left_ns = alone_ns(case)
            starts = case.starts_ns or [0] * len(case.agents)
            chains.append(max(start + left[0] for start, left in zip(starts, left_ns)) / 1e9)
            for order in ["plain", *arguments.orders.split(",")]:
                rows.setdefault(order, []).append(run(case, order, lines, left_ns, seed, arguments.sigma, 0))
        print(f"\n{text}  longest chain alone {np.median(chains):.1f} s, turns {case.agents.total_turns()}")
        print(f"{'order':<15}{'makespan':>10}{'vs arrival':>22}{'p50':>9}{'p95':>9}{'max':>9}{'mean':>9}{'TTFT':>8}{'p99':>8}{'max':>8}{'tok/s':>8}{'snic':>6}{'pe':>6}")
        base = np.array([row["makespan_s"] for row in rows["plain"]])
        for order, runs in rows.items():
            ratio = (np.array([row["makespan_s"] for row in runs]) / base - 1) * 100
            mid = {name: float(np.median([row[name] for row in runs])) for name in runs[0]}
            print(
                f"{order:<15}{mid['makespan_s']:>10.1f}{f'{np.median(ratio):+.1f}% ({ratio.min():+.1f}, {ratio.max():+.1f})':>22}"
                f"{mid['p50_s']:>9.1f}{mid['p95_s']:>9.1f}{mid['max_s']:>9.1f}{mid['mean_s']:>9.1f}"
                f"{mid['ttft_s']:>8.2f}{mid['ttft_p99_s']:>8.2f}{mid['ttft_max_s']:>8.2f}{mid['tokens_per_s']:>8.0f}{mid['snic']:>6.0%}{mid['prefill']:>6.0%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
