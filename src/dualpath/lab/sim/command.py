"""``dualpath simulate``: from the command line's values to a scenario, with a progress bar while it runs."""

import argparse
import re

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dualpath.lab.facts.cluster import ClusterError, ClusterSpec, load_cluster
from dualpath.lab.facts.models import ModelConfigError
from dualpath.lab.facts.profile import applied, load_profile
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
    """A simulation that can't be made. The message says why."""


def run_command(arguments: argparse.Namespace, console: Console) -> SimulationResult:
    """Simulate what the arguments say. Raises SimulationError, and OSError where a file can't be written."""
    try:
        cluster = load_cluster(arguments.cluster)
        if arguments.model is not None:
            cluster = cluster.with_model(arguments.model)
        if arguments.profile is not None:
            cluster = applied(cluster, load_profile(arguments.profile), str(arguments.profile))
        scenario = _scenario(arguments, cluster, _agents(arguments))
        simulator = prepare(scenario)
    except (ClusterError, ModelConfigError, TraceError, MachineError, ValueError) as error:
        raise SimulationError(str(error)) from error
    timeline = ChromeTrace(simulator) if arguments.trace_out is not None else None
    with _progress(console) as progress:
        total = int(scenario.agents.turns.sum())
        task = progress.add_task(f"{cluster.name} {scenario.system}", total=total, simulated="")

        def show(at: Simulator) -> None:
            progress.update(task, completed=at.measured.finished, simulated=f"{at.events.now / 1e9:,.0f} s simulated")

        result = finish_scenario(scenario, simulator, show)
    if timeline is not None:
        timeline.write(arguments.trace_out)
    return result


def parse_fault(text: str) -> Fault:
    """``engine_lost:5@60s``, ``snic:0@30s*0.1``, ``storage@2min*0.5``. Raises ValueError naming the text."""
    match = _FAULT.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no fault; write KIND:NUMBER@TIME[*FACTOR], such as snic:0@30s*0.1")
    kind, target, at, factor = match.groups()
    at_s = parse_duration_ns(at) / 1e9
    return Fault(kind=kind, target=int(target or 0), at_s=at_s, factor=float(factor or 1))  # type: ignore[arg-type]


def _agents(arguments: argparse.Namespace) -> Agents:
    return agents_of(
        arguments.trace,
        arguments.agents,
        seed=arguments.seed,
        append_scale=arguments.append_scale,
        generate_scale=arguments.generate_scale,
        max_context_tokens=arguments.max_context,
    )


def _scenario(arguments: argparse.Namespace, cluster: ClusterSpec, agents: Agents) -> Scenario:
    return Scenario(
        cluster=cluster,
        agents=agents,
        trace=" ".join(arguments.trace),
        system=arguments.system,
        calibration=calibration_for(cluster),
        agents_per_s=arguments.aps,
        duration_s=None if arguments.duration is None else arguments.duration / 1e9,
        seed=arguments.seed,
        faults=tuple(parse_fault(text) for text in arguments.fault),
        exact=arguments.exact,
    )


def _progress(console: Console) -> Progress:
    share = (BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.fields[simulated]}"))
    return Progress(TextColumn("{task.description}"), *share, TimeElapsedColumn(), console=console, transient=True)
