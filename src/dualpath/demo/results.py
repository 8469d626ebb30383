"""What the clusters did → the result file: ratios to basic, the ideal, and the balance of the storage NICs."""

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from dualpath.demo.options import DemoOptions
from dualpath.report.result_file import Configuration, ResultFile, Run, Workload
from dualpath.workload import Percentiles, ReplayResult


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One replay on one cluster."""

    topology: str
    system: str
    repeat: int
    replay: ReplayResult
    snic_bytes: dict[str, int]


def assemble(measured: Sequence[Measured], options: DemoOptions, workload: Workload) -> ResultFile:
    """All runs, each set against basic on its topology."""
    return ResultFile(
        runs=[_run(one, measured) for one in measured],
        configuration=Configuration(
            model=str(options.model),
            topologies=list(options.topologies),
            systems=list(options.systems),
            snic_bytes_per_s=options.snic_bytes_per_s,
            cnic_bytes_per_s=options.cnic_bytes_per_s,
            repeats=options.repeats,
            seed=options.seed,
            machine=f"{len(os.sched_getaffinity(0))} cores, {platform.system()} {platform.machine()}, "
            f"Python {platform.python_version()}",
        ),
        command=options.command,
        workload=workload,
    )


def snic_max_over_avg(system: str, snic_bytes: Mapping[str, int]) -> float | None:
    """Over the engines that `system` may read with: one side's for basic ones and de-only, else all of them."""
    side = "PE" if system.startswith("basic") else "DE" if system == "de-only" else ""
    read = [n_bytes for engine, n_bytes in snic_bytes.items() if engine.startswith(side)]
    return max(read) * len(read) / sum(read) if sum(read) else None


def ideal_ratio(topology: str, basic_s: float, oracle_s: float | None) -> float:
    """min((P + D) / P, basic's JCT over oracle's): more NICs can't help beyond their number, nor beyond free I/O."""
    prefill, decode = (int(count) for count in topology.removesuffix("D").split("P"))
    pooled = (prefill + decode) / prefill
    return pooled if oracle_s is None else min(pooled, basic_s / oracle_s)


def _run(one: Measured, measured: Sequence[Measured]) -> Run:
    basic_s, oracle_s = (_median_jct_s(measured, one.topology, system) for system in ("basic", "oracle"))
    jct_s, replay = one.replay.jct_s, one.replay
    # A run that lost turns did less work: its time is compared with nothing, and nothing with its time.
    ratio = None if basic_s is None or replay.failures else basic_s / jct_s
    ideal = None if basic_s is None else ideal_ratio(one.topology, basic_s, oracle_s)
    described = one.system not in ("basic", "oracle")
    return Run(
        topology=one.topology,
        system=one.system,
        repeat=one.repeat,
        jct_s=jct_s,
        ratio_to_basic=ratio,
        ideal_ratio=ideal,
        ratio_to_ideal=ratio / ideal if described and ratio is not None and ideal is not None else None,
        **_p50_p99("ttft", replay.ttft),
        **_p50_p99("ttst", replay.ttst),
        **_p50_p99("tpot", replay.tpot),
        hit_rate=replay.hit_rate,
        snic_max_over_avg=snic_max_over_avg(one.system, one.snic_bytes),
        snic_bytes=one.snic_bytes,
        turns=len(replay.turns),
        retries=replay.retries,
        errors=sum(1 + failure.abandoned_rounds for failure in replay.failures),
        error_messages=[f"{f.trajectory}, turn {f.round_index}: {f.message}" for f in replay.failures[:10]],
        same_tokens_as_basic=_same_tokens(one, measured),
    )


def _median_jct_s(measured: Sequence[Measured], topology: str, system: str) -> float | None:
    """Over the runs that answered every turn; None where there is none."""
    runs = [one.replay for one in measured if (one.topology, one.system) == (topology, system)]
    times_s = [replay.jct_s for replay in runs if not replay.failures]
    return statistics.median_low(times_s) if times_s else None


def _p50_p99(name: str, latency: Percentiles | None) -> dict[str, Any]:
    p50_s, p99_s = (None, None) if latency is None else (latency.p50_s, latency.p99_s)
    return {f"{name}_p50_s": p50_s, f"{name}_p99_s": p99_s}


def _same_tokens(one: Measured, measured: Sequence[Measured]) -> float | None:
    """Share of turns that generated what basic's first run on the same topology did; None for that run itself."""
    basic = next((other for other in measured if (other.topology, other.system) == (one.topology, "basic")), None)
    if basic is None or basic is one or not one.replay.turns:
        return None
    expected = {(turn.trajectory, turn.round_index): turn.output_digest for turn in basic.replay.turns}
    same = sum(expected.get((t.trajectory, t.round_index)) == t.output_digest for t in one.replay.turns)
    return same / len(one.replay.turns)
