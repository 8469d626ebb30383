"""Runs the demo: every topology under every system with the same agents, then the result file and its figure.

The experiments' engine does the work (`dualpath.lab.experiments.run`); the demo is its plan.
"""

from collections.abc import Sequence

from rich.console import Console

from dualpath.lab.experiments.demo.options import DemoOptions
from dualpath.lab.experiments.demo.workload import source
from dualpath.lab.experiments.plan import Plan, PlannedRun, Point
from dualpath.lab.experiments.run import run_plan
from dualpath.lab.experiments.settings import Settings
from dualpath.lab.report.figure import draw
from dualpath.results.file import ResultFile
from dualpath.traces.trajectory import Trajectory

NAME = "demo"
AGENTS = "agents"


def run_demo(options: DemoOptions, trajectories: Sequence[Trajectory], console: Console) -> ResultFile:
    """Run it all; write ``demo.json`` and ``demo.png`` into `options.out`. SIGINT and SIGTERM stop every cluster.

    Raises ClusterError, MetricsError, ReplayError, OSError, or KeyboardInterrupt.
    """
    result = run_plan(plan(options, trajectories), settings(options), console)
    draw(result, options.out / f"{NAME}.png")
    return result


def plan(options: DemoOptions, trajectories: Sequence[Trajectory]) -> Plan:
    """Every topology and system `options.repeats` times; systems alternate, and repeats go round all topologies."""
    points = [Point(topology=topology, systems=options.systems, agents=AGENTS) for topology in options.topologies]
    runs = [
        PlannedRun(point, system, repeat)
        for repeat in range(options.repeats)
        for point in points
        for system in point.systems
    ]
    return Plan(kind="demo", name=NAME, trajectories={AGENTS: list(trajectories)}, runs=runs, source=source(options))


def settings(options: DemoOptions) -> Settings:
    """What the engine must know of the options."""
    return Settings(**{name: getattr(options, name) for name in Settings.__struct_fields__})
