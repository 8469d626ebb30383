"""The command line: argument parsing only. What a command does is in `dualpath.commands`, imported when it is called.

Values are checked here, so a bad one costs no import of torch and ends with one line and exit code 2.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dualpath import __version__
from dualpath.spec.units import parse_bytes, parse_duration_ns, parse_rate

Value = TypeVar("Value")
SYSTEMS = ("basic", "basic-layerwise", "dualpath-rr", "dualpath", "dualpath-split", "de-only", "oracle")
ARCHITECTURES = ("qwen2", "qwen3", "llama", "deepseek_v3")

OVERVIEW = """\
Prefill-decode-disaggregated LLM serving for agents. Every node's storage NIC is one pool: the KV-cache of
earlier turns reaches the prefill engine straight from storage or through a decode engine.
"""
EXAMPLES = """\
examples:
  dualpath demo                                      basic, dualpath and oracle side by side, in minutes
  dualpath serve --model DIR --store DIR             an OpenAI server on http://127.0.0.1:8000/v1
  dualpath serve --topology 1P2D --model DIR --store DIR --snic-rate 100MB/s
  dualpath store stat DIR                            what is in a store
  dualpath plan ds660b-2p4d                          what a cluster can do, and what limits it
  dualpath simulate ds660b-2p4d --agents 500         the same scheduler under a virtual clock, any cluster size
  dualpath paper                                     the paper's evaluation, theirs beside ours
  dualpath COMMAND --help                            a command's options, with examples
"""
SERVE_EXAMPLES = """\
Rates and sizes take units: 60MB/s, 400Gb/s, unlimited; 64MiB, 2GB.

systems:
  basic             reads with prefill engines only, whole prompts at a time (the paper's baseline)
  basic-layerwise   the same, layer by layer
  dualpath-rr       both sides read, in turns
  dualpath          both sides read, the shorter queue first (the default)
  dualpath-split    one request may be read by both sides
  de-only           only decode engines read
  oracle            storage and transfers cost nothing: an upper bound

examples:
  dualpath serve --model ~/models/Qwen3-0.6B --store /mnt/kv
  dualpath serve --topology 1P2D --model .models/demo --store .store/a --snic-rate 60MB/s --cnic-rate 480MB/s
  dualpath serve --model DIR --store DIR --api-key secret --host 0.0.0.0 --port 80
"""
ENGINE_EXAMPLES = """\
example, on a node that shares the store and the model directory with the coordinator's:
  dualpath engine --role decode --coordinator tcp://10.0.0.1:5555 --model DIR --store DIR --transport tcp \\
      --data-host 10.0.0.2
"""
DEMO_EXAMPLES = """\
Each cluster is real: its own processes, real tokens, real bytes in a real store, its NICs held to the given rates.

examples:
  dualpath demo
  dualpath demo --topologies 1P1D --systems basic,dualpath --agents 4 --turns 3
  dualpath demo --trace session.json --scale 16       replay recorded agents, token counts divided by 16
  dualpath demo --repeat 3 --json runs.json           medians of three
"""
PLAN_EXAMPLES = """\
CLUSTER is a preset (ds660b-2p4d, ds660b-44p88d, ds660b-48p96d, ds27b-1p1d, ds27b-2p1d, ds27b-1p2d, qwen32b-1p2d) or a
TOML file. Rates are upper bounds, in closed form.

examples:
  dualpath plan ds660b-2p4d
  dualpath plan ds27b-1p1d --trace 32K --ttft 2s --tpot 30ms
  dualpath plan my-cluster.toml --trace session-1.json session-2.json --max-context 65536
  dualpath plan my-cluster.toml --trace conversation_trace.jsonl --json plan.json
"""

SIMULATE_EXAMPLES = """\
CLUSTER is a preset (ds660b-2p4d, ds660b-44p88d, ds660b-48p96d, ds27b-1p1d, ds27b-2p1d, ds27b-1p2d, qwen32b-1p2d) or a
TOML file. Agents all start at once, unless --aps says how many arrive a second.

examples:
  dualpath simulate ds660b-2p4d --agents 500
  dualpath simulate ds660b-2p4d --system basic --aps 0.2 --duration 30min
  dualpath simulate ds27b-1p1d --trace 32K --agents 200 --json result.json --trace-out timeline.json
  dualpath simulate my-cluster.toml --trace session-1.json session-2.json --agents 100
  dualpath simulate ds660b-2p4d --agents 300 --fault engine_lost:5@60s --fault snic:0@30s*0.1
"""

PAPER_EXAMPLES = """\
Items: cache-compute, pd-range, offline, append-scaling, ablation, balance, pd-sweep, online, working-set, scale-online,
scale-offline, scheduler-cpu, sensitivity. All of them where none is named, which takes one core an hour or so. In the
results directory, items that are run take the place of what is there of them; the others stay.

examples:
  dualpath paper
  dualpath paper cache-compute pd-range ablation --json rows.json
  dualpath paper offline pd-sweep --scale 0.25         a quarter of the agents: quicker, and another question
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; return its exit code: 0, 1 (it failed), 2 (it was wrong), 130 (interrupted)."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    arguments.command_line = ["dualpath", *(sys.argv[1:] if argv is None else argv)]
    from dualpath import commands

    handler: Callable[[argparse.Namespace], int] = getattr(commands, arguments.handler)
    try:
        return handler(arguments)
    except KeyboardInterrupt:
        print("dualpath: interrupted", file=sys.stderr)
        return 130
    except commands.UsageError as error:
        print(f"dualpath {arguments.command}: {error}", file=sys.stderr)
        return 2
    except commands.CommandError as error:
        print(f"dualpath {arguments.command}: {error}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    """All commands. Each sets `handler`, the name of its function in `dualpath.commands`."""
    parser: argparse.ArgumentParser = _parser(
        argparse.ArgumentParser, prog="dualpath", description=OVERVIEW, epilog=EXAMPLES
    )
    parser.add_argument("--version", action="version", version=f"dualpath {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_serve(commands)
    _add_engine(commands)
    _add_store(commands)
    _add_plan(commands)
    _add_simulate(commands)
    _add_paper(commands)
    _add_checkpoint(commands)
    return parser


def _add_serve(commands: Any) -> None:
    parser = _command(commands, "serve", "start a cluster on this host and its OpenAI server", SERVE_EXAMPLES)
    _add_cluster_options(parser)
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    group.add_argument("--port", type=_port, default=8000, help="0 picks a free one (default: %(default)s)")
    group.add_argument("--api-key", action="append", default=[], metavar="KEY", help="accept only these; repeatable")
    group.add_argument("--name", metavar="NAME", help="model name clients use (default: the directory's)")
    group.add_argument(
        "--max-waiting", type=_positive, default=1024, metavar="N", help="beyond this, 429 (%(default)s)"
    )
    group.add_argument("--journal", metavar="FILE", help="write every scheduler input and decision here, as JSON lines")
    group.add_argument("--ready-file", metavar="FILE", help='written once every engine has joined: {"url":…,"pid":…}')
    group.add_argument(
        "--join-address",
        metavar="ADDRESS",
        help="where engines of other hosts join, such as tcp://0.0.0.0:5555; this command then starts none itself",
    )


def _add_engine(commands: Any) -> None:
    parser = _command(commands, "engine", "start one engine that joins a coordinator", ENGINE_EXAMPLES)
    parser.add_argument("--role", choices=("prefill", "decode"), required=True)
    parser.add_argument("--coordinator", metavar="ADDRESS", required=True, help="serve's --join-address")
    parser.add_argument("--rank", type=_not_negative, default=0, help="tells engines of one role apart in logs")
    _add_cluster_options(parser)


def _add_cluster_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("cluster")
    group.add_argument("--model", required=True, metavar="DIR", help="a Hugging Face checkpoint")
    group.add_argument("--store", required=True, metavar="DIR", help="where KV blocks are kept; made if absent")
    group.add_argument(
        "--topology", default="1P1D", help="prefill and decode nodes, such as 1P2D (default: %(default)s)"
    )
    group.add_argument("--system", choices=SYSTEMS, default="dualpath", help="see below (default: %(default)s)")
    group.add_argument("--snic-rate", type=_rate, metavar="RATE", help="of each storage NIC (default: unlimited)")
    group.add_argument("--cnic-rate", type=_rate, metavar="RATE", help="of each compute NIC (default: unlimited)")
    group.add_argument("--buffer", type=_bytes, default="1GiB", metavar="SIZE", help="PE or DE buffer (%(default)s)")
    group.add_argument("--hbm", type=_bytes, default="1GiB", metavar="SIZE", help="KV memory of a DE (%(default)s)")
    group.add_argument("--store-quota", type=_bytes, metavar="SIZE", help="evict beyond this (default: no quota)")
    group.add_argument("--transport", choices=("shm", "tcp"), default="shm", help="engine to engine (%(default)s)")
    group.add_argument(
        "--data-host",
        default="127.0.0.1",
        metavar="HOST",
        help="address at which other engines reach this host's with --transport tcp (default: %(default)s)",
    )
    group.add_argument("--threads", type=_positive, default=1, metavar="N", help="torch's, per engine (%(default)s)")
    group.add_argument(
        "--quota-ms", type=_positive_number, default=300, metavar="MS", help="compute quota (%(default)s)"
    )
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    group.add_argument("--device", default="cpu", help="cpu, or cuda where there is one (default: %(default)s)")


def _add_store(commands: Any) -> None:
    parser = _command(commands, "store", "look into a KV store, or check it", "")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    stat = _command(actions, "stat", "what is in a store", "example:\n  dualpath store stat .store/a\n", "store_stat")
    fsck = _command(
        actions,
        "fsck",
        "check every block of a store; exit code 1 if anything is bad",
        "example:\n  dualpath store fsck .store/a --repair    move bad blocks aside, remove orphans and leftovers\n",
        "store_fsck",
    )
    fsck.add_argument("--repair", action="store_true", help="repair what is found")
    for action in (stat, fsck):
        action.add_argument("directory", metavar="DIR", type=Path)
        action.add_argument("--json", metavar="FILE", type=Path, help="write the report here too")


def _add_plan(commands: Any) -> None:
    parser = _command(commands, "plan", "what a cluster can do for agents, and what limits it", PLAN_EXAMPLES)
    parser.add_argument("cluster", metavar="CLUSTER", help="a preset or a TOML file, see below")
    parser.add_argument(
        "--trace",
        nargs="+",
        default=["64K"],
        metavar="TRACE",
        help="32K, 48K or 64K (the paper's), a Mooncake .jsonl, or WEKA sessions (default: 64K)",
    )
    parser.add_argument("--model", metavar="MODEL", help="instead of the cluster's: a name, or a config.json")
    parser.add_argument("--max-context", type=_positive, metavar="N", help="end recorded agents here")
    parser.add_argument("--aps", type=_positive_number, metavar="RATE", help="agents per second, for the working set")
    parser.add_argument("--ttft", type=_duration_ns, default="4s", metavar="TIME", help="SLO (default: %(default)s)")
    parser.add_argument("--tpot", type=_duration_ns, default="50ms", metavar="TIME", help="SLO (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan here too")


def _add_simulate(commands: Any) -> None:
    parser = _command(commands, "simulate", "the scheduler under a virtual clock, on any cluster", SIMULATE_EXAMPLES)
    parser.add_argument("cluster", metavar="CLUSTER", help="a preset or a TOML file, see below")
    parser.add_argument("--system", choices=SYSTEMS, default="dualpath", help="(default: %(default)s)")
    parser.add_argument(
        "--trace",
        nargs="+",
        default=["64K"],
        metavar="TRACE",
        help="32K, 48K or 64K (the paper's), a Mooncake .jsonl, or WEKA sessions (default: 64K)",
    )
    parser.add_argument("--model", metavar="MODEL", help="instead of the cluster's: a name, or a config.json")
    parser.add_argument("--max-context", type=_positive, metavar="N", help="end recorded agents here")
    parser.add_argument("--agents", type=_positive, metavar="N", help="(default: 500, or one per recorded agent)")
    parser.add_argument("--aps", type=_positive_number, metavar="RATE", help="agents per second, Poisson")
    parser.add_argument(
        "--duration", type=_duration_ns, metavar="TIME", help="stop after so long (default: at the end)"
    )
    parser.add_argument("--append-scale", type=_positive_number, default=1.0, metavar="X", help="times every append")
    parser.add_argument("--generate-scale", type=_positive_number, default=1.0, metavar="X", help="times every answer")
    parser.add_argument("--seed", type=_not_negative, default=0, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--fault", action="append", default=[], metavar="FAULT", help="KIND:NUMBER@TIME[*FACTOR]")
    parser.add_argument("--exact", action="store_true", help="every block, layer and step an event; small cases only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here too")
    parser.add_argument("--trace-out", type=Path, metavar="FILE", help="a timeline for chrome://tracing or Perfetto")


def _add_paper(commands: Any) -> None:
    parser = _command(commands, "paper", "the paper's evaluation: theirs beside ours", PAPER_EXAMPLES)
    parser.add_argument("items", nargs="*", metavar="ITEM", help="(default: all)")
    parser.add_argument("--scale", type=_positive_number, default=1.0, metavar="X", help="times the agents at once")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/results"), metavar="DIR", help="of the results (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows, constants and every simulation's result")


def _add_checkpoint(commands: Any) -> None:
    parser = _command(
        commands,
        "checkpoint",
        "make a tiny seeded model to try things with",
        "example:\n  dualpath checkpoint .models/tiny --architecture deepseek_v3\n",
    )
    parser.add_argument("path", metavar="PATH", type=Path)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="qwen3", help="(default: %(default)s)")
    parser.add_argument("--seed", type=_not_negative, default=0, help="of its weights (default: %(default)s)")
    parser.add_argument("--demo", action="store_true", help="the demo's model: qwen3, 16 KiB of KV a token, own seed")


def _add_demo(commands: Any) -> None:
    parser = _command(commands, "demo", "run systems side by side on real clusters and compare them", DEMO_EXAMPLES)
    # What is not given stays out of the namespace: DemoOptions has the defaults, and None means no limit.
    parser.argument_default = argparse.SUPPRESS
    group = parser.add_argument_group("what to run")
    group.add_argument("--topologies", type=_names, metavar="LIST", help="(default: 1P1D,1P2D)")
    group.add_argument("--systems", type=_systems, metavar="LIST", help="(default: basic,dualpath,oracle)")
    group.add_argument(
        "--snic-rate", type=_rate, metavar="RATE", dest="snic_bytes_per_s", help="of each storage NIC (default: 40MB/s)"
    )
    group.add_argument(
        "--cnic-rate",
        type=_rate,
        metavar="RATE",
        dest="cnic_bytes_per_s",
        help="of each compute NIC (default: 320MB/s)",
    )
    group.add_argument("--repeat", type=_positive, metavar="N", dest="repeats", help="medians of N (default: 1)")
    group.add_argument("--model", type=Path, metavar="DIR", help="(default: .models/demo, made if absent)")
    group = parser.add_argument_group("agents")
    group.add_argument(
        "--agents", type=_positive, metavar="N", help="all start at once (default: 12, or one per trace)"
    )
    group.add_argument("--turns", type=_positive, metavar="N", help="measured turns of an agent (default: 4)")
    group.add_argument(
        "--context",
        type=_positive,
        metavar="N",
        dest="first_context_tokens",
        help="mean tokens at first (default: 2800)",
    )
    group.add_argument(
        "--append", type=_positive, metavar="N", dest="append_tokens", help="mean tokens a turn adds (default: 64)"
    )
    group.add_argument(
        "--generate", type=_positive, metavar="N", dest="generate_tokens", help="mean tokens generated (default: 16)"
    )
    group.add_argument("--seed", type=_not_negative, metavar="N", help="of the agents (default: 0)")
    group.add_argument("--trace", type=Path, nargs="+", dest="traces", metavar="FILE", help="WEKA sessions to replay")
    group.add_argument("--scale", type=_positive_number, help="divide the traces' token counts by this (default: 16)")
    group.add_argument(
        "--max-context", type=_positive, dest="max_context_tokens", metavar="N", help="cut traces here (default: 6144)"
    )
    group = parser.add_argument_group("results")
    group.add_argument("--out", type=Path, metavar="DIR", help="demo.json, demo.png and logs (default: results)")
    group.add_argument("--work", type=Path, metavar="DIR", help="for the stores, removed again (default: .store)")
    group.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the result here too")


def _command(commands: Any, name: str, summary: str, epilog: str, handler: str | None = None) -> Any:
    parser = _parser(commands.add_parser, name, help=summary, description=summary.capitalize() + ".", epilog=epilog)
    parser.set_defaults(handler=handler or name)
    return parser


def _parser(make: Callable[..., Any], *names: str, **texts: Any) -> Any:
    return make(*names, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **texts)


def _argument(parse: Callable[[str], Value]) -> Callable[[str], Value]:
    """`parse` with the message of its ValueError shown to the user as it is."""

    def checked(text: str) -> Value:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return checked


def _whole(least: int, most: int | None, what: str) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ValueError(f"{text!r} is not {what}") from None
        if value < least or (most is not None and value > most):
            raise ValueError(f"{text} is not {what}")
        return value

    return _argument(parse)


def _parse_positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"{text!r} is not a number above 0")
    return value


def _parse_names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _parse_systems(text: str) -> tuple[str, ...]:
    names = _parse_names(text)
    unknown = [name for name in names if name not in SYSTEMS]
    if unknown:
        raise ValueError(f"unknown system {unknown[0]!r}; choose from {', '.join(SYSTEMS)}")
    return names


_rate = _argument(parse_rate)
_bytes = _argument(parse_bytes)
_duration_ns = _argument(parse_duration_ns)
_positive = _whole(1, None, "a whole number from 1 up")
_not_negative = _whole(0, None, "a whole number from 0 up")
_port = _whole(0, 65535, "a port, 0 to 65535")
_positive_number = _argument(_parse_positive_number)
_names = _argument(_parse_names)
_systems = _argument(_parse_systems)
