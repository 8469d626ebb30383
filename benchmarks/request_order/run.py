"""Finds out in the simulator what another order than that of arrival does to a rollout. Nothing of core's is changed.

Every line in which a request waits (`orders.LINES`) is served by *rank*: the smallest first, equal ones by arrival. A
storage NIC takes one leg at a time. docs/design/request-order.md has what came of it.

Run: ``python benchmarks/request_order/run.py --traces DIR [CASE ...]``; ``--help`` has the rest. DIR has folders
``weka`` and ``miniswe`` of recorded agents. In the order ``A/B`` reads are by A and B in turn, all else is by A. A case
is ``TRACE:TOPOLOGY:AGENTS[:KEY=VALUE ...]``. Without an ``x`` in the topology, engines are those of a small machine.
Without cases, all of `CASES` are run.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from orders import IN_TURN, LINES, ORDERS, Books, put_in_order

from dualpath.core.batching import AttentionCost
from dualpath.core.policy import Policy
from dualpath.lab.facts.cluster_files import load_cluster
from dualpath.lab.sim.calibration import calibration_for
from dualpath.lab.sim.costs import StepCosts
from dualpath.lab.sim.machine import BatchLimits, Machine, build_machine, constants_for, limits_for
from dualpath.lab.sim.run import without_garbage_collection
from dualpath.lab.sim.simulator import Simulator
from dualpath.lab.sim.turns import LiveTurn
from dualpath.lab.sim.workloads import agents_of, typical_turn
from dualpath.spec.topology import Topology
from dualpath.traces.arrivals import poisson_arrivals_ns
from dualpath.traces.limits import TraceLimits
from dualpath.traces.sources import load_source
from dualpath.traces.turn_table import Agents, TurnTable

CASES = (
    "both:1P1D:13:turns=8:snic=40e6",
    "both:1P1D:13:turns=8:snic=20e6",
    "both:1P2D:24:turns=8:snic=10e6",
    "weka:1P1D:24:snic=10e6",
    "miniswe:2P2D:24:snic=10e6",
    "weka:1P1Dx8:200:snic=0.05",
    "weka:2P2Dx8:200:snic=0.02",
    "weka:2P2Dx8:400",
    "weka:1P1Dx8:100:snic=0.1:context=150000:buffer=4",
    "weka:1P2Dx8:200:snic=0.05:turns=12:context=150000:buffer=4",
    "miniswe:2P2Dx8:200:snic=0.01",
    "64K:1P1Dx8:60:snic=0.1",
    "32K:1P2Dx8:100:snic=0.1",
    "weka:1P1Dx8:150:snic=0.05:turns=30",
    "miniswe:1P1Dx8:100:snic=0.05",
    "48K:2P2Dx8:100:snic=0.05",
)
"""``snic``: bytes a second on the small machine, else a factor on the preset's; ``context``: where a recording ends;
``turns``: at most so many; ``buffer``: a factor on the preset's; ``aps``: agents a second, which else start at once."""
SMALL = StepCosts(
    layers=8, kv_bytes_per_token=16_384, prefill_fixed_ns=11.6e6, prefill_chunk_ns=2.8e6, decode_fixed_ns=10.1e6,
    decode_request_ns=0.95e6, decode_context_token_ns=3.3e3, request_ns=9.9e6, ffn_ns_per_token=0.0,
    prefill_floor_ns=0.0, copy_ns_per_block=0.0, loop_steps=0.0,
    attention=AttentionCost(fixed_ns=0.0, ns_per_flop=1.0, flops_per_token=214e3, flops_per_pair=323.0),
)  # fmt: skip
"""The demo's model on a CPU thread, as `dualpath profile` measured it."""
SMALL_CORES = 2.0


class Case(NamedTuple):
    machine: Machine
    agents: Agents
    starts_ns: list[int]


def make_case(text: str, traces: Path, seed: int) -> Case:
    trace, layout, count, *rest = text.split(":")
    options = dict(one.split("=") for one in rest)
    small = "x" not in layout
    folders = {"weka": ["weka"], "miniswe": ["miniswe"], "both": ["weka", "miniswe"]}
    if trace in folders:
        context = int(options.get("context", 6144 if small else 65_536))
        turns = int(options["turns"]) if "turns" in options else None
        limits = TraceLimits(scale=16 if small else 1, max_context_tokens=context, max_turns=turns)
        agents = _recorded([str(traces / folder) for folder in folders[trace]], limits, int(count), seed)
    else:
        agents = agents_of([trace], int(count), seed=seed)
    starts = (
        poisson_arrivals_ns(float(options["aps"]), len(agents), seed) if "aps" in options else np.zeros(len(agents))
    )
    machine = _machine(layout, small, float(options.get("snic", 1)), float(options.get("buffer", 1)))
    return Case(machine, agents, starts.astype(np.int64).tolist())


def _recorded(names: list[str], limits: TraceLimits, count: int, seed: int) -> Agents:
    """`count` of the recorded agents, and of those made of them by a round before. They don't pause between turns."""
    source = load_source(names, limits)
    table = TurnTable.from_trajectories([one for agent in source.trajectories for one in agent.contexts()])
    table = table.with_gaps(np.zeros_like(table.gap_ns))
    many = Agents.prepended(table, max(len(table), 2 * count), limits.max_context_tokens, seed)
    pick = np.random.default_rng([seed, 1]).choice(len(many), count, replace=False)
    return Agents(table, many.template[pick], many.prefix_tokens[pick], many.turns[pick])


def _machine(layout: str, small: bool, snic: float, buffer: float) -> Machine:
    spec = load_cluster("ds27b-1p1d")
    spec = msgspec.structs.replace(
        spec, topology=Topology.parse(layout), dram_buffer_bytes=spec.dram_buffer_bytes * buffer
    )
    machine = build_machine(spec, calibration_for(spec))
    if not small:
        return msgspec.structs.replace(
            machine, snic_bytes_per_s=tuple(snic * rate for rate in machine.snic_bytes_per_s)
        )
    return msgspec.structs.replace(
        machine,
        costs=SMALL,
        synchronised=False,
        snic_bytes_per_s=(snic,) * machine.nodes,
        cnic_bytes_per_s=(320e6,) * len(machine.engines),
        batches=BatchLimits(quota_ns=0.3e9 * SMALL.layers, kv_tokens=32_768),
        full_speed_engines=SMALL_CORES,
    )


def _simulator(case: Case, policy: Policy) -> Simulator:
    constants = constants_for(case.machine, *typical_turn(case.agents))
    return Simulator(case.machine, policy, constants, limits_for(len(case.agents)))


def left_alone_ns(case: Case) -> list[list[int]]:
    """By agent and turn: what is before the agent, this turn included, if it has the cluster to itself."""
    simulator, agents = _simulator(case, Policy()), len(case.agents)
    submitted: list[list[int]] = [[] for _ in range(agents)]
    ends_ns = [0] * agents

    def note(turn: LiveTurn) -> None:
        submitted[turn.agent.number].append(turn.submitted_ns)
        ends_ns[turn.agent.number] = simulator.events.now

    simulator.on_turn = note
    simulator.arrive(case.agents, [10**15 * number for number in range(agents)])
    with without_garbage_collection():
        simulator.run()
    return [[end_ns - at_ns for at_ns in turns] for turns, end_ns in zip(submitted, ends_ns, strict=True)]


def run(case: Case, order: str, left_ns: list[list[int]], seed: int, asked: Any) -> dict[str, float]:
    """Simulates a case in one order; ``core``: as core has it. Returns the figures of a row."""
    simulator = _simulator(case, Policy())
    books = Books(simulator, left_ns, asked.sigma, seed)
    if order != "core":
        put_in_order(simulator, [books.rank(one) for one in order.split("/")], tuple(asked.lines.split(",")))
    simulator.arrive(case.agents, case.starts_ns)
    with without_garbage_collection():
        simulator.run()
    measured, makespan_s = simulator.measured, simulator.events.now / 1e9
    assert measured.agents_finished == len(case.agents), measured.failed
    ttft_s, agents_s = np.asarray(measured.ttft_s), np.array(list(books.ended_s.values()))
    return {
        "makespan": makespan_s, "p50": np.median(agents_s), "p95": np.percentile(agents_s, 95), "max": agents_s.max(),
        "mean": agents_s.mean(), "TTFT": ttft_s.mean(), "p99 ": np.percentile(ttft_s, 99), "max ": ttft_s.max(),
        "tok/s": measured.generated_tokens / makespan_s,
        "NIC %": 100 * sum(simulator.storage.busy_ns) / simulator.events.now / case.machine.nodes,
    }  # fmt: skip


def show(text: str, arguments: Any) -> None:
    """Prints a case's table: medians over seeds, and the makespan against core's, seed by seed."""
    orders = ["core", *arguments.orders.split(",")]
    rows: dict[str, list[dict[str, float]]] = {order: [] for order in orders}
    for seed in range(arguments.seeds):
        case = make_case(text, arguments.traces, seed)
        left_ns = left_alone_ns(case)
        for order in orders:
            rows[order].append(run(case, order, left_ns, seed, arguments))
    print(f"\n{text}: {case.agents.total_turns()} turns, the longest agent alone {max(left_ns)[0] / 1e9:.0f} s")
    print(f"{'order':<37}{'vs core: median (least, most)':>31}" + "".join(f"{name:>9}" for name in rows["core"][0]))
    for order, runs in rows.items():
        change = [100 * (one["makespan"] / core["makespan"] - 1) for one, core in zip(runs, rows["core"], strict=True)]
        spread = f"{np.median(change):+.1f}% ({min(change):+.1f}, {max(change):+.1f})"
        figures = "".join(f"{np.median([one[name] for one in runs]):>9.1f}" for name in runs[0])
        print(f"{order:<37}{spread:>31}{figures}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--traces", type=Path, required=True, metavar="DIR")
    parser.add_argument("--orders", default=",".join((*ORDERS, IN_TURN)), metavar="LIST")
    parser.add_argument("--lines", default=",".join(LINES), metavar="LIST", help="lines that are put in order")
    parser.add_argument("--sigma", type=float, default=0.5, metavar="S", help="log standard deviation of an estimate")
    parser.add_argument("--seeds", type=int, default=5, metavar="N")
    arguments = parser.parse_args()
    for text in arguments.cases or CASES:
        show(text, arguments)


if __name__ == "__main__":
    main()
