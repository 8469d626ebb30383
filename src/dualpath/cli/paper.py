"""``dualpath paper``."""

import argparse
from pathlib import Path
from typing import Any

from dualpath.cli.arguments import command, positive_number
from dualpath.cli.outcome import command_errors, new_console, usage_errors, write_json

EXAMPLES = """\
Items: cache-compute, pd-range, offline, append-scaling, ablation, balance, pd-sweep, online, working-set, scale-online,
scale-offline, scheduler-cpu, sensitivity. All of them where none is named, which takes one core an hour or so. In the
results directory, items that are run take the place of what is there of them; the others stay.

examples:
  dualpath paper
  dualpath paper cache-compute pd-range ablation --json rows.json
  dualpath paper offline pd-sweep --scale 0.25         a quarter of the agents: quicker, and another question
"""


def add(commands: Any) -> None:
    parser = command(commands, "paper", "the paper's evaluation: theirs beside ours", EXAMPLES, run)
    parser.add_argument("items", nargs="*", metavar="ITEM", help="(default: all)")
    parser.add_argument("--scale", type=positive_number, default=1.0, metavar="X", help="times the agents at once")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/results"), metavar="DIR", help="of the results (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows, constants and every simulation's result")


def run(arguments: argparse.Namespace) -> int:
    """Simulate the paper's evaluation; print and write theirs beside ours."""
    from dualpath.paper.archive import ArchiveError, merged
    from dualpath.paper.document import document_of, table_of, write_results
    from dualpath.paper.items import ITEMS, SENSITIVITY, check_names
    from dualpath.paper.runner import Runner
    from dualpath.paper.sensitivity import sensitivity

    console = new_console()
    names = arguments.items or [*ITEMS, SENSITIVITY]
    with usage_errors(ValueError):
        check_names(names)
        runner = Runner(arguments.scale, announce=lambda name: console.print(f"simulating {name}", highlight=False))
    rows = []
    with command_errors(ArchiveError, OSError):
        archive = merged(arguments.out, [], [], runner)
        for name in names:  # written after each: what an interrupted run has found is kept
            fresh = [] if name == SENSITIVITY else ITEMS[name](runner)
            archive = merged(arguments.out, fresh, sensitivity(runner) if name == SENSITIVITY else [], runner)
            write_results(archive, arguments.out)
            rows += fresh
    write_json(arguments.json, document_of(archive, runner))
    console.print(table_of(rows))
    console.print(f"written: {arguments.out}/paper.md, paper.png and paper.json", highlight=False)
    return 0
