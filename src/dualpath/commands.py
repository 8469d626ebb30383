"""What the commands of `dualpath.cli` do: fill a configuration, call the package that does the work, print.

A bad value becomes a `UsageError` (exit code 2), a failure a `CommandError` (exit code 1): one message, no traceback. A
bug keeps its traceback.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from rich.console import Console

    from dualpath.runtime.config import ClusterConfig

MIN_CONSOLE_WIDTH = 110
"""Of output that goes to no terminal: wide enough for the demo's table."""


class UsageError(Exception):
    """The command line asks for something that can't be."""


class CommandError(Exception):
    """The command was right and failed."""


def demo(arguments: argparse.Namespace) -> int:
    """Run the demo; print its table and what it means. Exit code 1 if a turn failed."""
    from dualpath.demo.cluster import ClusterError
    from dualpath.demo.nic_bytes import MetricsError
    from dualpath.demo.options import DemoOptions
    from dualpath.demo.run import run_demo
    from dualpath.demo.workload import build_trajectories
    from dualpath.report.summary import explain
    from dualpath.report.table import run_table
    from dualpath.workload import ReplayError

    given = {name: value for name, value in vars(arguments).items() if name in DemoOptions.__struct_fields__}
    given |= {name: tuple(given[name]) for name in ("traces",) if name in given}
    given |= {"command": shlex.join(arguments.command_line)}
    with _usage_errors(ValueError):
        options = DemoOptions(**given)
        trajectories = build_trajectories(options)
    console = _console()
    with _command_errors(ClusterError, MetricsError, ReplayError, OSError):
        result = run_demo(options, trajectories, console)
    _write_json(arguments.json, result)
    console.print()
    console.print(run_table(result))
    console.print(*explain(result), sep="\n", highlight=False, soft_wrap=True)
    console.print(f"\nwritten: {options.out}/demo.json, {options.out}/demo.png", highlight=False)
    for run in result.runs:
        for message in run.error_messages:
            print(f"failed on {run.topology} {run.system}: {message}", file=sys.stderr)
    return 1 if any(run.errors for run in result.runs) else 0


def serve(arguments: argparse.Namespace) -> int:
    """Run a cluster and its server until it is told to stop; with --join-address, engines come from elsewhere."""
    config = _cluster_config(arguments)
    from dualpath.serve import run

    return run(config, local_engines=arguments.join_address is None)


def engine(arguments: argparse.Namespace) -> int:
    """Run one engine in this process until its coordinator lets it go."""
    from dualpath.core.vocabulary import Role
    from dualpath.runtime.engine_main import run_engine
    from dualpath.runtime.messages import EngineConfig

    role = Role(arguments.role)
    run_engine(
        EngineConfig(
            role=role,
            coordinator=arguments.coordinator,
            cluster=_cluster_config(arguments),
            name=f"{role.value}-{arguments.rank}",
        )
    )
    return 0


def checkpoint(arguments: argparse.Namespace) -> int:
    """Make a tiny checkpoint."""
    if arguments.path.exists():
        raise UsageError(f"{arguments.path} exists; give a new directory")
    from dualpath.engine.checkpoint import DEMO_MODEL, make_checkpoint

    chosen = DEMO_MODEL if arguments.demo else {"architecture": arguments.architecture, "seed": arguments.seed}
    with _command_errors(OSError):
        make_checkpoint(arguments.path, **chosen)
    print(arguments.path)
    return 0


def plan(arguments: argparse.Namespace) -> int:
    """Print what a cluster can do for a workload."""
    from dualpath.plan import PlanError, Slo, plan_capacity
    from dualpath.plan.traces import load_of
    from dualpath.report.plan import plan_sentences, resource_table, split_table
    from dualpath.spec.cluster import ClusterError, load_cluster
    from dualpath.workload.weka import TraceError

    slo = Slo(ttft_s=arguments.ttft / 1e9, tpot_s=arguments.tpot / 1e9)
    with _usage_errors(ClusterError, TraceError, PlanError):
        cluster = load_cluster(arguments.cluster)
        if arguments.model is not None:
            cluster = cluster.with_model(arguments.model)
        answer = plan_capacity(cluster, load_of(arguments.trace, arguments.max_context), slo, arguments.aps)
    _write_json(arguments.json, answer)
    document = msgspec.to_builtins(answer)
    console = _console()
    console.print(resource_table(document), split_table(document))
    console.print(*plan_sentences(document), sep="\n\n", highlight=False)
    return 0


def simulate(arguments: argparse.Namespace) -> int:
    """Simulate a cluster; print what came out. Exit code 1 if a turn failed."""
    from dualpath.sim.command import SimulationError, run_command
    from dualpath.sim.table import result_table

    console = _console()
    with _usage_errors(SimulationError), _command_errors(OSError):
        result = run_command(arguments, console)
    _write_json(arguments.json, result)
    console.print(result_table(result))
    return 1 if result.failed else 0


def paper(arguments: argparse.Namespace) -> int:
    """Simulate the paper's evaluation; print and write theirs beside ours."""
    from dualpath.paper.archive import ArchiveError, merged
    from dualpath.paper.document import document_of, table_of, write_results
    from dualpath.paper.items import ITEMS, SENSITIVITY, check_names
    from dualpath.paper.runner import Runner
    from dualpath.paper.sensitivity import sensitivity

    console = _console()
    names = arguments.items or [*ITEMS, SENSITIVITY]
    with _usage_errors(ValueError):
        check_names(names)
        runner = Runner(arguments.scale, announce=lambda name: console.print(f"simulating {name}", highlight=False))
    rows = []
    with _command_errors(ArchiveError, OSError):
        archive = merged(arguments.out, [], [], runner)
        for name in names:  # written after each: what an interrupted run has found is kept
            fresh = [] if name == SENSITIVITY else ITEMS[name](runner)
            archive = merged(arguments.out, fresh, sensitivity(runner) if name == SENSITIVITY else [], runner)
            write_results(archive, arguments.out)
            rows += fresh
    _write_json(arguments.json, document_of(archive, runner))
    console.print(table_of(rows))
    console.print(f"written: {arguments.out}/paper.md, paper.png and paper.json", highlight=False)
    return 0


def store_stat(arguments: argparse.Namespace) -> int:
    """Print what is in a store."""
    from dualpath.kv.inspect import stat
    from dualpath.kv.store import StoreError
    from dualpath.report.store import stat_table

    _check_directory(arguments.directory)
    with _command_errors(StoreError):
        report = stat(arguments.directory)
    _write_json(arguments.json, report)
    _console().print(stat_table(msgspec.to_builtins(report)))
    return 0


def store_fsck(arguments: argparse.Namespace) -> int:
    """Check a store. Exit code 1 if something is bad and was not repaired."""
    from dualpath.kv.inspect import fsck
    from dualpath.kv.store import StoreError
    from dualpath.report.store import fsck_lines

    _check_directory(arguments.directory)
    console = _console()
    with _command_errors(StoreError), _file_progress(console) as progress:
        report = fsck(arguments.directory, repair=arguments.repair, progress=progress)
    _write_json(arguments.json, report)
    console.print(*fsck_lines(msgspec.to_builtins(report)), sep="\n", highlight=False, soft_wrap=True)
    return 0 if report.is_clean or report.repaired else 1


def _cluster_config(arguments: argparse.Namespace) -> "ClusterConfig":
    from dualpath.runtime.config import ClusterConfig, Topology

    given: dict[str, Any] = {
        "model": arguments.model,
        "store": arguments.store,
        "system": arguments.system,
        "snic_bytes_per_s": arguments.snic_rate,
        "cnic_bytes_per_s": arguments.cnic_rate,
        "buffer_bytes": arguments.buffer,
        "hbm_bytes": arguments.hbm,
        "store_quota_bytes": arguments.store_quota,
        "transport": arguments.transport,
        "data_host": arguments.data_host,
        "threads": arguments.threads,
        "quota_ns": round(arguments.quota_ms * 1_000_000),
        "dtype": arguments.dtype,
        "device": arguments.device,
    }
    if arguments.command == "serve":
        given |= {
            "host": arguments.host,
            "port": arguments.port,
            "api_keys": tuple(arguments.api_key),
            "served_model_name": arguments.name,
            "max_waiting": arguments.max_waiting,
            "journal": arguments.journal,
            "ready_file": arguments.ready_file,
        }
        given |= {"control_address": arguments.join_address} if arguments.join_address else {}
    if not (Path(arguments.model) / "config.json").is_file():
        raise UsageError(f"--model: {arguments.model} has no config.json; give a Hugging Face checkpoint's directory")
    with _usage_errors(ValueError):
        return ClusterConfig(topology=Topology.parse(arguments.topology), **given)


def _console() -> "Console":
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, MIN_CONSOLE_WIDTH))


def _check_directory(path: Path) -> None:
    if not path.is_dir():
        raise UsageError(f"{path} is not a directory; give a store's")


def _write_json(path: Path | None, report: Any) -> None:
    if path is not None:
        with _command_errors(OSError):
            path.write_bytes(msgspec.json.encode(report) + b"\n")


@contextmanager
def _file_progress(console: "Console") -> Iterator[Any]:
    from rich.progress import Progress

    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("checking", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def _usage_errors(*kinds: type[Exception]) -> Iterator[None]:
    try:
        yield
    except kinds as error:
        raise UsageError(str(error)) from error


@contextmanager
def _command_errors(*kinds: type[Exception]) -> Iterator[None]:
    try:
        yield
    except kinds as error:
        raise CommandError(str(error)) from error
