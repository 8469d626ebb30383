"""The simulations behind the rows: each is run once, however many rows it appears in."""

from collections.abc import Callable

import msgspec

from dualpath.paper.steady import LONGEST_S, sustains
from dualpath.sim.calibration import FITTED
from dualpath.sim.costs import Calibration
from dualpath.sim.result import SimulationResult
from dualpath.sim.run import Scenario, finish_scenario, prepare
from dualpath.sim.workloads import agents_of
from dualpath.spec.cluster import load_cluster

ONLINE_S = 1800.0
"""Length of an open-ended run at a given rate; its second half is measured."""
BALANCE_WINDOW_S = 10.0
"""Over which the traffic of storage NICs is compared. The paper does not say."""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """What distinguishes one simulation from another."""

    preset: str
    system: str
    agents: int
    trace: str = "64K"
    agents_per_s: float | None = None
    duration_s: float | None = None
    append_scale: float = 1.0


class Runner:
    """Runs and remembers. `scale` shrinks the number of agents of offline runs, `announce` hears of every new run."""

    def __init__(
        self,
        scale: float = 1.0,
        announce: Callable[[str], object] = lambda _: None,
        calibration: Calibration = FITTED,
    ) -> None:
        if not 0 < scale <= 1:
            raise ValueError(f"scale is {scale}; it must be above 0 and at most 1")
        self.scale = scale
        self.calibration = calibration
        self._announce = announce
        self._results: dict[Run, SimulationResult] = {}
        self.working_sets: dict[Run, float] = {}
        """Bytes of KV of the agents in the system, in the mean over an online run's second half."""

    def offline(
        self, preset: str, system: str, agents: int, trace: str = "64K", append_scale: float = 1.0
    ) -> SimulationResult:
        """All agents at once; `simulated_s` is the JCT."""
        scaled = max(8, round(agents * self.scale))
        return self.run(Run(preset=preset, system=system, agents=scaled, trace=trace, append_scale=append_scale))

    def online(self, preset: str, system: str, agents_per_s: float, duration_s: float = ONLINE_S) -> SimulationResult:
        """Poisson arrivals of 64K agents."""
        agents = round(agents_per_s * duration_s * 1.2) + 20
        return self.run(
            Run(preset=preset, system=system, agents=agents, agents_per_s=agents_per_s, duration_s=duration_s)
        )

    def sustains(self, preset: str, system: str, agents_per_s: float) -> bool:
        """Whether the SLO holds at such a rate of 64K agents, by the paper's protocol (`paper.steady`)."""
        self._announce(f"{preset}, {system}, 64K, {agents_per_s:.3g} agents a second until steady")
        scenario = Scenario(
            cluster=load_cluster(preset),
            agents=agents_of(["64K"], round(agents_per_s * LONGEST_S * 1.2) + 20),
            trace="64K",
            system=system,
            calibration=self.calibration,
            agents_per_s=agents_per_s,
        )
        return sustains(prepare(scenario))

    def with_calibration(self, calibration: Calibration) -> "Runner":
        """Another one, with nothing simulated yet."""
        return Runner(self.scale, self._announce, calibration)

    def run(self, run: Run) -> SimulationResult:
        """The result, simulated now or before."""
        if run not in self._results:
            self._announce(_name(run))
            self._results[run] = self._simulate(run)
        return self._results[run]

    def runs(self) -> list[SimulationResult]:
        """Every result so far, in the order in which they were made."""
        return list(self._results.values())

    def _simulate(self, run: Run) -> SimulationResult:
        scenario = Scenario(
            cluster=load_cluster(run.preset),
            agents=agents_of([run.trace], run.agents, append_scale=run.append_scale),
            trace=run.trace,
            system=run.system,
            calibration=self.calibration,
            agents_per_s=run.agents_per_s,
            duration_s=run.duration_s,
            balance_window_s=BALANCE_WINDOW_S,
        )
        simulator = prepare(scenario)
        halfway: list[int] = []
        half_s = 0.0 if run.duration_s is None else run.duration_s / 2
        if half_s:
            half_ns = round(half_s * 1e9)
            simulator.events.at(half_ns, lambda _: halfway.append(simulator.measured.context_token_ns))
        result = finish_scenario(scenario, simulator)
        if halfway:
            token_s = (simulator.measured.context_token_ns - halfway[0]) / 1e9
            self.working_sets[run] = token_s / half_s * simulator.machine.costs.kv_bytes_per_token
        return result


def _name(run: Run) -> str:
    how = f"{run.agents:,} agents at once" if run.agents_per_s is None else f"{run.agents_per_s:g} agents a second"
    scaled = "" if run.append_scale == 1 else f", appends times {run.append_scale:g}"
    return f"{run.preset}, {run.system}, {run.trace}, {how}{scaled}"
