"""Builds the records of a result file from measurements or simulations: runs with their ratios, and the workload."""

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from dualpath.core.systems import BASELINE
from dualpath.results.cells import Setting, parameters_of
from dualpath.results.file import Run, Workload
from dualpath.results.roles import contenders, oracle_among, readers
from dualpath.results.turns import ReplayResult
from dualpath.spec.topology import Topology
from dualpath.traces.trajectory import Trajectory, totals


def run_of(
    replay: ReplayResult, *, topology: str, system: str, snic_bytes: Mapping[str, int] | None = None, **more: Any
) -> Run:
    """Returns the record of one replay; `more` are further fields of `Run`. `compared` adds what needs other runs."""
    received = dict(snic_bytes or {})
    fields: dict[str, Any] = {
        "turn_results": list(replay.turns),
        "failures": list(replay.failures),
        "topology": topology,
        "system": system,
        "jct_s": replay.jct_s,
        "snic_bytes": received,
        "snic_max_over_avg": snic_max_over_avg(system, received),
        "cluster": None if replay.cluster is None else replay.cluster.setup,
        "context": replay.context,
        "parts": list(replay.parts),
        "start_pacing": replay.start_pacing,
        "pacing": replay.pacing,
    }
    return Run(**(fields | replay.figures() | more))


def compared(runs: Sequence[Run]) -> list[Run]:
    """Returns the runs with their ratios to the baseline and to the ideal, each within its topology and parameters."""
    settings = [Setting(run.topology, tuple(parameters_of(run).items())) for run in runs]
    groups: dict[Setting, list[Run]] = {}
    for run, setting in zip(runs, settings, strict=True):
        groups.setdefault(setting, []).append(run)
    return [_compared(run, groups[setting]) for run, setting in zip(runs, settings, strict=True)]


def snic_max_over_avg(system: str, snic_bytes: Mapping[str, int]) -> float | None:
    """Returns the busiest storage NIC's bytes over the average, of the engines that `system` may read with."""
    read = [snic_bytes[engine] for engine in readers(system, list(snic_bytes))]
    return max(read) * len(read) / sum(read) if sum(read) else None


def pooled(run: Run) -> float:
    """The rate of all storage NICs of the run's cluster over the prefill nodes' alone: (P + D) / P for equal ones."""
    return Topology.parse(run.topology).pooled(None if run.cluster is None else run.cluster.snic_bytes_per_s)


def ideal_ratio(pooled: float, basic_s: float, oracle_s: float | None) -> float:
    """min(pooled, basic's JCT over oracle's): pooling gains at most what the NICs have, and at most free I/O."""
    return pooled if oracle_s is None else min(pooled, basic_s / oracle_s)


def workload_of(agents: Sequence[Trajectory], source: str, *, warmed: bool) -> Workload:
    """Describes what `agents` ask. With `warmed`, first turns come before the clock starts and are not counted."""
    every = totals(agents)
    first = [next(one.spans()) for one in agents] if warmed else []
    warm_tokens = sum(span.prompt_tokens for span in first)
    answered_tokens = sum(one.rounds[0].generate_tokens for one in agents) if warmed else 0
    return Workload(
        source=source,
        agents=len(agents),
        turns=every.rounds - len(first),
        prompt_tokens=every.prompt_tokens - warm_tokens,
        append_tokens=every.append_tokens - warm_tokens,
        generate_tokens=every.generate_tokens - answered_tokens,
        max_context_tokens=every.max_context_tokens,
        warm_up=f"first turns ({warm_tokens:,} tokens) stored before the clock starts" if warmed else "no warm-up",
    )


def machine() -> str:
    """Describes this machine and its load before a run: jobs that share the cores affect every figure."""
    return (
        f"{len(os.sched_getaffinity(0))} cores, {platform.system()} {platform.machine()}, "
        f"Python {platform.python_version()}, load average of {os.getloadavg()[0]:.1f} from other jobs"
    )


def _compared(run: Run, peers: Sequence[Run]) -> Run:
    basic_s = _median_jct_s(peers, BASELINE)
    oracle_s = _median_jct_s(peers, oracle_among(peer.system for peer in peers))
    # A run that lost turns did less work, so it has no ratios and no other run is compared with it.
    ratio = None if basic_s is None or run.errors else basic_s / run.jct_s
    basic = next((peer for peer in peers if peer.system == BASELINE), run)
    ideal = None if basic_s is None else ideal_ratio(pooled(basic), basic_s, oracle_s)
    reached = ratio / ideal if ratio is not None and ideal is not None and contenders([run.system]) else None
    return msgspec.structs.replace(
        run,
        ratio_to_basic=ratio,
        ideal_ratio=ideal,
        ratio_to_ideal=reached,
        same_tokens_as_basic=_same_tokens(run, peers),
    )


def _median_jct_s(peers: Sequence[Run], system: str | None) -> float | None:
    """Median over the runs that answered every turn; None if there is none."""
    times_s = [run.jct_s for run in peers if run.system == system and not run.errors]
    return statistics.median_low(times_s) if times_s else None


def _same_tokens(run: Run, peers: Sequence[Run]) -> float | None:
    """Share of turns whose tokens equal those of the baseline's first run; None for that run itself.

    Also None if nothing was generated: simulated turns have no digests.
    """
    basic = next((peer for peer in peers if peer.system == BASELINE), None)
    told = [turn for turn in run.turn_results if turn.output_digest]
    if basic is None or basic is run or not told:
        return None
    expected = {(turn.trajectory, turn.round_index): turn.output_digest for turn in basic.turn_results}
    return sum(expected.get((turn.trajectory, turn.round_index)) == turn.output_digest for turn in told) / len(told)
