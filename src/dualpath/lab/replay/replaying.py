"""Runs a replay request and writes the result file: at the end, and in a search after every probe.

Ctrl-C and SIGTERM leave whole files behind: the journal of all ended turns, and in a search the result of all ended
probes.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from dualpath.client.capacity import find_capacity
from dualpath.client.interrupts import until_terminated
from dualpath.client.online import Arrivals, OnlineResult, replay_online
from dualpath.client.replay import replay
from dualpath.client.resume import Journal
from dualpath.client.rollout import identity_of
from dualpath.lab.experiments.progress import TurnProgress
from dualpath.lab.replay.options import WINDOWS, ReplayRequest
from dualpath.results.build import machine, run_of, workload_of
from dualpath.results.file import Configuration, ResultFile, Run, write_results
from dualpath.results.turns import ReplayResult
from dualpath.traces.sources import Source
from dualpath.traces.trajectory import Trajectory, totals

AGENTS = "agents"
RESULT_FILE = "replay.json"
UNKNOWN_TOPOLOGY = "served"
"""Name of a server that does not say what it is."""
SETTLE_S = 2.0
"""Pause between probes, in which a server drops the requests of the last one."""


def run_replay(request: ReplayRequest, source: Source, console: Console) -> ResultFile:
    """Replays `source` and writes ``replay.json`` into `request.out`.

    Raises ReplayError, JournalError, OSError, or KeyboardInterrupt once all that can be written is written.
    """
    request.out.mkdir(parents=True, exist_ok=True)
    result = asyncio.run(until_terminated(_Replay(request, source, console).run()))
    write_results(result, request.out / RESULT_FILE)
    return result


class _Replay:
    """One invocation: a replay, a measurement at one rate, or a search whose probes have agents of their own."""

    def __init__(self, request: ReplayRequest, source: Source, console: Console) -> None:
        self._request = request
        self._options = request.client_options()
        self._source = source
        self._console = console
        self._machine = f"client: {machine()}"
        self._runs: list[Run] = []
        self._agents: dict[str, list[Trajectory]] = {}
        """Trajectories by their run's key."""
        self._model = ""

    async def run(self) -> ResultFile:
        if self._request.find_agents_per_s is not None:
            capacity, _ = await find_capacity(self._probe, *self._request.find_agents_per_s)
            return msgspec.structs.replace(self._result(), capacity=capacity)
        if self._request.agents_per_s is not None:
            name = f"{self._request.agents_per_s:g} APS"
            await self._measure(name, self._request.agents_per_s, AGENTS, "agent", self._request.journal)
        else:
            self._keep(await self._all_at_once(), AGENTS, self._source.trajectories)
        return self._result()

    async def _all_at_once(self) -> ReplayResult:
        request, agents = self._request, self._source.trajectories
        turns = totals(agents).rounds
        open_journal = Journal.resume if request.resume else Journal.create
        journal = open_journal(request.journal, identity_of(agents, self._options))
        with contextlib.closing(journal), self._progress("replay", turns) as progress:
            try:
                return await replay(request.url, agents, self._options, on_turn=progress.turn, journal=journal)
            except asyncio.CancelledError:
                done, again = len(journal.answered) + journal.turns, request.command.replace(" --resume", "")
                told = f"{done} of {turns} turns are in {journal.path}; to continue: {again} --resume"
                self._console.print(told, highlight=False)
                raise

    async def _probe(self, number: int, agents_per_s: float) -> OnlineResult:
        if number:
            await asyncio.sleep(SETTLE_S)
        key, name = f"probe-{number}", f"{agents_per_s:.3g} APS"
        journal = self._request.journal.with_stem(f"turns-{key}")
        found = await self._measure(name, agents_per_s, key, f"{key}-agent", journal, probe=number)
        write_results(self._result(), self._request.out / RESULT_FILE)
        last = found.windows[-1]
        ttft = "–" if last.ttft_s is None else f"{last.ttft_s:.2f} s"
        tpot = "–" if last.tpot_s is None else f"{last.tpot_s * 1e3:.0f} ms"
        holds = "holds" if found.holds else "does not hold"
        self._console.print(
            f"{name}: {holds} ({found.verdict}) after {found.replay.jct_s:.0f} s and {len(found.replay.turns)} turns; "
            f"last window TTFT {ttft}, TPOT {tpot}",
            highlight=False,
        )
        return found

    async def _measure(
        self, name: str, agents_per_s: float, key: str, prefix: str, path: Path, probe: int | None = None
    ) -> OnlineResult:
        """Measures at one rate and keeps the result under `key`. `prefix` names agents; the journal is at `path`."""
        request, source = self._request, self._source
        arrivals = Arrivals(
            agents_per_s=agents_per_s,
            duration_s=request.duration_s,
            window_s=request.window_s or request.duration_s / WINDOWS,
            seed=request.seed,
        )
        journal = Journal.create(path, identity_of(source.trajectories, self._options))
        with contextlib.closing(journal), self._progress(name, None) as progress:
            found = await replay_online(
                request.url,
                lambda agent: source.agent(agent, prefix),
                self._options,
                arrivals,
                request.slo,
                probe=probe is not None,
                on_turn=progress.turn,
                journal=journal,
            )
        varied = {"agents_per_s": found.agents_per_s} | ({} if probe is None else {"probe": probe})
        more = {"agents_per_s": found.agents_per_s, "windows": list(found.windows), "verdict": found.verdict}
        agents = [source.agent(number, prefix) for number in range(found.agents)]
        self._keep(found.replay, key, agents, parameters=varied, **more)
        return found

    @contextlib.contextmanager
    def _progress(self, name: str, turns: int | None) -> Iterator[TurnProgress]:
        with TurnProgress(self._console) as progress:
            progress.begin(name, turns)
            progress.clock_starts()
            yield progress

    def _keep(self, replayed: ReplayResult, key: str, agents: list[Trajectory], **more: Any) -> None:
        served = replayed.cluster
        self._model = replayed.model
        self._agents[key] = agents
        self._runs.append(
            run_of(
                replayed,
                topology=UNKNOWN_TOPOLOGY if served is None else served.topology,
                system=replayed.server if served is None else served.system,
                trajectories=key,
                gap_scale=self._options.gap_scale,
                **more,
            )
        )

    def _result(self) -> ResultFile:
        request, setup = self._request, self._runs[0].cluster
        every = [agent for agents in self._agents.values() for agent in agents]
        return ResultFile(
            kind="replay",
            name="replay",
            trajectories=self._agents,
            runs=self._runs,
            configuration=Configuration(
                model=self._model,
                topologies=[self._runs[0].topology],
                systems=[self._runs[0].system],
                snic_bytes_per_s=None if setup is None else setup.snic_bytes_per_s,
                cnic_bytes_per_s=None if setup is None else setup.cnic_bytes_per_s,
                repeats=1,
                seed=request.seed,
                machine=self._machine,
            ),
            command=request.command,
            workload=workload_of(every, self._source.description, warmed=False),
            slo=request.slo if request.online else None,
        )
