"""``dualpath demo``."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from dualpath.cli.arguments import (
    SOURCES_HELP,
    command,
    not_negative,
    positive,
    positive_number,
    rate,
    systems,
    topologies,
)
from dualpath.cli.outcome import command_errors, new_console, usage_errors, write_json, write_report_beside

EXAMPLES = """\
Each cluster is real: its own processes, real tokens, real bytes in a real store, its NICs held to the given rates.

examples:
  dualpath demo
  dualpath demo --topologies 1P1D --systems basic,dualpath --agents 4 --turns 3
  dualpath demo --trace session.json --scale 16       replay recorded agents, token counts divided by 16
  dualpath demo --repeat 3 --json runs.json           medians of three
"""


def add(commands: Any) -> None:
    parser = command(commands, "demo", "run systems side by side on real clusters and compare them", EXAMPLES, run)
    # What is not given stays out of the namespace: DemoOptions has the defaults, and None means no limit.
    parser.argument_default = argparse.SUPPRESS
    group = parser.add_argument_group("what to run")
    group.add_argument("--topologies", type=topologies, metavar="LIST", help="(default: 1P1D,1P2D)")
    group.add_argument("--systems", type=systems, metavar="LIST", help="(default: basic,dualpath,oracle)")
    group.add_argument(
        "--snic-rate", type=rate, metavar="RATE", dest="snic_bytes_per_s", help="of each storage NIC (default: 40MB/s)"
    )
    group.add_argument(
        "--cnic-rate",
        type=rate,
        metavar="RATE",
        dest="cnic_bytes_per_s",
        help="of each compute NIC (default: 320MB/s)",
    )
    group.add_argument("--repeat", type=positive, metavar="N", dest="repeats", help="medians of N (default: 1)")
    group.add_argument("--model", type=Path, metavar="DIR", help="(default: .models/demo, made if absent)")
    group = parser.add_argument_group("agents")
    group.add_argument("--agents", type=positive, metavar="N", help="all start at once (default: 12, or one per trace)")
    group.add_argument("--turns", type=positive, metavar="N", help="measured turns of an agent (default: 4)")
    group.add_argument(
        "--context",
        type=positive,
        metavar="N",
        dest="first_context_tokens",
        help="mean tokens at first (default: 2800)",
    )
    group.add_argument(
        "--append", type=positive, metavar="N", dest="append_tokens", help="mean tokens a turn adds (default: 64)"
    )
    group.add_argument(
        "--generate", type=positive, metavar="N", dest="generate_tokens", help="mean tokens generated (default: 16)"
    )
    group.add_argument("--seed", type=not_negative, metavar="N", help="of the agents (default: 0)")
    group.add_argument("--trace", type=Path, nargs="+", dest="traces", metavar="TRACE", help=SOURCES_HELP)
    group.add_argument("--scale", type=positive_number, help="divide the traces' token counts by this (default: 16)")
    group.add_argument(
        "--max-context", type=positive, dest="max_context_tokens", metavar="N", help="cut traces here (default: 6144)"
    )
    group = parser.add_argument_group("results")
    group.add_argument("--out", type=Path, metavar="DIR", help="demo.json, .png, .html and logs (default: results)")
    group.add_argument("--work", type=Path, metavar="DIR", help="for the stores, removed again (default: .store)")
    group.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the result here too")


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; print its table and what it means. Exit code 1 if a turn failed."""
    from dualpath.client.replay import ReplayError
    from dualpath.lab.experiments.cluster_process import ClusterError
    from dualpath.lab.experiments.demo.options import DemoOptions
    from dualpath.lab.experiments.demo.run import run_demo
    from dualpath.lab.experiments.demo.workload import build_trajectories
    from dualpath.lab.experiments.nic_bytes import MetricsError
    from dualpath.lab.report.summary import explain
    from dualpath.lab.report.table import run_table

    given = {name: value for name, value in vars(arguments).items() if name in DemoOptions.__struct_fields__}
    given |= {name: tuple(given[name]) for name in ("traces",) if name in given}
    given |= {"command": shlex.join(arguments.command_line)}
    with usage_errors(ValueError):
        options = DemoOptions(**given)
        trajectories = build_trajectories(options)
    console = new_console()
    with command_errors(ClusterError, MetricsError, ReplayError, OSError):
        result = run_demo(options, trajectories, console)
    write_json(arguments.json, result)
    console.print()
    console.print(run_table(result))
    console.print(*explain(result), sep="\n", highlight=False, soft_wrap=True)
    page = write_report_beside(options.out / "demo.json", result)
    console.print(f"\nwritten: {options.out}/demo.json, {options.out}/demo.png, {page}", highlight=False)
    for run in result.runs:
        for message in run.error_messages:
            print(f"failed on {run.topology} {run.system}: {message}", file=sys.stderr)
    return 1 if any(run.errors for run in result.runs) else 0
