"""Online serving: agents arrive at random, and the server must hold its service levels.

Theory of operation. Agents start by a Poisson process of `agents_per_s` and run their trajectories, pauses included.
Time is cut into windows. After each window, the mean TTFT and the mean TPOT of its turns are compared with the SLO
(paper §9, whose windows are 150 s and are compared with half an hour before)::

    a turn failed                                        → does not hold: errors
    mean TTFT of the window above the SLO                → does not hold: ttft
    mean TPOT of the window above the SLO                → does not hold: tpot
    mean TTFT within 5 % of that `STEADY_WINDOWS` before → holds: steady
    the duration is over                                 → holds: duration

A window of fewer than `MIN_TURNS` turns is extended by its length: one first turn, which has nothing in storage, is no
mean. A turn that still waits for its first token counts with its waiting time once that is above the SLO; otherwise a
server that answers nothing would look idle. A measurement runs for its whole duration and then lets the turns under
way end; a probe (`dualpath.client.capacity`) ends as soon as the answer is known.
"""

import asyncio
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec

from dualpath.client.replay import ReplayError, connected, recorded
from dualpath.client.resume import Journal
from dualpath.client.rollout import OnTurn, ReplayOptions, Rollout
from dualpath.results.online import Slo, Verdict, Window
from dualpath.results.turns import ReplayResult, TurnResult
from dualpath.traces.arrivals import poisson_arrivals_ns
from dualpath.traces.trajectory import Trajectory

STEADY_WINDOWS = 4
STEADY = 0.05
MIN_TURNS = 8
HOLDS: tuple[Verdict, ...] = ("steady", "duration")


class Arrivals(msgspec.Struct, frozen=True, kw_only=True):
    """When agents arrive, and how long they are watched. Raises ValueError."""

    agents_per_s: float
    duration_s: float
    window_s: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 < self.agents_per_s < math.inf and 0 < self.window_s <= self.duration_s < math.inf):
            raise ValueError(
                "agents_per_s must be above 0, and a window above 0 and no longer than the duration, not "
                f"{self.agents_per_s:g}, {self.window_s:g} and {self.duration_s:g}"
            )

    def times_s(self) -> list[float]:
        """Start times of the agents, all before `duration_s`."""
        count = math.ceil(self.agents_per_s * self.duration_s) + 8
        while (times_ns := poisson_arrivals_ns(self.agents_per_s, count, self.seed))[-1] < self.duration_s * 1e9:
            count *= 2
        return [at_ns / 1e9 for at_ns in times_ns.tolist() if at_ns < self.duration_s * 1e9]


class OnlineResult(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a measurement or a probe."""

    replay: ReplayResult
    agents_per_s: float
    agents: int
    """Agents that arrived."""
    windows: tuple[Window, ...]
    verdict: Verdict

    @property
    def holds(self) -> bool:
        return self.verdict in HOLDS


def judge(windows: Sequence[Window], slo: Slo, duration_s: float) -> Verdict | None:
    """Returns the verdict of the windows so far; None if it is too early."""
    last = windows[-1]
    if last.failed:
        return "errors"
    if last.ttft_s is not None and last.ttft_s > slo.ttft_s:
        return "ttft"
    if last.tpot_s is not None and last.tpot_s > slo.tpot_s:
        return "tpot"
    if len(windows) > STEADY_WINDOWS:
        before = windows[-1 - STEADY_WINDOWS]
        if last.ttft_s and before.ttft_s and abs(last.ttft_s - before.ttft_s) <= STEADY * before.ttft_s:
            return "steady"
    return "duration" if last.end_s >= duration_s else None


async def replay_online(
    url: str,
    agent: Callable[[int], Trajectory],
    options: ReplayOptions,
    arrivals: Arrivals,
    slo: Slo,
    *,
    probe: bool = False,
    on_turn: OnTurn | None = None,
    journal: Journal | None = None,
) -> OnlineResult:
    """Lets agents 0, 1, … arrive and watches them. A `probe` stops, turns under way too, once the verdict is known.

    A measurement's verdict is the first that does not hold, otherwise the last. Raises ReplayError.
    """
    times_s = arrivals.times_s()
    if not times_s:
        raise ReplayError(f"no agent arrives within {arrivals.duration_s:g} s; raise the rate or the duration")
    async with connected(url, len(times_s), options) as (client, server), recorded(journal, server):
        run = Rollout(client, server, options, on_turn, journal)
        agents = asyncio.create_task(_arrive(run, agent, times_s))
        watching = asyncio.create_task(_watch(run, arrivals, slo, probe))
        try:
            # Agents may all end before the watch does, but an agent that crashes must be seen at once.
            await asyncio.wait({agents, watching}, return_when=asyncio.FIRST_COMPLETED)
            if agents.done():
                agents.result()
            windows, verdict = await watching
            run.stop()
            if not probe:
                await agents
            return OnlineResult(
                replay=run.result(),
                agents_per_s=arrivals.agents_per_s,
                agents=sum(at_s <= time.perf_counter() - run.started_at_s for at_s in times_s),
                windows=tuple(windows),
                verdict=verdict,
            )
        finally:
            agents.cancel()
            watching.cancel()
            await asyncio.gather(agents, watching, return_exceptions=True)


async def _arrive(run: Rollout, agent: Callable[[int], Trajectory], times_s: Sequence[float]) -> None:
    async with asyncio.TaskGroup() as group:
        for number, at_s in enumerate(times_s):
            due_s = run.started_at_s + at_s
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            group.create_task(run.agent(agent(number), due_s))


async def _watch(run: Rollout, arrivals: Arrivals, slo: Slo, probe: bool) -> tuple[list[Window], Verdict]:
    windows: list[Window] = []
    verdict: Verdict | None = None
    seen = _Seen()
    for number in itertools.count(1):
        end_s = min(number * arrivals.window_s, arrivals.duration_s)
        await asyncio.sleep(max(0.0, run.started_at_s + end_s - time.perf_counter()))
        window = seen.window(run, slo, end_s)
        if window.turns + window.late < MIN_TURNS and not window.failed and end_s < arrivals.duration_s:
            continue
        seen.close(window)
        windows.append(window)
        now = judge(windows, slo, arrivals.duration_s)
        if verdict is None or verdict in HOLDS:
            verdict = now or verdict
        if verdict is not None and (probe or end_s >= arrivals.duration_s):
            return windows, verdict
    raise AssertionError("unreachable: the last window has a verdict")


class _Seen:
    """How far the windows have come in a rollout's lists."""

    def __init__(self) -> None:
        self._turns = 0
        self._failures = 0

    def window(self, run: Rollout, slo: Slo, end_s: float) -> Window:
        """Returns the window from the end of the last one until now."""
        turns, now_s = run.turns[self._turns :], time.perf_counter()
        late_s = [now_s - since_s for since_s in run.waiting_since_s.values() if now_s - since_s > slo.ttft_s]
        return Window(
            end_s=end_s,
            ttft_s=_mean([*(turn.ttft_s for turn in turns), *late_s]),
            tpot_s=_mean(list(_tpots_s(turns))),
            turns=len(turns),
            late=len(late_s),
            failed=len(run.failures) - self._failures,
        )

    def close(self, window: Window) -> None:
        self._turns += window.turns
        self._failures += window.failed


def _tpots_s(turns: Sequence[TurnResult]) -> Iterator[float]:
    return (turn.tpot_s for turn in turns if turn.tpot_s is not None)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
