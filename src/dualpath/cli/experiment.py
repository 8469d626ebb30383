"""``dualpath experiment``."""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualpath.cli.arguments import command
from dualpath.cli.outcome import UsageError, command_errors, new_console, usage_errors, write_json, write_report_beside
from dualpath.cli.series_options import add_series_options, bench_of, given_conditions
from dualpath.lab.experiments.conditions import Bench

if TYPE_CHECKING:
    from rich.console import Console

    from dualpath.lab.experiments.catalog import Definition
    from dualpath.lab.experiments.local_cluster import MakeLauncher
    from dualpath.lab.experiments.series import Series
    from dualpath.results import ResultFile

EXAMPLES = """\
Runs real clusters one after another, with the same agents for every system. The result file is written after every
run, so an interrupted experiment keeps its finished runs.

examples:
  dualpath experiment --list                            what there is, what it mirrors, what to expect
  dualpath experiment pd-ratio                          six minutes on two quiet cores
  dualpath experiment ablation --quick                  a minute or two, to see that it works
  dualpath experiment ablation --repeat 3               medians and ranges of three
  dualpath experiment append-scaling --values append_tokens=32,256 --topologies 1P1D
  dualpath experiment traces --trace sessions/*.json --agents 6
  dualpath experiment ablation --redraw                 table and figure again from the result file
"""


def add(commands: Any) -> None:
    parser = command(commands, "experiment", "run one of the paper's experiments on real clusters", EXAMPLES, run)
    parser.add_argument("name", nargs="?", metavar="NAME", help="the experiment; see --list")
    parser.add_argument("--list", action="store_true", help="list the experiments and what they show")
    parser.add_argument("--quick", action="store_true", help="a much smaller load: one to two minutes")
    parser.add_argument("--testbed", action="store_true", help="network namespaces and kernel rates; needs root")
    parser.add_argument("--redraw", action="store_true", help="run nothing; read the result file in --out")
    what = "what to vary, such as agents=4,8,16; repeatable"
    parser.add_argument(
        "--values", dest="axes", action="append", type=_axis, metavar="AXIS=LIST", default=argparse.SUPPRESS, help=what
    )
    add_series_options(parser, None, Bench().out)


def _axis(text: str) -> tuple[str, tuple[float, ...]]:
    name, _, values = text.partition("=")
    try:
        return name.replace("-", "_"), tuple(float(value) for value in values.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like agents=4,8,16") from None


def run(arguments: argparse.Namespace) -> int:
    """Runs an experiment; prints its table and findings. The exit code is 1 if a turn failed."""
    from dualpath.lab.experiments.catalog import definition
    from dualpath.lab.experiments.execution import result_path
    from dualpath.lab.experiments.readme import write_page
    from dualpath.results import ResultFileError, load_results

    console = new_console()
    if arguments.list:
        return _list(console)
    if arguments.name is None:
        raise UsageError("no experiment is named; give a NAME from --list")
    with usage_errors(ValueError):
        chosen, out = definition(arguments.name), bench_of(arguments, Bench().out).out
    if arguments.redraw:
        with command_errors(ResultFileError):
            result = load_results(result_path(chosen.name, out))
    else:
        with _telling_what_is_kept(chosen, out):
            result, out = run_series_of(chosen, arguments, console, out, arguments.testbed)
    return show(chosen, result, out, arguments.json, console, write_page)


def _list(console: "Console") -> int:
    from dualpath.lab.experiments.catalog import EXPERIMENTS

    for one in EXPERIMENTS:
        needs = "; needs --trace" if one.needs_traces else ""
        console.print(f"[bold]{one.name}[/bold]  {one.summary}", highlight=False)
        console.print(f"    mirrors {one.mirrors}; about {one.minutes} minutes{needs}", highlight=False)
        console.print(f"    expect: {one.expect}", highlight=False)
    return 0


def run_series_of(
    chosen: "Definition", arguments: argparse.Namespace, console: "Console", out: Path, testbed: bool = False
) -> tuple["ResultFile", Path]:
    """Runs `chosen` under the conditions that the arguments change; returns the result and its directory.

    Raises UsageError for a bad request, CommandError for a failure.
    """
    from dualpath.client.replay import ReplayError
    from dualpath.lab.experiments import execution
    from dualpath.lab.experiments.local_cluster import LaunchError
    from dualpath.lab.experiments.nic_bytes import MetricsError
    from dualpath.lab.experiments.series import series_of

    quick = getattr(arguments, "quick", False)
    with usage_errors(ValueError):
        bench = bench_of(arguments, out)
        if testbed and bench.transport is not None:
            raise ValueError("--transport: between a testbed's hosts KV moves by tcp; leave it out")
        conditions = chosen.under(quick, given_conditions(arguments))
        series = series_of(chosen.name, conditions, bench.seed, bench.repeats)
    with (
        command_errors(LaunchError, MetricsError, ReplayError, OSError),
        _launcher(testbed, series) as make_launcher,
    ):
        return execution.run_series(series, bench, console, make_launcher), bench.out


def show(
    chosen: "Definition",
    result: "ResultFile",
    out: Path,
    copy: Path | None,
    console: "Console",
    write_page: Callable[[Path], Path] | None = None,
) -> int:
    """Prints and writes everything made from a result; returns the exit code. `write_page` adds a page of `out`."""
    from dualpath.lab.experiments.execution import result_path
    from dualpath.lab.report.run_table import terminal_table

    write_json(copy, result)
    console.print()
    console.print(terminal_table(result))
    console.print(*chosen.find(result), sep="\n", highlight=False, soft_wrap=True)
    written = [result_path(chosen.name, out)]
    with command_errors(OSError):
        try:
            chosen.draw(result, written[0].with_suffix(".png"))
            written.append(written[0].with_suffix(".png"))
        except ValueError as error:
            console.print(f"no figure: {error}", highlight=False)
        written += [write_page(out)] if write_page is not None else []
    written.append(write_report_beside(written[0], result))
    console.print(f"\nwritten: {', '.join(map(str, written))}", highlight=False)
    for one in result.runs:
        for message in one.error_messages:
            print(f"failed on {one.topology} {one.system}: {message}", file=sys.stderr)
    return 1 if any(one.errors for one in result.runs) else 0


@contextmanager
def _telling_what_is_kept(chosen: "Definition", out: Path) -> Iterator[None]:
    try:
        yield
    except UsageError:
        raise
    except BaseException:
        print(
            f"finished runs are in {out}/{chosen.name}.json; to see them: "
            f"dualpath experiment {chosen.name} --redraw --out {shlex.quote(str(out))}",
            file=sys.stderr,
        )
        raise


@contextmanager
def _launcher(testbed: bool, series: "Series") -> Iterator["MakeLauncher"]:
    """Yields what starts the clusters: this host, or a testbed that lasts as long as the context."""
    if not testbed:
        from dualpath.lab.experiments.local_cluster import LocalLauncher

        yield LocalLauncher
        return
    from dualpath.lab.testbed.failure import TestbedError
    from dualpath.lab.testbed.plan import Rates
    from dualpath.lab.testbed.temporary import temporary_testbed

    asked = series.conditions
    rates = Rates(asked.snic_bytes_per_s, asked.cnic_bytes_per_s)
    with command_errors(TestbedError), temporary_testbed(asked.topologies, rates) as make:
        yield make
