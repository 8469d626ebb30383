"""``dualpath simulate``."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualpath.cli.arguments import (
    CLUSTER_HELP,
    add_profile,
    add_source,
    add_system,
    command,
    duration_ns,
    not_negative,
    positive,
    positive_number,
)
from dualpath.cli.outcome import UsageError, command_errors, new_console, usage_errors, write_json

if TYPE_CHECKING:
    from rich.console import Console

    from dualpath.lab.sim.simulator import Simulator

EXAMPLES = f"""\
{CLUSTER_HELP}
All agents start at once, unless --aps gives a rate of arrivals.

examples:
  dualpath simulate ds660b-2p4d --agents 500
  dualpath simulate ds660b-2p4d --system basic --aps 0.2 --duration 30min
  dualpath simulate ds27b-1p1d --trace 32K --agents 200 --json result.json --trace-out timeline.json
  dualpath simulate my-cluster.toml --trace session-1.json session-2.json --agents 100
  dualpath simulate ds660b-2p4d --agents 300 --fault engine_lost:5@60s --fault snic:0@30s*0.1
  dualpath simulate my-cluster.toml --profile profile.json         measured steps instead of a roofline
  dualpath simulate --like results/demo.json --profile profile.json

--like needs no CLUSTER: it simulates every run of a result file of demo, experiment, or replay against
`dualpath serve`, and says how far off it is. --json then writes a result file for `dualpath report --prediction`.
"""


def add(commands: Any) -> None:
    parser = command(commands, "simulate", "run the scheduler under a virtual clock, on any cluster", EXAMPLES, run)
    parser.add_argument("cluster", nargs="?", metavar="CLUSTER", help="a preset or a TOML file, see below")
    parser.add_argument("--like", type=Path, metavar="RESULT", help="simulate the runs of this result file instead")
    add_profile(parser)
    add_system(parser)
    add_source(parser)
    parser.add_argument("--agents", type=positive, metavar="N", help="(default: 500, or one per recorded agent)")
    parser.add_argument("--aps", type=positive_number, metavar="RATE", help="agents per second, Poisson arrivals")
    parser.add_argument("--duration", type=duration_ns, metavar="TIME", help="stop then (default: when all agents end)")
    parser.add_argument("--append-scale", type=positive_number, default=1.0, metavar="X", help="factor on appends")
    parser.add_argument("--generate-scale", type=positive_number, default=1.0, metavar="X", help="factor on answers")
    parser.add_argument("--seed", type=not_negative, default=0, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--fault", action="append", default=[], metavar="FAULT", help="KIND:NUMBER@TIME[*FACTOR]")
    parser.add_argument("--exact", action="store_true", help="simulate every block, layer and step; small cases only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here too")
    parser.add_argument("--trace-out", type=Path, metavar="FILE", help="a timeline for chrome://tracing or Perfetto")


def run(arguments: argparse.Namespace) -> int:
    """Simulates a cluster and prints the result. The exit code is 1 if a turn failed."""
    if (arguments.cluster is None) == (arguments.like is None):
        raise UsageError("give either a CLUSTER or a result file with --like")
    if arguments.like is not None:
        return _like(arguments)
    from dualpath.lab.sim.simulate import SimulationError, simulate
    from dualpath.lab.sim.table import result_table

    console = new_console()
    with usage_errors(SimulationError), command_errors(OSError), _progress(console, arguments) as show:
        result = simulate(
            arguments.cluster,
            arguments.trace,
            system=arguments.system,
            agents=arguments.agents,
            agents_per_s=arguments.aps,
            duration_s=None if arguments.duration is None else arguments.duration / 1e9,
            model=arguments.model,
            profile=arguments.profile,
            append_scale=arguments.append_scale,
            generate_scale=arguments.generate_scale,
            max_context_tokens=arguments.max_context,
            seed=arguments.seed,
            faults=arguments.fault,
            exact=arguments.exact,
            timeline=arguments.trace_out,
            on_progress=show,
        )
    write_json(arguments.json, result)
    console.print(result_table(result))
    return 1 if result.failed else 0


@contextmanager
def _progress(console: "Console", arguments: argparse.Namespace) -> "Iterator[Callable[[Simulator, int], None]]":
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    share = (BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.fields[simulated]}"))
    columns = (TextColumn("{task.description}"), *share, TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"{arguments.cluster} {arguments.system}", simulated="")

        def show(at: "Simulator", turns: int) -> None:
            simulated = f"{at.events.now / 1e9:,.0f} s simulated"
            progress.update(task, total=turns, completed=at.measured.finished, simulated=simulated)

        yield show


def _like(arguments: argparse.Namespace) -> int:
    if arguments.profile is None:
        raise UsageError("--like needs a --profile of this machine and model; dualpath profile makes one")
    from dualpath.lab.facts.profile import ProfileError, load_profile
    from dualpath.lab.profile.like import predict
    from dualpath.lab.profile.tables import comparison_table
    from dualpath.results import ResultFileError, load_results

    console = new_console()
    with usage_errors(ProfileError, ResultFileError), console.status("simulating"):
        measured, profile = load_results(arguments.like), load_profile(arguments.profile)
        predicted = predict(measured, profile, str(arguments.profile), " ".join(arguments.command_line))
    write_json(arguments.json, predicted)
    console.print(comparison_table(measured, predicted))
    return 0
