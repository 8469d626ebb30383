"""Replays what the settings say, and writes the result file: at the end, and of a search after every probe.

Ctrl-C and SIGTERM leave whole files behind: the journal of all turns that have ended, and of a search the result of all
probes that have.
"""

import asyncio
import contextlib

import msgspec
from rich.console import Console

from dualpath.client.capacity import find_capacity
from dualpath.client.interrupts import until_terminated
from dualpath.client.online import Arrivals, OnlineResult, replay_online
from dualpath.client.replay import replay
from dualpath.client.resume import Journal
from dualpath.client.rollout import identity_of
from dualpath.lab.replay.progress import ReplayProgress
from dualpath.lab.replay.results import offline_result, online_result
from dualpath.lab.replay.settings import WINDOWS, ReplaySettings
from dualpath.results.file import ResultFile
from dualpath.traces.sources import Source
from dualpath.traces.trajectory import Trajectory, totals

SETTLE_S = 2.0
"""Between probes, for a server to drop the requests of the last one."""


def run_replay(settings: ReplaySettings, source: Source, console: Console) -> ResultFile:
    """Replay `source`; write ``replay.json`` into `settings.out`.

    Raises ReplayError, JournalError, OSError, or KeyboardInterrupt once everything is written that can be.
    """
    settings.out.mkdir(parents=True, exist_ok=True)
    if settings.find_agents_per_s is not None:
        work = _Search(settings, source, console).run()
    else:
        work = _online(settings, source, console) if settings.online else _offline(settings, source, console)
    result = asyncio.run(until_terminated(work))
    _write(settings, result)
    return result


async def _offline(settings: ReplaySettings, source: Source, console: Console) -> ResultFile:
    options, agents = settings.options(), source.trajectories
    turns = totals(agents).rounds
    open_journal = Journal.resume if settings.resume else Journal.create
    journal = open_journal(settings.journal, identity_of(agents, options))
    with contextlib.closing(journal), ReplayProgress(console, "replay", turns) as progress:
        try:
            replayed = await replay(settings.url, agents, options, on_turn=progress.turn, journal=journal)
        except asyncio.CancelledError:
            done = len(journal.answered) + journal.turns
            again = settings.command.replace(" --resume", "")
            console.print(f"{done} of {turns} turns are in {journal.path}; to go on: {again} --resume", highlight=False)
            raise
    return offline_result(settings, source, replayed)


async def _online(settings: ReplaySettings, source: Source, console: Console) -> ResultFile:
    assert settings.agents_per_s is not None
    options, arrivals = settings.options(), _arrivals(settings, settings.agents_per_s)
    journal = Journal.create(settings.journal, identity_of(source.trajectories, options))
    with contextlib.closing(journal), ReplayProgress(console, f"{settings.agents_per_s:g} APS", None) as progress:
        measured = await replay_online(
            settings.url, source.agent, options, arrivals, settings.slo, on_turn=progress.turn, journal=journal
        )
    return online_result(settings, source, [measured], [_arrived(source, measured, "agent")])


class _Search:
    """One search for the highest rate: its probes, each with agents of its own."""

    def __init__(self, settings: ReplaySettings, source: Source, console: Console) -> None:
        self._settings = settings
        self._source = source
        self._console = console
        self._probes: list[OnlineResult] = []

    async def run(self) -> ResultFile:
        assert self._settings.find_agents_per_s is not None
        capacity, probes = await find_capacity(self._probe, *self._settings.find_agents_per_s)
        return msgspec.structs.replace(self._result(probes), capacity=capacity)

    async def _probe(self, number: int, agents_per_s: float) -> OnlineResult:
        settings, source = self._settings, self._source
        if number:
            await asyncio.sleep(SETTLE_S)
        arrivals = _arrivals(settings, agents_per_s)
        path = settings.journal.with_stem(f"turns-probe-{number}")
        journal = Journal.create(path, identity_of(source.trajectories, settings.options()))
        name = f"{agents_per_s:.3g} APS"
        with contextlib.closing(journal), ReplayProgress(self._console, name, None) as progress:
            found = await replay_online(
                settings.url,
                lambda agent: source.agent(agent, _prefix(number)),
                settings.options(),
                arrivals,
                settings.slo,
                probe=True,
                on_turn=progress.turn,
                journal=journal,
            )
        self._probes.append(found)
        self._say(name, found)
        _write(settings, self._result(self._probes))
        return found

    def _result(self, probes: list[OnlineResult]) -> ResultFile:
        trajectories = [_arrived(self._source, one, _prefix(number)) for number, one in enumerate(probes)]
        return online_result(self._settings, self._source, probes, trajectories)

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


def _arrivals(settings: ReplaySettings, agents_per_s: float) -> Arrivals:
    window_s = settings.window_s or settings.duration_s / WINDOWS
    return Arrivals(agents_per_s=agents_per_s, duration_s=settings.duration_s, window_s=window_s, seed=settings.seed)


def _arrived(source: Source, measured: OnlineResult, prefix: str) -> list[Trajectory]:
    return [source.agent(number, prefix) for number in range(measured.agents)]


def _write(settings: ReplaySettings, result: ResultFile) -> None:
    """Whole or not at all."""
    draft = settings.out / "replay.json.tmp"
    draft.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
    draft.replace(settings.out / "replay.json")
