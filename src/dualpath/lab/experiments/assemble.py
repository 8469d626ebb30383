"""What the clusters did → the result file: ratios to basic, the ideal, and the balance of the storage NICs."""

import os
import platform
import statistics
from collections.abc import Mapping, Sequence

import msgspec

from dualpath.lab.experiments.plan import Plan, PlannedRun
from dualpath.lab.experiments.settings import Settings
from dualpath.lab.report.balance import readers
from dualpath.results.file import Configuration, ResultFile, Run, SnicSample, Workload
from dualpath.results.turns import ReplayResult
from dualpath.spec.cluster_setup import ClusterSetup
from dualpath.spec.topology import Topology
from dualpath.traces.trajectory import Trajectory, totals


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One replay on one cluster."""

    planned: PlannedRun
    replay: ReplayResult
    snic_bytes: dict[str, int]
    snic_samples: list[SnicSample] = []
    cluster: ClusterSetup | None = None


def machine() -> str:
    """Where this runs, and how busy it is before anything is run: jobs that share the cores are in every figure."""
    return (
        f"{len(os.sched_getaffinity(0))} cores, {platform.system()} {platform.machine()}, "
        f"Python {platform.python_version()}, load average of {os.getloadavg()[0]:.1f} from other jobs"
    )


def assemble(measured: Sequence[Measured], plan: Plan, settings: Settings, where: str) -> ResultFile:
    """All runs, each set against basic on its point; `where` is what `machine` said."""
    return ResultFile(
        kind=plan.kind,
        name=plan.name,
        trajectories=plan.trajectories if plan.keep_trajectories else {},
        runs=[_run(one, measured, plan.keep_trajectories) for one in measured],
        configuration=Configuration(
            model=str(settings.model),
            topologies=plan.topologies,
            systems=plan.systems,
            snic_bytes_per_s=settings.snic_bytes_per_s,
            cnic_bytes_per_s=settings.cnic_bytes_per_s,
            repeats=plan.repeats,
            seed=settings.seed,
            machine=where,
        ),
        command=settings.command,
        workload=describe(plan),
    )


def describe(plan: Plan) -> Workload:
    """The workload in figures, without its warm-up: of the largest set of agents where there are several."""
    agents = max(plan.trajectories.values(), key=lambda one: totals(one).prompt_tokens)
    every, first = totals(agents), [next(one.spans()) for one in agents]
    warm_tokens = sum(span.prompt_tokens for span in first)
    return Workload(
        source=plan.source,
        agents=len(agents),
        turns=measured_turns(agents),
        prompt_tokens=every.prompt_tokens - warm_tokens,
        append_tokens=every.append_tokens - warm_tokens,
        generate_tokens=every.generate_tokens - sum(one.rounds[0].generate_tokens for one in agents),
        max_context_tokens=every.max_context_tokens,
        warm_up=f"first turns ({warm_tokens:,} tokens) stored before the clock starts",
    )


def measured_turns(trajectories: Sequence[Trajectory]) -> int:
    """Turns that a replay after the warm-up makes."""
    return totals(trajectories).rounds - len(trajectories)


def snic_max_over_avg(system: str, snic_bytes: Mapping[str, int]) -> float | None:
    """Over the engines that `system` may read with."""
    read = [snic_bytes[engine] for engine in readers(system, list(snic_bytes))]
    return max(read) * len(read) / sum(read) if sum(read) else None


def ideal_ratio(topology: str, basic_s: float, oracle_s: float | None) -> float:
    """min((P + D) / P, basic's JCT over oracle's): more NICs can't help beyond their number, nor beyond free I/O."""
    pooled = Topology.parse(topology).pooled
    return pooled if oracle_s is None else min(pooled, basic_s / oracle_s)


def _run(one: Measured, measured: Sequence[Measured], keep_trajectories: bool) -> Run:
    planned, point, replay = one.planned, one.planned.point, one.replay
    peers = [other for other in measured if other.planned.point == point]
    basic_s, oracle_s = (_median_jct_s(peers, system) for system in ("basic", "oracle"))
    # A run that lost turns did less work: its time is compared with nothing, and nothing with its time.
    ratio = None if basic_s is None or replay.failures else basic_s / replay.jct_s
    ideal = None if basic_s is None else ideal_ratio(point.topology, basic_s, oracle_s)
    described = planned.system not in ("basic", "oracle")
    return Run(
        parameters=point.parameters,
        trajectories=point.agents if keep_trajectories else "",
        first_round=1,
        agents_per_s=point.agents_per_s,
        cluster=one.cluster,
        turn_results=list(replay.turns),
        failures=list(replay.failures),
        snic_samples=one.snic_samples,
        topology=point.topology,
        system=planned.system,
        repeat=planned.repeat,
        jct_s=replay.jct_s,
        ratio_to_basic=ratio,
        ideal_ratio=ideal,
        ratio_to_ideal=ratio / ideal if described and ratio is not None and ideal is not None else None,
        snic_max_over_avg=snic_max_over_avg(planned.system, one.snic_bytes),
        snic_bytes=one.snic_bytes,
        same_tokens_as_basic=_same_tokens(one, peers),
        **replay.figures(),
    )


def _median_jct_s(peers: Sequence[Measured], system: str) -> float | None:
    """Over the runs that answered every turn; None where there is none."""
    times_s = [one.replay.jct_s for one in peers if one.planned.system == system and not one.replay.failures]
    return statistics.median_low(times_s) if times_s else None


def _same_tokens(one: Measured, peers: Sequence[Measured]) -> float | None:
    """Share of turns that generated what basic's first run on the same point did; None for that run itself."""
    basic = next((other for other in peers if other.planned.system == "basic"), None)
    if basic is None or basic is one or not one.replay.turns:
        return None
    expected = {(turn.trajectory, turn.round_index): turn.output_digest for turn in basic.replay.turns}
    same = sum(expected.get((t.trajectory, t.round_index)) == t.output_digest for t in one.replay.turns)
    return same / len(one.replay.turns)
