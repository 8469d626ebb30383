"""`simulate`: simulates a cluster and a workload given by name, for the command line and for notebooks."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from dualpath.core.policy import PolicyError
from dualpath.core.systems import HEADLINE
from dualpath.lab.facts.cluster import ClusterError, ClusterSpec
from dualpath.lab.facts.models import ModelConfigError
from dualpath.lab.facts.profile import Profile, ProfileError, find_cluster
from dualpath.lab.sim.calibration import calibration_for
from dualpath.lab.sim.chrome_trace import ChromeTrace
from dualpath.lab.sim.faults import Fault
from dualpath.lab.sim.machine import MachineError
from dualpath.lab.sim.result import SimulationResult
from dualpath.lab.sim.run import Scenario, finish_scenario, prepare
from dualpath.lab.sim.simulator import Simulator
from dualpath.lab.sim.workloads import TraceError, agents_of
from dualpath.spec.units import parse_duration_ns
from dualpath.traces.turn_table import Agents

_FAULT = re.compile(r"(engine_lost|snic|storage)(?::(\d+))?@([^*]+)(?:\*([0-9.]+))?")


class SimulationError(ValueError):
    """The simulation can't be made. The message says why."""


def simulate(
    cluster: str | Path | ClusterSpec,
    trace: str | Sequence[str] | Agents = "64K",
    *,
    system: str = HEADLINE,
    agents: int | None = None,
    agents_per_s: float | None = None,
    duration_s: float | None = None,
    model: str | None = None,
    profile: Path | Profile | None = None,
    append_scale: float = 1.0,
    generate_scale: float = 1.0,
    max_context_tokens: int | None = None,
    seed: int = 0,
    faults: Sequence[str] = (),
    exact: bool = False,
    timeline: Path | None = None,
    on_progress: Callable[[Simulator, int], None] | None = None,
) -> SimulationResult:
    """Runs `agents` of `trace` on `cluster` under a virtual clock.

    `cluster` is a preset, a TOML file or a record; `trace` is what `load_source` takes. All agents start at once, or
    `agents_per_s` arrive by a Poisson process. `faults` look like ``snic:0@30s*0.1``. `timeline` is a file for
    chrome://tracing. `on_progress` gets the simulator and the number of turns. Raises SimulationError, and OSError if
    the timeline can't be written.
    """
    if agents is not None and not (isinstance(agents, int) and agents >= 1):
        raise SimulationError(f"agents must be a whole number from 1 up, not {agents!r}")
    try:
        spec = find_cluster(cluster, model, profile)
        chosen, name = _agents(trace, agents, seed, append_scale, generate_scale, max_context_tokens)
        scenario = Scenario(
            cluster=spec,
            agents=chosen,
            trace=name,
            system=system,
            calibration=calibration_for(spec),
            agents_per_s=agents_per_s,
            duration_s=duration_s,
            seed=seed,
            faults=tuple(map(parse_fault, faults)),
            exact=exact,
        )
        simulator = prepare(scenario)
    except (ClusterError, ProfileError, ModelConfigError, TraceError, MachineError, ValueError) as error:
        raise SimulationError(str(error)) from error
    drawn = None if timeline is None else ChromeTrace(simulator)
    turns = int(chosen.turns.sum())
    try:
        result = finish_scenario(scenario, simulator, on_progress and (lambda at: on_progress(at, turns)))
    except PolicyError as error:
        raise SimulationError(str(error)) from error
    if drawn is not None and timeline is not None:
        drawn.write(timeline)
    return result


def _agents(
    trace: str | Sequence[str] | Agents, count: int | None, seed: int, append: float, generate: float, cap: int | None
) -> tuple[Agents, str]:
    """The agents, and the trace's name for the record."""
    if isinstance(trace, Agents):
        return trace, ""
    names = [trace] if isinstance(trace, str) else trace
    agents = agents_of(names, count, seed=seed, append_scale=append, generate_scale=generate, max_context_tokens=cap)
    return agents, " ".join(names)


def parse_fault(text: str) -> Fault:
    """Parses ``engine_lost:5@60s``, ``snic:0@30s*0.1``, ``storage@2min*0.5``. Raises ValueError naming the text."""
    match = _FAULT.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a fault; write KIND:NUMBER@TIME[*FACTOR], such as snic:0@30s*0.1")
    kind, target, at, factor = match.groups()
    at_s = parse_duration_ns(at) / 1e9
    return Fault(kind=kind, target=int(target or 0), at_s=at_s, factor=float(factor or 1))  # type: ignore[arg-type]
