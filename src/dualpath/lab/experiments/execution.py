"""Runs a series: every run gets a fresh cluster and a fresh, warm store; results are written after each run.

Theory of operation. Prefill of the agents' first contexts would hide the reads that are to be seen, and is the same for
all systems. So one cluster, without rate limits, answers every agent's first turn; all runs start from its store::

    warm-up cluster ──► store/warm-0 ──link──► store/run ──► basic    on 1P1D ──► replay turns 1…n ──► bytes, JCT
            │                  └──────link──► store/run ──► dualpath on 1P1D ──► replay turns 1…n ──► …
            └── contexts (the first prompts and what was generated) ──► every replay

Sets of agents that begin alike share a warm-up; its store is removed after the last run that needs it. The result file
is rewritten after every run, so an interrupted experiment keeps its finished runs.
"""

import asyncio
import shutil
import time
from pathlib import Path

import msgspec
from rich.console import Console

from dualpath.client.interrupts import until_terminated
from dualpath.client.replay import replay, warm_up
from dualpath.client.rollout import ReplayOptions
from dualpath.core.systems import HEADLINE
from dualpath.lab.experiments.conditions import Bench
from dualpath.lab.experiments.local_cluster import LocalLauncher, MakeLauncher
from dualpath.lab.experiments.nic_bytes import nic_meter, snic_samples
from dualpath.lab.experiments.preparation import ensure_checkpoint, fresh_directory, linked_copy
from dualpath.lab.experiments.progress import TurnProgress
from dualpath.lab.experiments.series import PlannedRun, Series, WarmUp, measured_turns, warm_ups
from dualpath.results.build import compared, machine, run_of, workload_of
from dualpath.results.file import Configuration, ResultFile, Run, write_results
from dualpath.results.roles import is_oracle
from dualpath.results.turns import ReplayResult
from dualpath.spec.cluster_setup import ClusterSetup
from dualpath.traces.trajectory import totals

WARM_SYSTEM = HEADLINE


def run_series(
    series: Series, bench: Bench, console: Console, make_launcher: MakeLauncher = LocalLauncher
) -> ResultFile:
    """Runs the whole series; ``NAME.json`` in `bench.out` has the finished runs at any time.

    SIGINT and SIGTERM stop every cluster. Raises LaunchError, MetricsError, ReplayError, OSError, KeyboardInterrupt.
    """
    bench.out.mkdir(parents=True, exist_ok=True)
    return asyncio.run(until_terminated(_Invocation(series, bench, console, make_launcher).run()))


def result_path(name: str, out: Path) -> Path:
    """Returns the path of a series' result file."""
    return out / f"{name}.json"


def result_of(runs: list[Run], series: Series, bench: Bench, where: str) -> ResultFile:
    """Makes the result file of finished `runs`. Its workload is the largest set of agents; `where` is the machine."""
    conditions = series.conditions
    largest = max(series.trajectories.values(), key=lambda agents: totals(agents).prompt_tokens)
    return ResultFile(
        kind=series.kind,
        name=series.name,
        trajectories=series.trajectories,
        runs=compared(runs),
        configuration=Configuration(
            model=str(bench.model),
            topologies=list(conditions.topologies),
            systems=list(conditions.systems),
            snic_bytes_per_s=conditions.snic_bytes_per_s,
            cnic_bytes_per_s=conditions.cnic_bytes_per_s,
            repeats=bench.repeats,
            seed=bench.seed,
            machine=where,
        ),
        command=bench.command,
        workload=workload_of(largest, conditions.source, warmed=True),
    )


class _Warm(msgspec.Struct):
    """What a warm-up left behind."""

    store: Path
    contexts: dict[str, list[int]]


class _Invocation:
    """One invocation: its directories, its warm stores and its measurements."""

    def __init__(self, series: Series, bench: Bench, console: Console, make_launcher: MakeLauncher) -> None:
        self._series = series
        self._bench = bench
        self._console = console
        self._replay_options = ReplayOptions(seed=bench.seed, gap_scale=1.0)
        self._work = bench.work / series.name
        self._logs = bench.out / "logs" / series.name
        self._launcher = make_launcher(series.conditions, bench, self._logs, self._work)
        self._warm_ups = warm_ups(series.trajectories)
        self._warm: dict[int, _Warm] = {}
        self._runs: list[Run] = []
        self._machine = machine()

    async def run(self) -> ResultFile:
        series = self._series
        self._logs.mkdir(parents=True, exist_ok=True)
        turns = sum(len(one.trajectories) for one in self._warm_ups)
        turns += sum(measured_turns(series.agents_of(run)) for run in series.runs)
        fresh_directory(self._work)
        try:
            await ensure_checkpoint(self._bench.model, self._logs / "checkpoint.log", self._console)
            with TurnProgress(self._console, turns) as progress:
                for index, run in enumerate(series.runs):
                    warm = await self._warmed(run, progress)
                    self._runs.append(await self._measure(run, warm, progress))
                    write_results(self._result(), result_path(series.name, self._bench.out))
                    self._forget(index)
        finally:
            shutil.rmtree(self._work, ignore_errors=True)
        return self._result()

    def _result(self) -> ResultFile:
        return result_of(self._runs, self._series, self._bench, self._machine)

    def _group(self, run: PlannedRun) -> int:
        return next(i for i, one in enumerate(self._warm_ups) if run.agents in one.keys)

    def _forget(self, done: int) -> None:
        """Removes the store of the run's warm-up if no later run needs it."""
        group = self._group(self._series.runs[done])
        if all(self._group(run) != group for run in self._series.runs[done + 1 :]):
            shutil.rmtree(self._warm.pop(group).store, ignore_errors=True)

    async def _warmed(self, run: PlannedRun, progress: TurnProgress) -> _Warm:
        group = self._group(run)
        if group not in self._warm:
            name = "warm-up" if len(self._warm_ups) == 1 else f"warm-up {group + 1} of {len(self._warm_ups)}"
            self._warm[group] = await self._warm_up(name, group, self._warm_ups[group], progress)
        return self._warm[group]

    async def _warm_up(self, name: str, group: int, warm: WarmUp, progress: TurnProgress) -> _Warm:
        store = fresh_directory(self._work / f"warm-{group}")
        progress.begin(name, len(warm.trajectories))
        topology = self._series.conditions.topologies[0]
        async with self._launcher.cluster(name, topology, WARM_SYSTEM, store, limited=False) as cluster:
            progress.clock_starts()
            contexts = await cluster.run(
                warm_up(cluster.url, warm.trajectories, self._replay_options, on_turn=progress.turn)
            )
            progress.note("writing")
            async with nic_meter(cluster.url) as meter:
                await cluster.run(meter.settled())
        progress.note("stored")
        return _Warm(store, contexts)

    async def _measure(self, run: PlannedRun, warm: _Warm, progress: TurnProgress) -> Run:
        agents, limited = self._series.agents_of(run), not is_oracle(run.system)
        store = linked_copy(warm.store, self._work / "run")
        progress.begin(run.name, measured_turns(agents))
        async with (
            self._launcher.cluster(run.name, run.topology, run.system, store, limited) as cluster,
            nic_meter(cluster.url) as meter,
        ):
            before = await cluster.run(meter.settled())
            progress.clock_starts()
            async with meter.sampling() as readings:
                work = replay(cluster.url, agents, self._replay_options, contexts=warm.contexts, on_turn=progress.turn)
                result = await cluster.run(work)
                # The replay's clock starts once it has found the server, a moment later, and stops when it returns.
                started_s = time.monotonic() - result.jct_s
            progress.note(f"JCT {result.jct_s:.1f} s")
            after = await cluster.run(meter.settled())
        return run_of(
            result,
            topology=run.topology,
            system=run.system,
            repeat=run.repeat,
            parameters=run.parameters,
            agents_per_s=run.agents_per_s,
            trajectories=run.agents,
            first_round=1,
            snic_bytes=after.snic_received_since(before),
            snic_samples=snic_samples(readings, before, started_s),
            cluster=self._setup(result, limited),
        )

    def _setup(self, result: ReplayResult, limited: bool) -> ClusterSetup | None:
        """Returns the setup that the server reports; rates are the launcher's, because the kernel may keep them."""
        if result.cluster is None:
            return None
        conditions = self._series.conditions
        return msgspec.structs.replace(
            result.cluster.setup,
            snic_bytes_per_s=conditions.snic_bytes_per_s if limited else None,
            cnic_bytes_per_s=conditions.cnic_bytes_per_s if limited else None,
            links=self._launcher.links,
        )
