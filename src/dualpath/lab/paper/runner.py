"""Runs the simulations behind the rows, each once, however many rows use it.

Simulations are independent, so they can run on a pool of processes. Each item then runs in a thread that waits for its
own simulations; the first item that needs a simulation starts it. Results don't depend on the number of processes.
"""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from threading import Lock
from typing import Any

import msgspec

from dualpath.lab.facts.cluster_files import load_cluster
from dualpath.lab.paper.steady import LONGEST_S, sustains
from dualpath.lab.sim.calibration import FITTED
from dualpath.lab.sim.costs import Calibration
from dualpath.lab.sim.result import SimulationResult
from dualpath.lab.sim.run import Scenario, finish_scenario, prepare
from dualpath.lab.sim.workloads import agents_of

ONLINE_S = 1800.0
"""Length of an open-ended run at a given rate; its second half is measured."""
BALANCE_WINDOW_S = 10.0
"""Window in which the traffic of storage NICs is compared. The paper does not say."""


class PaperRun(msgspec.Struct, frozen=True, kw_only=True):
    """The parameters that distinguish simulations."""

    preset: str
    system: str
    agents: int
    trace: str = "64K"
    agents_per_s: float | None = None
    duration_s: float | None = None
    append_scale: float = 1.0


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The figures kept of a simulation."""

    result: SimulationResult
    agent_s: float
    """Mean time that an agent spends in the system: mean turns times the mean latency of the measured turns."""
    kv_bytes_per_token: int
    mean_total_tokens: float
    """Mean context at the end of an agent."""


class Runner:
    """Runs and remembers simulations. `scale` shrinks the number of agents of offline runs, `announce` gets the name of
    every new run, `on_done` is called at its end.

    Without a `pool`, simulations run in the caller's thread. With one, they run in its processes, and all methods may
    be called from any thread.
    """

    def __init__(
        self,
        scale: float = 1.0,
        announce: Callable[[str], object] = lambda _: None,
        calibration: Calibration = FITTED,
        pool: Executor | None = None,
        on_done: Callable[[], object] = lambda: None,
    ) -> None:
        if not 0 < scale <= 1:
            raise ValueError(f"scale is {scale}; it must be above 0 and at most 1")
        self.scale = scale
        self.calibration = calibration
        self._announce = announce
        self._on_done = on_done
        self._pool = pool
        self._lock = Lock()
        self._known: dict[Any, Future[Any]] = {}

    @property
    def parallel(self) -> bool:
        return self._pool is not None

    def offline(
        self, preset: str, system: str, agents: int, trace: str = "64K", append_scale: float = 1.0
    ) -> SimulationResult:
        """Starts all agents at once; `simulated_s` is the JCT."""
        scaled = max(8, round(agents * self.scale))
        run = PaperRun(preset=preset, system=system, agents=scaled, trace=trace, append_scale=append_scale)
        return self.run(run).result

    def online(self, preset: str, system: str, agents_per_s: float, duration_s: float = ONLINE_S) -> Outcome:
        """Runs Poisson arrivals of 64K agents."""
        agents = round(agents_per_s * duration_s * 1.2) + 20
        return self.run(
            PaperRun(preset=preset, system=system, agents=agents, agents_per_s=agents_per_s, duration_s=duration_s)
        )

    def sustains(self, preset: str, system: str, agents_per_s: float) -> bool:
        """Whether the SLO holds at this rate of 64K agents, by the paper's protocol (`paper.steady`)."""
        name = f"{preset}, {system}, 64K, {agents_per_s:.3g} agents a second until steady"
        question = (preset, system, agents_per_s)
        return bool(self._once(question, name, _sustains, preset, system, agents_per_s, self.calibration))

    def with_calibration(self, calibration: Calibration) -> "Runner":
        """Returns another runner, with nothing simulated yet."""
        return Runner(self.scale, self._announce, calibration, self._pool, self._on_done)

    def run(self, run: PaperRun) -> Outcome:
        """Returns the outcome, simulated now or before."""
        outcome: Outcome = self._once(run, _name(run), simulate, run, self.calibration)
        return outcome

    def runs(self) -> list[SimulationResult]:
        """Returns every result so far, in the order in which they were requested."""
        return [future.result().result for key, future in self._known.items() if isinstance(key, PaperRun)]

    def _once(self, key: object, name: str, work: Callable[..., Any], *arguments: object) -> Any:
        with self._lock:
            future = self._known.get(key)
            if future is None:
                self._announce(name)
                future = self._known[key] = self._start(work, *arguments)
        return future.result()

    def _start(self, work: Callable[..., Any], *arguments: object) -> "Future[Any]":
        if self._pool is not None:
            future = self._pool.submit(work, *arguments)
            future.add_done_callback(lambda _: self._on_done())
            return future
        future = Future()
        future.set_result(work(*arguments))
        self._on_done()
        return future


def process_pool(jobs: int) -> ProcessPoolExecutor:
    """Makes processes for simulations. They start from a fork server, because the caller may have threads."""
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("forkserver"))


def simulate(run: PaperRun, calibration: Calibration) -> Outcome:
    """Runs one simulation."""
    agents = agents_of([run.trace], run.agents, append_scale=run.append_scale)
    scenario = Scenario(
        cluster=load_cluster(run.preset),
        agents=agents,
        trace=run.trace,
        system=run.system,
        calibration=calibration,
        agents_per_s=run.agents_per_s,
        duration_s=run.duration_s,
        balance_window_s=BALANCE_WINDOW_S,
    )
    simulator = prepare(scenario)
    result = finish_scenario(scenario, simulator)
    table = agents.table
    return Outcome(
        result=result,
        agent_s=float(table.turns.mean()) * result.latency_s.mean,
        kv_bytes_per_token=simulator.machine.costs.kv_bytes_per_token,
        mean_total_tokens=float(table.final_context_tokens.mean()),
    )


def _sustains(preset: str, system: str, agents_per_s: float, calibration: Calibration) -> bool:
    scenario = Scenario(
        cluster=load_cluster(preset),
        agents=agents_of(["64K"], round(agents_per_s * LONGEST_S * 1.2) + 20),
        trace="64K",
        system=system,
        calibration=calibration,
        agents_per_s=agents_per_s,
    )
    return sustains(prepare(scenario))


def _name(run: PaperRun) -> str:
    how = f"{run.agents:,} agents at once" if run.agents_per_s is None else f"{run.agents_per_s:g} agents a second"
    scaled = "" if run.append_scale == 1 else f", appends times {run.append_scale:g}"
    return f"{run.preset}, {run.system}, {run.trace}, {how}{scaled}"
