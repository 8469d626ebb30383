"""``dualpath experiment``."""

import argparse
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualpath.cli.arguments import command, not_negative, positive, positive_number, rate, systems, topologies
from dualpath.cli.outcome import UsageError, command_errors, new_console, usage_errors, write_json, write_report_beside

if TYPE_CHECKING:
    from rich.console import Console

    from dualpath.lab.experiments.catalog import Definition
    from dualpath.lab.experiments.plan import Plan
    from dualpath.lab.experiments.run import MakeLauncher
    from dualpath.lab.experiments.settings import Settings
    from dualpath.results.file import ResultFile

EXAMPLES = """\
Real clusters, one after another, with the same agents for every system. The result file is written after every run, so
an experiment that is interrupted keeps what it has.

examples:
  dualpath experiment --list                            what there is, what it mirrors, what to expect
  dualpath experiment pd-ratio                          six minutes on two quiet cores
  dualpath experiment ablation --quick                  a minute or two: does it work?
  dualpath experiment ablation --repeat 3               medians and ranges of three
  dualpath experiment append-scaling --values append_tokens=32,256 --topologies 1P1D
  dualpath experiment traces --trace sessions/*.json --agents 6
  dualpath experiment ablation --redraw                 table and figure again from the result file
"""


def add(commands: Any) -> None:
    parser = command(commands, "experiment", "run one of the paper's experiments on real clusters", EXAMPLES, run)
    parser.add_argument("name", nargs="?", metavar="NAME", help="which; see --list")
    parser.add_argument("--list", action="store_true", help="name the experiments and what they show")
    parser.add_argument("--quick", action="store_true", help="a much smaller load: one to two minutes")
    parser.add_argument("--repeat", type=positive, default=1, metavar="N", help="medians of N (default: 1)")
    parser.add_argument("--testbed", action="store_true", help="network namespaces and kernel rates; needs root")
    parser.add_argument("--redraw", action="store_true", help="run nothing; read the result file in --out")
    parser.add_argument("--out", type=Path, metavar="DIR", help="results and logs (default: results/experiments)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="for the stores, removed again (default: .store)")
    parser.add_argument("--model", type=Path, metavar="DIR", help="(default: .models/demo, made if absent)")
    parser.add_argument("--seed", type=not_negative, metavar="N", help="of the agents (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here too")
    _add_load(parser.add_argument_group("instead of the experiment's own"))


def _add_load(group: Any) -> None:
    """What is not given stays out of the namespace: the experiment has the defaults."""

    def option(flag: str, field: str, kind: Any, metavar: str, text: str, **more: Any) -> None:
        group.add_argument(flag, dest=field, type=kind, metavar=metavar, default=argparse.SUPPRESS, help=text, **more)

    option("--topologies", "topologies", topologies, "LIST", "such as 1P1D,2P1D")
    option("--systems", "systems", systems, "LIST", "such as basic,dualpath,oracle")
    option("--agents", "agents", positive, "N", "agents")
    option("--turns", "turns", positive, "N", "measured turns of an agent")
    option("--context", "context_tokens", positive, "N", "mean tokens at first")
    option("--append", "append_tokens", positive, "N", "mean tokens a turn adds")
    option("--generate", "generate_tokens", positive, "N", "mean tokens generated")
    option("--snic-rate", "snic_bytes_per_s", rate, "RATE", "of each storage NIC")
    group.add_argument("--cnic-rate", type=rate, default="320MB/s", metavar="RATE", help="of each compute NIC")
    option("--values", "axes", _axis, "AXIS=LIST", "what to vary, such as agents=4,8,16; repeatable", action="append")
    option("--trace", "traces", str, "SOURCE", "recorded agents: files or directories of sessions", nargs="+")
    option("--scale", "scale", positive_number, "N", "divide the traces' token counts by this (default: 16)")
    option("--max-context", "max_context_tokens", positive, "N", "cut traces here (default: 6144)")


def _axis(text: str) -> tuple[str, tuple[float, ...]]:
    name, _, values = text.partition("=")
    try:
        return name.replace("-", "_"), tuple(float(value) for value in values.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like agents=4,8,16") from None


def run(arguments: argparse.Namespace) -> int:
    """Run an experiment; print its table and what it found. Exit code 1 if a turn failed."""
    from dualpath.lab.experiments.catalog import definition

    console = new_console()
    if arguments.list:
        return _list(console)
    if arguments.name is None:
        raise UsageError("which experiment? name one, or see --list")
    with usage_errors(ValueError):
        chosen = definition(arguments.name)
        result, settings = _result(chosen, arguments, console)
    write_json(arguments.json, result)
    _show(chosen, result, settings, console)
    return 1 if any(one.errors for one in result.runs) else 0


def _list(console: "Console") -> int:
    from dualpath.lab.experiments.catalog import EXPERIMENTS

    for one in EXPERIMENTS:
        needs = "; needs --trace" if one.needs_traces else ""
        console.print(f"[bold]{one.name}[/bold]  {one.summary}", highlight=False)
        console.print(f"    mirrors {one.mirrors}; about {one.minutes} minutes{needs}", highlight=False)
        console.print(f"    expect: {one.expect}", highlight=False)
    return 0


def _result(chosen: "Definition", arguments: argparse.Namespace, console: "Console") -> tuple["ResultFile", "Settings"]:
    """Run, or read again, the result. Raises ValueError for options that can't be run."""
    from dualpath.client.replay import ReplayError
    from dualpath.lab.experiments.cluster_process import ClusterError
    from dualpath.lab.experiments.load import Load, make_plan
    from dualpath.lab.experiments.nic_bytes import MetricsError
    from dualpath.lab.experiments.run import result_path, run_plan
    from dualpath.lab.experiments.settings import Settings
    from dualpath.results.file import ResultFileError, load

    given = {name: value for name, value in vars(arguments).items() if name in Load.__struct_fields__}
    given |= {"axes": dict(given["axes"])} if "axes" in given else {}
    given |= {"traces": tuple(given["traces"])} if "traces" in given else {}
    places = {name: getattr(arguments, name) for name in ("out", "work", "model", "seed")}
    shared = {name: value for name, value in places.items() if value is not None}
    if arguments.redraw:
        settings = Settings(**shared)
        with command_errors(ResultFileError):
            return load(result_path(chosen.name, settings)), settings
    wanted = chosen.scaled(arguments.quick, given)
    settings = Settings(
        snic_bytes_per_s=wanted.snic_bytes_per_s,
        cnic_bytes_per_s=arguments.cnic_rate,
        command=shlex.join(arguments.command_line),
        **shared,
    )
    plan = make_plan(chosen.name, wanted, settings.seed, arguments.repeat)
    with (
        command_errors(ClusterError, MetricsError, ReplayError, OSError),
        _telling_what_is_kept(chosen, settings),
        _launcher(arguments.testbed, plan, settings) as make_launcher,
    ):
        return run_plan(plan, settings, console, make_launcher), settings


@contextmanager
def _telling_what_is_kept(chosen: "Definition", settings: "Settings") -> Iterator[None]:
    try:
        yield
    except BaseException:
        print(
            f"what was finished is in {settings.out}/{chosen.name}.json; see it with: "
            f"dualpath experiment {chosen.name} --redraw --out {shlex.quote(str(settings.out))}",
            file=sys.stderr,
        )
        raise


@contextmanager
def _launcher(testbed: bool, plan: "Plan", settings: "Settings") -> Iterator["MakeLauncher"]:
    """Who starts the clusters: this host, or a testbed that lasts as long as the context."""
    if not testbed:
        from dualpath.lab.experiments.run import local_launcher

        yield local_launcher
        return
    from dualpath.lab.testbed.failure import TestbedError
    from dualpath.lab.testbed.launcher import temporary_testbed
    from dualpath.lab.testbed.plan import Rates

    rates = Rates(settings.snic_bytes_per_s, settings.cnic_bytes_per_s)
    with command_errors(TestbedError), temporary_testbed(plan.topologies, rates) as make:
        yield make


def _show(chosen: "Definition", result: "ResultFile", settings: "Settings", console: "Console") -> None:
    from dualpath.lab.experiments.page import write_figure, write_page
    from dualpath.lab.experiments.run import result_path
    from dualpath.lab.experiments.tables import terminal_table

    console.print()
    console.print(terminal_table(result))
    console.print(*chosen.find(result), sep="\n", highlight=False, soft_wrap=True)
    written = [result_path(chosen.name, settings)]
    with command_errors(OSError):
        try:
            written.append(write_figure(chosen, result, settings.out))
        except ValueError as error:
            console.print(f"no figure: {error}", highlight=False)
        written.append(write_page(settings.out))
    written.append(write_report_beside(written[0], result))
    console.print(f"\nwritten: {', '.join(map(str, written))}", highlight=False)
    for one in result.runs:
        for message in one.error_messages:
            print(f"failed on {one.topology} {one.system}: {message}", file=sys.stderr)
