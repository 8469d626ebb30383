"""``dualpath report``."""

import argparse
from pathlib import Path
from typing import Any

from dualpath.cli.arguments import command, positive
from dualpath.cli.outcome import CommandError, command_errors, usage_errors, write_json

EXAMPLES = """\
The page needs nothing else: open it in a browser, send it to a colleague, print it. It makes no network request.

examples:
  dualpath report results/demo.json --out demo.html
  dualpath report monday.json tuesday.json --out both.html         several results on one page
  dualpath report measured.json --prediction simulated.json        a simulation beside what it predicts
"""


def add(commands: Any) -> None:
    parser = command(commands, "report", "make one HTML page from result files", EXAMPLES, run)
    parser.add_argument("results", metavar="RESULT.json", type=Path, nargs="+", help="of a demo, experiment or replay")
    parser.add_argument(
        "--prediction", metavar="FILE", type=Path, help="result file of a simulation of these runs, shown beside them"
    )
    parser.add_argument(
        "--out", metavar="FILE", type=Path, default=Path("report.html"), help="the page (default: %(default)s)"
    )
    parser.add_argument(
        "--max-turns",
        metavar="N",
        type=positive,
        default=100_000,
        help="turns in the table and timeline; beyond that, whole agents are left out (default: %(default)s)",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write what was made here: path, bytes, runs, turns")


def run(arguments: argparse.Namespace) -> int:
    """Reads the result files and writes the page."""
    from dualpath.lab.report.html import write_report
    from dualpath.results import ResultFileError, load_results

    with usage_errors(ResultFileError):
        results = [load_results(path) for path in arguments.results]
        prediction = None if arguments.prediction is None else load_results(arguments.prediction)
    out: Path = arguments.out
    if not out.parent.is_dir():
        raise CommandError(f"{out.parent} is not a directory; make it, or give another --out")
    with usage_errors(ResultFileError, ValueError), command_errors(OSError):
        write_report(results, out, prediction, arguments.max_turns)
    runs = [one for result in results for one in result.runs]
    turns, html_bytes = sum(len(one.turn_results) for one in runs), out.stat().st_size
    write_json(arguments.json, {"out": str(out), "html_bytes": html_bytes, "runs": len(runs), "turns": turns})
    print(f"{out}: {len(runs)} runs, {turns:,} turns, {html_bytes / 1e6:.1f} MB")
    return 0
