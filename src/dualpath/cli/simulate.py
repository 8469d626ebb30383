"""``dualpath simulate``."""

import argparse
from pathlib import Path
from typing import Any

from dualpath.cli.arguments import (
    CLUSTER_HELP,
    SYSTEMS,
    add_source,
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
  dualpath simulate --like results/demo.json --machine machine.json     predict what was measured here

--like needs no CLUSTER: it simulates the real runtime on this machine, which `dualpath calibrate` has measured, for
every run of a result file of demo or experiment, or of a replay against `dualpath serve`, and says how far off it is.
Each run is predicted for the speed that the cores had meanwhile, which the file notes. --json writes a result file.
"""


def add(commands: Any) -> None:
    parser = command(commands, "simulate", "the scheduler under a virtual clock, on any cluster", EXAMPLES, run)
    parser.add_argument("cluster", nargs="?", metavar="CLUSTER", help="a preset or a TOML file, see below")
    parser.add_argument("--system", choices=SYSTEMS, default="dualpath", help="(default: %(default)s)")
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
    parser.add_argument("--like", type=Path, metavar="RESULT", help="predict the runs of this result file")
    parser.add_argument(
        "--as-calibrated", action="store_true", help="for --like: the machine as fast as then, not as in each run"
    )
    parser.add_argument(
        "--machine", type=Path, default=Path("machine.json"), metavar="FILE", help="for --like (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Simulate a cluster; print what came out. Exit code 1 if a turn failed."""
    if (arguments.cluster is None) == (arguments.like is None):
        raise UsageError("name a CLUSTER, or give a result file with --like; one of the two")
    if arguments.like is not None:
        return _predict(arguments)
    from dualpath.sim.command import SimulationError, run_command
    from dualpath.sim.table import result_table

    console = new_console()
    with usage_errors(SimulationError), command_errors(OSError):
        result = run_command(arguments, console)
    write_json(arguments.json, result)
    console.print(result_table(result))
    return 1 if result.failed else 0


def _predict(arguments: argparse.Namespace) -> int:
    from dualpath.prediction import MachineError, PredictionError, comparison_table, load_machine, predict
    from dualpath.report.result_file import ResultFileError, load

    console = new_console()
    with usage_errors(MachineError, ResultFileError):
        measured, rates = load(arguments.like), load_machine(arguments.machine)
        with command_errors(PredictionError), console.status("simulating"):
            predicted = predict(measured, rates, " ".join(arguments.command_line), arguments.as_calibrated)
    write_json(arguments.json, predicted)
    console.print(comparison_table(measured, predicted, rates))
    return 0
