"""Runs a simulation: from the question (`Scenario`) to the answer (`SimulationResult`)."""

import gc
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import numpy as np

from dualpath.core.systems import HEADLINE, find_system
from dualpath.core.vocabulary import Role
from dualpath.lab.facts.cluster import ClusterSpec
from dualpath.lab.sim.costs import Calibration
from dualpath.lab.sim.faults import Fault, plan_faults
from dualpath.lab.sim.machine import build_machine, constants_for, limits_for
from dualpath.lab.sim.result import SimulationResult, attention_balance, distribution, snic_balance, snic_busy
from dualpath.lab.sim.simulator import Simulator
from dualpath.lab.sim.workloads import typical_turn
from dualpath.traces.arrivals import poisson_arrivals_ns
from dualpath.traces.turn_table import Agents


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """What to simulate. Raises ValueError for an unknown system, or a rate without a duration."""

    cluster: ClusterSpec
    agents: Agents
    trace: str = ""
    """Name of the workload, for the record."""
    system: str = HEADLINE
    calibration: Calibration = Calibration()
    agents_per_s: float | None = None
    """Rate of Poisson arrivals; None: all start at once."""
    duration_s: float | None = None
    """Time to stop; None: when all agents are done."""
    seed: int = 0
    """Seed of the arrivals."""
    faults: tuple[Fault, ...] = ()
    fetch_interval_ns: int | None = None
    """None: core's default."""
    balance_window_s: float = 1.0
    exact: bool = False
    """Makes every block, layer and decode step an event: hundreds of times slower, for small cases without faults."""

    def __post_init__(self) -> None:
        find_system(self.system)


Progress = Callable[[Simulator], None]


def run_scenario(scenario: Scenario, on_progress: Progress | None = None) -> tuple[SimulationResult, Simulator]:
    """Simulates. Raises `machine.MachineError` for a cluster without memory for a single block."""
    simulator = prepare(scenario)
    return finish_scenario(scenario, simulator, on_progress), simulator


def finish_scenario(scenario: Scenario, simulator: Simulator, on_progress: Progress | None = None) -> SimulationResult:
    """Runs what `prepare` made."""
    started_s = time.process_time()
    until_ns = None if scenario.duration_s is None else round(scenario.duration_s * 1e9)
    with without_garbage_collection():
        simulator.run(until_ns, on_progress)
    return summarize(scenario, simulator, time.process_time() - started_s)


def prepare(scenario: Scenario, journal: Callable[[bytes], object] | None = None) -> Simulator:
    """Returns the simulator with its agents and faults, before the first event."""
    machine = build_machine(scenario.cluster, scenario.calibration)
    constants = constants_for(machine, *typical_turn(scenario.agents))
    if scenario.fetch_interval_ns is not None:
        constants = msgspec.structs.replace(constants, fetch_interval_ns=scenario.fetch_interval_ns)
    simulator = Simulator(
        machine,
        find_system(scenario.system).policy,
        constants,
        limits_for(len(scenario.agents)),
        exact=scenario.exact,
        balance_window_ns=round(scenario.balance_window_s * 1e9),
        journal=journal,
    )
    plan_faults(simulator, scenario.faults)
    starts = None
    if scenario.agents_per_s is not None:
        starts = poisson_arrivals_ns(scenario.agents_per_s, len(scenario.agents), scenario.seed).tolist()
    simulator.arrive(scenario.agents, starts)
    return simulator


def summarize(scenario: Scenario, simulator: Simulator, cpu_s: float) -> SimulationResult:
    """Returns the record of a run that is over."""
    measured = simulator.measured
    simulated_s = simulator.events.now / 1e9
    ended_s = np.asarray(measured.ended_s)
    counted = ended_s >= (simulated_s / 2 if scenario.duration_s is not None else 0.0)
    generates_more = np.asarray(measured.tpot_s) > 0
    turns = measured.finished
    jct_s = measured.agent_jct_s
    return SimulationResult(
        cluster=scenario.cluster.name,
        model=scenario.cluster.model.name,
        trace=scenario.trace,
        system=scenario.system,
        agents=len(scenario.agents),
        agents_per_s=scenario.agents_per_s,
        seed=scenario.seed,
        calibration=scenario.calibration,
        simulated_s=simulated_s,
        agents_finished=measured.agents_finished,
        agent_jct_mean_s=sum(jct_s) / max(1, len(jct_s)),
        turns=turns,
        failed={cause.value: count for cause, count in measured.failed.items()},
        retries=measured.retries,
        turns_per_s=float(counted.sum()) / simulated_s * (1 if scenario.duration_s is None else 2),
        ttft_s=distribution(np.asarray(measured.ttft_s)[counted]),
        ttst_s=distribution(np.asarray(measured.ttst_s)[counted & generates_more]),
        tpot_s=distribution(np.asarray(measured.tpot_s)[counted & generates_more]),
        latency_s=distribution(np.asarray(measured.latency_s)[counted]),
        turns_in_system=measured.turn_ns / max(1, simulator.events.now),
        mean_prompt_tokens=measured.prompt_tokens / max(1, turns),
        hit_share=measured.hit_tokens / max(1, measured.prompt_tokens),
        generated_tokens=measured.generated_tokens,
        snic_busy={role.value: snic_busy(simulator, role) for role in Role},
        snic_read_bytes=list(simulator.storage.read_bytes),
        snic_unread_bytes=simulator.unread_bytes,
        snic_max_over_mean=snic_balance(simulator),
        balance_window_s=scenario.balance_window_s,
        attention_max_over_mean=attention_balance(simulator),
        prefill_busy=simulator.prefill.busy_ns / max(1, simulator.events.now) / len(simulator.prefill.groups),
        events=simulator.events.posted,
        cpu_s=cpu_s,
        turns_per_cpu_s=turns / max(cpu_s, 1e-9),
        peak_rss_bytes=_peak_rss_bytes(),
        scheduler=simulator.scheduler.statistics(),
    )


def _peak_rss_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Switches the collector off: a run makes millions of short-lived records without cycles, which it would rescan."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
