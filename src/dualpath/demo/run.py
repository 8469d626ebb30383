"""Runs the demo: one warm-up, then every topology under every system with the same agents, then the result file.

Theory of operation. Prefill of the agents' first contexts would drown what is to be seen (reads), and is the same for
all systems. So one cluster, with no rate limits, answers every agent's first turn; its store is the start of all runs::

    warm-up cluster ──► store/warm ──link──► store/run ──► basic    on 1P1D ──► replay turns 1…n ──► NIC bytes, JCT
            │                 └──────link──► store/run ──► dualpath on 1P1D ──► replay turns 1…n ──► …
            └── contexts (the first prompts and what was generated) ──► every replay

Systems alternate within a topology, and repeats go round again, so that a machine that slows down slows all of them.
"""

import asyncio
import shutil
import signal
from collections.abc import Coroutine, Sequence
from typing import Any

import msgspec
from rich.console import Console

from dualpath.demo.options import DemoOptions
from dualpath.demo.results import Measured, assemble
from dualpath.demo.workload import describe, measured_turns
from dualpath.experiment.checkpoint import ensure_checkpoint
from dualpath.experiment.launcher import LocalLauncher
from dualpath.experiment.nic_bytes import settled_nic_bytes
from dualpath.experiment.progress import DemoProgress
from dualpath.experiment.stores import fresh_directory, linked_copy
from dualpath.report.figure import draw
from dualpath.report.result_file import ResultFile
from dualpath.workload import ReplayOptions, Trajectory, replay, warm_up

TOKEN_IDS_BELOW = 256
"""The byte tokens of the demo checkpoint's tokenizer; below the vocabulary of any other."""
WARM_SYSTEM = "dualpath"


class Experiment(msgspec.Struct, frozen=True):
    """One run of the plan."""

    topology: str
    system: str
    repeat: int

    @property
    def name(self) -> str:
        return f"{self.topology} {self.system}" + (f" #{self.repeat + 1}" if self.repeat else "")


def run_demo(options: DemoOptions, trajectories: Sequence[Trajectory], console: Console) -> ResultFile:
    """Run it all; write ``demo.json`` and ``demo.png`` into `options.out`. SIGINT and SIGTERM stop every cluster.

    Raises ClusterError, MetricsError, ReplayError, OSError, or KeyboardInterrupt.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    result = asyncio.run(_until_terminated(_Demo(options, trajectories, console).run()))
    (options.out / "demo.json").write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
    draw(result, options.out / "demo.png")
    return result


def plan(options: DemoOptions) -> list[Experiment]:
    """Every topology and system `options.repeats` times, systems alternating."""
    return [
        Experiment(topology, system, repeat)
        for repeat in range(options.repeats)
        for topology in options.topologies
        for system in options.systems
    ]


class _Demo:
    """One invocation: its directories, its contexts and what has been measured."""

    def __init__(self, options: DemoOptions, trajectories: Sequence[Trajectory], console: Console) -> None:
        self._options = options
        self._trajectories = trajectories
        self._console = console
        self._replay_options = ReplayOptions(
            seed=options.seed, token_ids_below=TOKEN_IDS_BELOW, turn_timeout_s=options.turn_timeout_s
        )
        self._work = options.work / "demo"
        self._logs = options.out / "logs"
        self._launcher = LocalLauncher(
            model=options.model,
            snic_bytes_per_s=options.snic_bytes_per_s,
            cnic_bytes_per_s=options.cnic_bytes_per_s,
            logs=self._logs,
            ready_file=self._work / "ready.json",
            serve_command=options.serve_command,
            start_timeout_s=options.start_timeout_s,
        )

    async def run(self) -> ResultFile:
        options = self._options
        self._logs.mkdir(parents=True, exist_ok=True)
        experiments, turns = plan(options), measured_turns(self._trajectories)
        total_turns = len(self._trajectories) + turns * len(experiments)
        fresh_directory(self._work)
        try:
            await ensure_checkpoint(options.model, self._logs / "checkpoint.log", self._console)
            with DemoProgress(self._console, total_turns) as progress:
                contexts = await self._warm_up(progress)
                measured = [await self._measure(one, contexts, progress) for one in experiments]
        finally:
            shutil.rmtree(self._work, ignore_errors=True)
        return assemble(measured, options, describe(options, self._trajectories))

    async def _warm_up(self, progress: DemoProgress) -> dict[str, list[int]]:
        store = fresh_directory(self._work / "warm")
        progress.begin("warm-up", len(self._trajectories))
        async with self._launcher.cluster(
            "warm-up", self._options.topologies[0], WARM_SYSTEM, store, limited=False
        ) as cluster:
            progress.clock_starts()
            contexts = await cluster.run(
                warm_up(cluster.url, self._trajectories, self._replay_options, on_turn=progress.turn)
            )
            progress.note("writing")
            await cluster.run(settled_nic_bytes(cluster.url))
        progress.note("stored")
        return contexts

    async def _measure(
        self, experiment: Experiment, contexts: dict[str, list[int]], progress: DemoProgress
    ) -> Measured:
        store = linked_copy(self._work / "warm", self._work / "run")
        progress.begin(experiment.name, measured_turns(self._trajectories))
        limited = experiment.system != "oracle"
        async with self._launcher.cluster(
            experiment.name, experiment.topology, experiment.system, store, limited
        ) as cluster:
            before = await cluster.run(settled_nic_bytes(cluster.url))
            progress.clock_starts()
            result = await cluster.run(
                replay(
                    cluster.url,
                    self._trajectories,
                    self._replay_options,
                    contexts=contexts,
                    on_turn=progress.turn,
                )
            )
            progress.note(f"JCT {result.jct_s:.1f} s")
            after = await cluster.run(settled_nic_bytes(cluster.url))
        return Measured(
            topology=experiment.topology,
            system=experiment.system,
            repeat=experiment.repeat,
            replay=result,
            snic_bytes=after.snic_received_since(before),
        )


async def _until_terminated(work: Coroutine[Any, Any, ResultFile]) -> ResultFile:
    """`work`; SIGTERM cancels it as Ctrl-C does, so that its clusters are stopped."""
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
