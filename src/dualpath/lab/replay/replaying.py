"""Replays what a request says, and writes the result file: at the end, and of a search after every probe.

Ctrl-C and SIGTERM leave whole files behind: the journal of all turns that have ended, and of a search the result of all
probes that have.
"""

import asyncio
import contextlib
from collections.abc import Sequence
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
"""Of a server that does not tell."""
SETTLE_S = 2.0
"""Between probes, for a server to drop the requests of the last one."""


def run_replay(request: ReplayRequest, source: Source, console: Console) -> ResultFile:
    """Replay `source`; write ``replay.json`` into `request.out`.

    Raises ReplayError, JournalError, OSError, or KeyboardInterrupt once everything is written that can be.
    """
    request.out.mkdir(parents=True, exist_ok=True)
    if request.find_agents_per_s is not None:
        work = _Search(request, source, console).run()
    else:
        work = _online(request, source, console) if request.online else _offline(request, source, console)
    result = asyncio.run(until_terminated(work))
    write_results(result, request.out / RESULT_FILE)
    return result


async def _offline(request: ReplayRequest, source: Source, console: Console) -> ResultFile:
    options, agents = request.client_options(), source.trajectories
    turns = totals(agents).rounds
    open_journal = Journal.resume if request.resume else Journal.create
    journal = open_journal(request.journal, identity_of(agents, options))
    with contextlib.closing(journal), TurnProgress(console) as progress:
        progress.begin("replay", turns)
        progress.clock_starts()
        try:
            replayed = await replay(request.url, agents, options, on_turn=progress.turn, journal=journal)
        except asyncio.CancelledError:
            done = len(journal.answered) + journal.turns
            again = request.command.replace(" --resume", "")
            console.print(f"{done} of {turns} turns are in {journal.path}; to go on: {again} --resume", highlight=False)
            raise
    return _result(request, source, [_run(request, replayed)], [replayed], {AGENTS: source.trajectories})


async def _online(request: ReplayRequest, source: Source, console: Console) -> ResultFile:
    assert request.agents_per_s is not None
    name = f"{request.agents_per_s:g} APS"
    measured = await _measure(request, source, console, name, request.agents_per_s, "agent", request.journal)
    return _online_result(request, source, [measured], {AGENTS: _arrived(source, measured, "agent")})


async def _measure(
    request: ReplayRequest,
    source: Source,
    console: Console,
    name: str,
    agents_per_s: float,
    prefix: str,
    path: Path,
    probe: bool = False,
) -> OnlineResult:
    """One measurement at a rate; agents are named with `prefix`, and the journal is at `path`."""
    options, window_s = request.client_options(), request.window_s or request.duration_s / WINDOWS
    arrivals = Arrivals(agents_per_s=agents_per_s, duration_s=request.duration_s, window_s=window_s, seed=request.seed)
    journal = Journal.create(path, identity_of(source.trajectories, options))
    with contextlib.closing(journal), TurnProgress(console) as progress:
        progress.begin(name, None)
        progress.clock_starts()
        return await replay_online(
            request.url,
            lambda agent: source.agent(agent, prefix),
            options,
            arrivals,
            request.slo,
            probe=probe,
            on_turn=progress.turn,
            journal=journal,
        )


class _Search:
    """One search for the highest rate: its probes, each with agents of its own."""

    def __init__(self, request: ReplayRequest, source: Source, console: Console) -> None:
        self._request = request
        self._source = source
        self._console = console
        self._probes: list[OnlineResult] = []

    async def run(self) -> ResultFile:
        assert self._request.find_agents_per_s is not None
        capacity, probes = await find_capacity(self._probe, *self._request.find_agents_per_s)
        return msgspec.structs.replace(self._result(probes), capacity=capacity)

    async def _probe(self, number: int, agents_per_s: float) -> OnlineResult:
        request, name, prefix = self._request, f"{agents_per_s:.3g} APS", _prefix(number)
        if number:
            await asyncio.sleep(SETTLE_S)
        path = request.journal.with_stem(f"turns-probe-{number}")
        found = await _measure(request, self._source, self._console, name, agents_per_s, prefix, path, probe=True)
        self._probes.append(found)
        self._say(name, found)
        write_results(self._result(self._probes), request.out / RESULT_FILE)
        return found

    def _result(self, probes: Sequence[OnlineResult]) -> ResultFile:
        agents = {f"probe-{at}": _arrived(self._source, one, _prefix(at)) for at, one in enumerate(probes)}
        return _online_result(self._request, self._source, probes, agents)

    def _say(self, name: str, found: OnlineResult) -> None:
        last = found.windows[-1]
        ttft = "–" if last.ttft_s is None else f"{last.ttft_s:.2f} s"
        tpot = "–" if last.tpot_s is None else f"{last.tpot_s * 1e3:.0f} ms"
        holds = "holds" if found.holds else "does not hold"
        self._console.print(
            f"{name}: {holds} ({found.verdict}) after {found.replay.jct_s:.0f} s and {len(found.replay.turns)} turns; "
            f"last window TTFT {ttft}, TPOT {tpot}",
            highlight=False,
        )


def _prefix(probe: int) -> str:
    return f"probe-{probe}-agent"


def _arrived(source: Source, measured: OnlineResult, prefix: str) -> list[Trajectory]:
    return [source.agent(number, prefix) for number in range(measured.agents)]


def _run(request: ReplayRequest, replayed: ReplayResult, agents: str = AGENTS, **more: Any) -> Run:
    served = replayed.cluster
    return run_of(
        replayed,
        topology=UNKNOWN_TOPOLOGY if served is None else served.topology,
        system=replayed.server if served is None else served.system,
        trajectories=agents,
        gap_scale=request.client_options().gap_scale,
        **more,
    )


def _online_result(
    request: ReplayRequest, source: Source, measured: Sequence[OnlineResult], agents: dict[str, list[Trajectory]]
) -> ResultFile:
    """The result of one measurement, or of every probe of a search."""
    runs = []
    for number, (key, one) in enumerate(zip(agents, measured, strict=True)):
        probe = {} if request.find_agents_per_s is None else {"probe": number}
        runs.append(
            _run(
                request,
                one.replay,
                key,
                parameters={"agents_per_s": one.agents_per_s} | probe,
                agents_per_s=one.agents_per_s,
                windows=list(one.windows),
                verdict=one.verdict,
            )
        )
    return _result(request, source, runs, [one.replay for one in measured], agents)


def _result(
    request: ReplayRequest,
    source: Source,
    runs: list[Run],
    replayed: Sequence[ReplayResult],
    agents: dict[str, list[Trajectory]],
) -> ResultFile:
    """The result file; `agents` are those of each run, under the run's key."""
    setup = runs[0].cluster
    every = [agent for those in agents.values() for agent in those]
    return ResultFile(
        kind="replay",
        name="replay",
        trajectories=agents,
        runs=runs,
        configuration=Configuration(
            model=replayed[0].model,
            topologies=[runs[0].topology],
            systems=[runs[0].system],
            snic_bytes_per_s=None if setup is None else setup.snic_bytes_per_s,
            cnic_bytes_per_s=None if setup is None else setup.cnic_bytes_per_s,
            repeats=1,
            seed=request.seed,
            machine=f"client: {machine()}",
        ),
        command=request.command,
        workload=workload_of(every, source.description, warmed=False),
        slo=request.slo if request.online else None,
    )
