"""``dualpath demo``."""

import argparse
from typing import Any

from dualpath.cli.arguments import command
from dualpath.cli.series_options import add_series_options
from dualpath.lab.experiments.conditions import DEMO, DEMO_OUT

EXAMPLES = """\
Each cluster is real: its own processes, real tokens, real bytes in a real store, NICs held to the given rates.

examples:
  dualpath demo
  dualpath demo --topologies 1P1D --systems basic,dualpath --agents 4 --turns 3
  dualpath demo --trace session.json --scale 16       replay recorded agents, token counts divided by 16
  dualpath demo --repeat 3 --json runs.json           medians of three
"""


def add(commands: Any) -> None:
    parser = command(commands, "demo", "run systems side by side on real clusters and compare them", EXAMPLES, run)
    add_series_options(parser, DEMO, DEMO_OUT)


def run(arguments: argparse.Namespace) -> int:
    """Runs the catalogue's demo; prints its table and what it means. The exit code is 1 if a turn failed."""
    from dualpath.cli.experiment import run_series_of, show
    from dualpath.cli.outcome import new_console
    from dualpath.lab.experiments.catalog import definition

    chosen, console = definition("demo"), new_console()
    result, out = run_series_of(chosen, arguments, console, DEMO_OUT)
    return show(chosen, result, out, arguments.json, console)
