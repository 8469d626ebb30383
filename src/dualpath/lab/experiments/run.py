"""Runs a plan: warm-ups as they are needed, every run on a fresh cluster with a fresh store, results after each run.

Theory of operation. Prefill of the agents' first contexts would drown what is to be seen (reads), and is the same for
all systems. So one cluster, with no rate limits, answers every agent's first turn; its store is the start of all runs::

    warm-up cluster ──► store/warm-0 ──link──► store/run ──► basic    on 1P1D ──► replay turns 1…n ──► bytes, JCT
            │                  └──────link──► store/run ──► dualpath on 1P1D ──► replay turns 1…n ──► …
            └── contexts (the first prompts and what was generated) ──► every replay

Sets of agents that begin alike share a warm-up; its store is removed after the last run that needs it. The result file
is written anew after every run, so an experiment that is interrupted keeps what it has.
"""

import asyncio
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
from rich.console import Console

from dualpath.client.interrupts import until_terminated
from dualpath.client.replay import replay, warm_up
from dualpath.client.rollout import ReplayOptions
from dualpath.core.systems import HEADLINE, system_or_unknown
from dualpath.lab.experiments.assemble import Measured, assemble, machine, measured_turns
from dualpath.lab.experiments.checkpoint import ensure_checkpoint
from dualpath.lab.experiments.launcher import ClusterLauncher, LocalLauncher
from dualpath.lab.experiments.nic_bytes import nic_meter, snic_samples
from dualpath.lab.experiments.plan import Plan, PlannedRun, WarmUp, warm_ups
from dualpath.lab.experiments.progress import RunProgress
from dualpath.lab.experiments.settings import Settings
from dualpath.lab.experiments.stores import fresh_directory, linked_copy
from dualpath.results.file import ResultFile
from dualpath.results.turns import ReplayResult
from dualpath.spec.cluster_setup import ClusterSetup

TOKEN_IDS_BELOW = 256
"""The byte tokens of the demo checkpoint's tokenizer; below the vocabulary of any other."""
WARM_SYSTEM = HEADLINE
MakeLauncher = Callable[[Settings, Path, Path], ClusterLauncher]
"""From the settings, the directory of logs and a directory of its own to work in."""


def local_launcher(settings: Settings, logs: Path, work: Path) -> ClusterLauncher:
    """Clusters on this host."""
    return LocalLauncher(
        model=settings.model,
        snic_bytes_per_s=settings.snic_bytes_per_s,
        cnic_bytes_per_s=settings.cnic_bytes_per_s,
        logs=logs,
        ready_file=work / "ready.json",
        serve_command=settings.serve_command,
        start_timeout_s=settings.start_timeout_s,
    )


def run_plan(
    plan: Plan, settings: Settings, console: Console, make_launcher: MakeLauncher = local_launcher
) -> ResultFile:
    """Run it all; ``NAME.json`` in `settings.out` has the finished runs at any time.

    SIGINT and SIGTERM stop every cluster. Raises ClusterError, MetricsError, ReplayError, OSError, KeyboardInterrupt.
    """
    settings.out.mkdir(parents=True, exist_ok=True)
    return asyncio.run(until_terminated(_Invocation(plan, settings, console, make_launcher).run()))


def result_path(plan_name: str, settings: Settings) -> Path:
    """Where the result file of a plan goes."""
    return settings.out / f"{plan_name}.json"


class _Warm(msgspec.Struct):
    """What a warm-up left."""

    store: Path
    contexts: dict[str, list[int]]


class _Invocation:
    """One invocation: its directories, its warm stores and what has been measured."""

    def __init__(self, plan: Plan, settings: Settings, console: Console, make_launcher: MakeLauncher) -> None:
        self._plan = plan
        self._settings = settings
        self._console = console
        self._replay_options = ReplayOptions(
            seed=settings.seed, token_ids_below=TOKEN_IDS_BELOW, turn_timeout_s=settings.turn_timeout_s, gap_scale=1.0
        )
        self._work = settings.work / plan.name
        self._logs = settings.out / "logs" / plan.name if plan.kind == "experiment" else settings.out / "logs"
        self._launcher = make_launcher(settings, self._logs, self._work)
        used = dict.fromkeys(run.point.agents for run in plan.runs)
        self._warm_ups = warm_ups({key: plan.trajectories[key] for key in used})
        self._warm: dict[int, _Warm] = {}
        self._measured: list[Measured] = []
        self._machine = machine()

    async def run(self) -> ResultFile:
        plan = self._plan
        self._logs.mkdir(parents=True, exist_ok=True)
        turns = sum(len(one.trajectories) for one in self._warm_ups)
        turns += sum(measured_turns(plan.of(run)) for run in plan.runs)
        fresh_directory(self._work)
        try:
            await ensure_checkpoint(self._settings.model, self._logs / "checkpoint.log", self._console)
            with RunProgress(self._console, turns) as progress:
                for index, run in enumerate(plan.runs):
                    warm = await self._warmed(run, progress)
                    self._measured.append(await self._measure(run, warm, progress))
                    self._write()
                    self._forget(index)
        finally:
            shutil.rmtree(self._work, ignore_errors=True)
        return self._result()

    def _result(self) -> ResultFile:
        return assemble(self._measured, self._plan, self._settings, self._machine)

    def _write(self) -> None:
        path = result_path(self._plan.name, self._settings)
        draft = path.with_suffix(".draft")
        draft.write_bytes(msgspec.json.format(msgspec.json.encode(self._result()), indent=2) + b"\n")
        draft.replace(path)

    def _group(self, run: PlannedRun) -> int:
        return next(i for i, one in enumerate(self._warm_ups) if run.point.agents in one.keys)

    def _forget(self, done: int) -> None:
        """Remove the store of the run's warm-up if no later run needs it."""
        group = self._group(self._plan.runs[done])
        if all(self._group(run) != group for run in self._plan.runs[done + 1 :]):
            shutil.rmtree(self._warm.pop(group).store, ignore_errors=True)

    async def _warmed(self, run: PlannedRun, progress: RunProgress) -> _Warm:
        group = self._group(run)
        if group not in self._warm:
            name = "warm-up" if len(self._warm_ups) == 1 else f"warm-up {group + 1} of {len(self._warm_ups)}"
            self._warm[group] = await self._warm_up(name, group, self._warm_ups[group], progress)
        return self._warm[group]

    async def _warm_up(self, name: str, group: int, warm: WarmUp, progress: RunProgress) -> _Warm:
        store = fresh_directory(self._work / f"warm-{group}")
        progress.begin(name, len(warm.trajectories))
        topology = self._plan.topologies[0]
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

    async def _measure(self, run: PlannedRun, warm: _Warm, progress: RunProgress) -> Measured:
        agents, limited = self._plan.of(run), not system_or_unknown(run.system).policy.free_io
        store = linked_copy(warm.store, self._work / "run")
        progress.begin(run.name, measured_turns(agents))
        point = run.point
        async with (
            self._launcher.cluster(run.name, point.topology, run.system, store, limited) as cluster,
            nic_meter(cluster.url) as meter,
        ):
            before = await cluster.run(meter.settled())
            progress.clock_starts()
            async with meter.sampling() as readings:
                work = replay(cluster.url, agents, self._replay_options, contexts=warm.contexts, on_turn=progress.turn)
                result = await cluster.run(work)
                # Its clock starts once it has found the server, which takes a moment, and stops when it returns.
                started_s = time.monotonic() - result.jct_s
            progress.note(f"JCT {result.jct_s:.1f} s")
            after = await cluster.run(meter.settled())
        return Measured(
            planned=run,
            replay=result,
            snic_bytes=after.snic_received_since(before),
            snic_samples=snic_samples(readings, before, started_s),
            cluster=self._setup(result, limited),
        )

    def _setup(self, result: ReplayResult, limited: bool) -> ClusterSetup | None:
        """As the server told it; rates are the launcher's, which may have the kernel keep them."""
        if result.cluster is None:
            return None
        return msgspec.structs.replace(
            result.cluster.setup,
            snic_bytes_per_s=self._settings.snic_bytes_per_s if limited else None,
            cnic_bytes_per_s=self._settings.cnic_bytes_per_s if limited else None,
            links=self._launcher.links,
        )
