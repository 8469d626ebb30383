"""Options that `demo` and `experiment` share. `Conditions` and `Bench` have their names and defaults."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from dualpath.cli.arguments import SOURCES_HELP, not_negative, positive, positive_number, rate, systems, topologies
from dualpath.lab.experiments.conditions import GENERATED_AGENTS, Bench, Conditions
from dualpath.spec.cluster_setup import ENGINES


def add_series_options(parser: argparse.ArgumentParser, conditions: Conditions | None, out: Path) -> None:
    """Options not given stay out of the namespace. `conditions` has defaults; None: each experiment has its own."""
    bench = Bench(out=out)
    group: Any = parser.add_argument_group("what to run")

    def option(flag: str, field: str, kind: Any, metavar: str, text: str, **more: Any) -> None:
        holder = bench if field in Bench.__struct_fields__ else conditions
        default = "" if holder is None else f" (default: {_shown(getattr(holder, field))})"
        more = {"default": argparse.SUPPRESS, "help": f"{text}{default}"} | more
        group.add_argument(flag, dest=field, type=kind, metavar=metavar, **more)

    option("--topologies", "topologies", topologies, "LIST", "prefill and decode nodes")
    option("--systems", "systems", systems, "LIST", "systems to compare")
    option("--snic-rate", "snic_bytes_per_s", rate, "RATE", "rate of each storage NIC")
    option("--cnic-rate", "cnic_bytes_per_s", rate, "RATE", "rate of each compute NIC")
    option("--repeat", "repeats", positive, "N", "runs per system, for medians")
    option("--model", "model", Path, "DIR", "a checkpoint, made if absent")
    option("--engine", "engine", str, "NAME", "what computes: dualpath, or vllm", choices=ENGINES)
    option("--transport", "transport", str, "NAME", "", help="what moves KV between engines (default: shm)")
    group = parser.add_argument_group("agents")
    option("--agents", "agents", positive, "N", "agents, all at once")
    option("--turns", "turns", positive, "N", "measured turns of an agent")
    option("--context", "context_tokens", positive, "N", "mean tokens of the first prompt")
    option("--append", "append_tokens", positive, "N", "mean tokens that a turn appends")
    option("--generate", "generate_tokens", positive, "N", "mean tokens that a turn generates")
    option("--seed", "seed", not_negative, "N", "seed of the agents")
    group.add_argument(
        "--trace", nargs="+", dest="traces", metavar="TRACE", default=argparse.SUPPRESS, help=SOURCES_HELP
    )
    option("--scale", "scale", positive_number, "N", "divide the traces' token counts by this")
    option("--max-context", "max_context_tokens", positive, "N", "cut traces at N tokens")
    group = parser.add_argument_group("results")
    option("--out", "out", Path, "DIR", "directory of the result file, figure, page and logs")
    option("--work", "work", Path, "DIR", "directory of the stores, which are removed again")
    group.add_argument("--json", type=Path, metavar="FILE", help="write the result here too")


def given_conditions(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields of `Conditions` that the command line gives."""
    given = {name: value for name, value in vars(arguments).items() if name in Conditions.__struct_fields__}
    given |= {"axes": dict(given["axes"])} if "axes" in given else {}
    return given | ({"traces": tuple(given["traces"])} if "traces" in given else {})


def bench_of(arguments: argparse.Namespace, out: Path) -> Bench:
    """Makes the `Bench`. Raises ValueError."""
    given = {name: value for name, value in vars(arguments).items() if name in Bench.__struct_fields__}
    return Bench(**({"out": out} | given | {"command": shlex.join(arguments.command_line)}))


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(value)
    if isinstance(value, int) and value >= 1_000_000:
        return f"{value / 1e6:g}MB/s"
    return f"{GENERATED_AGENTS}, or one per recording" if value is None else f"{value}"
