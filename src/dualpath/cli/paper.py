"""``dualpath paper``."""

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualpath.cli.arguments import command, positive, positive_number
from dualpath.cli.outcome import command_errors, new_console, usage_errors, write_json

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLES = """\
Items: cache-compute, pd-range, offline, append-scaling, ablation, balance, pd-sweep, online, working-set, scale-online,
scale-offline, scheduler-cpu, sensitivity. Without a name, all of them run, which takes one core about an hour.
Simulations run side by side on --jobs processes; results don't depend on their number. In the results directory, items
that are run replace their earlier rows; the others stay.

examples:
  dualpath paper
  dualpath paper cache-compute pd-range ablation --jobs 4 --json rows.json
  dualpath paper offline pd-sweep --scale 0.25         a quarter of the agents: quicker, but not the paper's setup
"""


def add(commands: Any) -> None:
    parser = command(commands, "paper", "the paper's evaluation: theirs beside ours", EXAMPLES, run)
    parser.add_argument("items", nargs="*", metavar="ITEM", help="(default: all)")
    parser.add_argument("--scale", type=positive_number, default=1.0, metavar="X", help="factor on agents at once")
    parser.add_argument(
        "--jobs", type=positive, default=os.cpu_count() or 1, metavar="N", help="processes (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("docs/results"), metavar="DIR", help="results directory (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows, constants and every simulation here")


def run(arguments: argparse.Namespace) -> int:
    """Simulates the paper's evaluation; prints and writes theirs beside ours."""
    from dualpath.lab.paper.archive import ArchiveError, merged
    from dualpath.lab.paper.document import document_of, table_of, write_results
    from dualpath.lab.paper.items import ITEMS, SENSITIVITY, check_names
    from dualpath.lab.paper.rows import Row
    from dualpath.lab.paper.runner import Runner, process_pool
    from dualpath.lab.paper.together import together

    console = new_console()
    names = arguments.items or [*ITEMS, SENSITIVITY]
    with usage_errors(ValueError):
        check_names(names)
        scale = Runner(arguments.scale).scale
    with ExitStack() as open_until_done, command_errors(ArchiveError, OSError):
        started, done = open_until_done.enter_context(_progress(console))
        pool = open_until_done.enter_context(process_pool(arguments.jobs)) if arguments.jobs > 1 else None
        runner = Runner(scale, announce=started, on_done=done, pool=pool)
        archive = merged(arguments.out, [], [], runner)
        rows: list[Row] = []
        for fresh, what_if in together(names, runner):  # written after each, so an interrupted run keeps what it found
            archive = merged(arguments.out, fresh, what_if, runner)
            write_results(archive, arguments.out)
            rows += fresh
        write_json(arguments.json, document_of(archive, runner))
    console.print(table_of(rows))
    console.print(f"written: {arguments.out}/paper.md, paper.png and paper.json", highlight=False)
    return 0


@contextmanager
def _progress(console: "Console") -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """Yields one function to call when a simulation is requested, with its name, and one to call when it is done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    columns = ("simulations", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("simulations", total=0)
        asked = 0

        def started(name: str) -> None:
            nonlocal asked
            asked += 1
            progress.console.print(f"simulating {name}", highlight=False)
            progress.update(task, total=asked)

        yield started, lambda: progress.advance(task)
