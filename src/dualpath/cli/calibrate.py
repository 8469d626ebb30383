"""``dualpath calibrate``."""

import argparse
from pathlib import Path
from typing import Any

from dualpath.cli.arguments import command, positive
from dualpath.cli.outcome import command_errors, new_console, usage_errors, write_json

EXAMPLES = """\
Measures what the runtime's parts take on this machine, each by itself and before any experiment: prefill and decode
steps, copies, transfers, storage, requests, and what engines take from each other when they compute at once. Then
``dualpath simulate --like RESULT`` predicts a result file's runs from it. Takes about three minutes; leave the machine
alone.

examples:
  dualpath calibrate --model .models/demo                     for runs with the demo's model
  dualpath calibrate --model DIR --threads 2 --out two.json   for engines with two compute threads each
  dualpath simulate --like results/demo.json --machine machine.json
"""


def add(commands: Any) -> None:
    parser = command(commands, "calibrate", "measure this machine, for predictions", EXAMPLES, run)
    parser.add_argument("--model", type=Path, default=Path(".models/demo"), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="torch's, per engine (%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument(
        "--store",
        type=Path,
        default=Path(".store"),
        metavar="DIR",
        help="a folder where stores will be: blocks are written there for a moment (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, default=Path("machine.json"), metavar="FILE", help="(%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same here too")


def run(arguments: argparse.Namespace) -> int:
    """Measure this machine; print and write what came out."""
    from dualpath.calibration import MAX_OTHERS_CORES, CalibrationOptions, calibrate, machine_tables
    from dualpath.experiment.cluster_process import ClusterError
    from dualpath.workload import ReplayError

    console = new_console()
    with usage_errors(ValueError):
        options = CalibrationOptions(
            model=arguments.model, threads=arguments.threads, dtype=arguments.dtype, store=arguments.store
        )
    with command_errors(ClusterError, ReplayError, OSError, RuntimeError, ValueError), console.status("") as status:
        rates = calibrate(options, lambda what: status.update(f"measuring {what}"))
    for path in (arguments.out, arguments.json):
        write_json(path, rates)
    console.print(machine_tables(rates))
    if rates.others_cores > MAX_OTHERS_CORES:
        console.print(f"[yellow]something else kept {rates.others_cores:.1f} cores busy: calibrate again without it")
    console.print(f"{arguments.out} written, after {rates.measured_s:.0f} s")
    return 0
