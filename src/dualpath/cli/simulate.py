"""``dualpath simulate``."""

import argparse
from pathlib import Path
from typing import Any

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

EXAMPLES = f"""\
{CLUSTER_HELP} Agents all start at once, unless --aps says how many arrive a second.

examples:
  dualpath simulate ds660b-2p4d --agents 500
  dualpath simulate ds660b-2p4d --system basic --aps 0.2 --duration 30min
  dualpath simulate ds27b-1p1d --trace 32K --agents 200 --json result.json --trace-out timeline.json
  dualpath simulate my-cluster.toml --trace session-1.json session-2.json --agents 100
  dualpath simulate ds660b-2p4d --agents 300 --fault engine_lost:5@60s --fault snic:0@30s*0.1
  dualpath simulate my-cluster.toml --profile profile.json         measured steps instead of a roofline
  dualpath simulate --like results/demo.json --profile profile.json

--like needs no CLUSTER: it simulates every run of a result file of demo or experiment, or of a replay against
`dualpath serve`, and says how far off it is. --json then writes a result file, for `dualpath report --prediction`.
"""


def add(commands: Any) -> None:
    parser = command(commands, "simulate", "the scheduler under a virtual clock, on any cluster", EXAMPLES, run)
    parser.add_argument("cluster", nargs="?", metavar="CLUSTER", help="a preset or a TOML file, see below")
    parser.add_argument("--like", type=Path, metavar="RESULT", help="simulate the runs of this result file instead")
    add_profile(parser)
    add_system(parser)
    add_source(parser)
    parser.add_argument("--agents", type=positive, metavar="N", help="(default: 500, or one per recorded agent)")
    parser.add_argument("--aps", type=positive_number, metavar="RATE", help="agents per second, Poisson")
    parser.add_argument("--duration", type=duration_ns, metavar="TIME", help="stop after so long (default: at the end)")
    parser.add_argument("--append-scale", type=positive_number, default=1.0, metavar="X", help="times every append")
    parser.add_argument("--generate-scale", type=positive_number, default=1.0, metavar="X", help="times every answer")
    parser.add_argument("--seed", type=not_negative, default=0, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--fault", action="append", default=[], metavar="FAULT", help="KIND:NUMBER@TIME[*FACTOR]")
    parser.add_argument("--exact", action="store_true", help="every block, layer and step an event; small cases only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here too")
    parser.add_argument("--trace-out", type=Path, metavar="FILE", help="a timeline for chrome://tracing or Perfetto")


def run(arguments: argparse.Namespace) -> int:
    """Simulate a cluster; print what came out. Exit code 1 if a turn failed."""
    if (arguments.cluster is None) == (arguments.like is None):
        raise UsageError("name a CLUSTER, or give a result file with --like; one of the two")
    if arguments.like is not None:
        return _like(arguments)
    from dualpath.lab.sim.command import SimulationError, run_command
    from dualpath.lab.sim.table import result_table

    console = new_console()
    with usage_errors(SimulationError), command_errors(OSError):
        result = run_command(arguments, console)
    write_json(arguments.json, result)
    console.print(result_table(result))
    return 1 if result.failed else 0


def _like(arguments: argparse.Namespace) -> int:
    if arguments.profile is None:
        raise UsageError("--like needs a --profile of this machine and model; dualpath profile makes one")
    from dualpath.lab.facts.profile import ProfileError, load_profile
    from dualpath.lab.profile.like import predict
    from dualpath.lab.profile.tables import comparison_table
    from dualpath.results.file import ResultFileError, load

    console = new_console()
    with usage_errors(ProfileError, ResultFileError), console.status("simulating"):
        measured, profile = load(arguments.like), load_profile(arguments.profile)
        predicted = predict(measured, profile, str(arguments.profile), " ".join(arguments.command_line))
    write_json(arguments.json, predicted)
    console.print(comparison_table(measured, predicted))
    return 0
