"""The command line. Each command has a module that parses its arguments and imports the working code when called.

Values are checked while they are parsed, so a bad value ends with one line and exit code 2, without importing torch.
"""

import argparse
import sys
from collections.abc import Sequence

from dualpath import __version__
from dualpath.cli import (
    agent,
    checkpoint,
    demo,
    engine,
    experiment,
    faults,
    paper,
    plan,
    profile,
    qos,
    replay,
    report,
    restart,
    serve,
    simulate,
    store,
    testbed,
)
from dualpath.cli.arguments import Parser, parser_of
from dualpath.cli.cluster_options import before_dashes
from dualpath.cli.outcome import CommandError, UsageError
from dualpath.spec.extras import how_to_install

COMMANDS = (
    demo,
    experiment,
    replay,
    report,
    serve,
    restart,
    engine,
    agent,
    store,
    plan,
    simulate,
    profile,
    paper,
    testbed,
    qos,
    faults,
    checkpoint,
)
"""Command modules in the order of ``dualpath --help``; each has ``add(commands)``."""
PASS_ON = (["serve"], ["engine"])
"""Commands that pass on what follows ``--``."""

OVERVIEW = """\
Prefill-decode-disaggregated LLM serving for agents. All storage NICs form one pool: the KV-cache of earlier
turns reaches the prefill engine straight from storage or through a decode engine.
"""
EXAMPLES = """\
examples:
  dualpath demo                                      basic, dualpath and oracle side by side, in minutes
  dualpath experiment ablation                       one of the paper's experiments on real clusters
  dualpath report results/demo.json                  one HTML page: charts, every turn, a timeline
  dualpath serve --model DIR --store DIR             an OpenAI server on http://127.0.0.1:8000/v1
  dualpath serve --topology 1P2D --model DIR --store DIR --snic-rate 100MB/s
  dualpath store stat DIR                            what a store holds
  dualpath plan ds660b-2p4d                          what a cluster can do, and what limits it
  dualpath simulate ds660b-2p4d --agents 500         the same scheduler under a virtual clock, any cluster size
  dualpath profile --model DIR --store DIR           measure this machine, for plan and simulate
  dualpath paper                                     simulate the paper's evaluation, theirs beside ours
  sudo dualpath testbed up 1P2D                      network namespaces, kernel rates, a real object server
  dualpath qos check --fabric infiniband             does the fabric keep KV out of the messages' way?
  dualpath faults sim --steps 1000000                break the scheduler in every way, and see that it holds
  dualpath COMMAND --help                            a command's options, with examples
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code: 0, 1 (failed), 2 (bad command line), 130 (interrupted)."""
    words = sys.argv[1:] if argv is None else list(argv)
    arguments = build_parser().parse_args(before_dashes(words) if words[:1] in PASS_ON else words)
    arguments.command_line = ["dualpath", *words]
    try:
        code: int = arguments.run(arguments)
    except KeyboardInterrupt:
        print("dualpath: interrupted", file=sys.stderr)
        return 130
    except UsageError as error:
        print(f"dualpath {arguments.command}: {error}", file=sys.stderr)
        return 2
    except CommandError as error:
        print(f"dualpath {arguments.command}: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        hint = how_to_install(error)
        if hint is None:
            raise
        print(f"dualpath {arguments.command}: {hint}", file=sys.stderr)
        return 1
    return code


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of all commands. Each command sets `run`, the function that executes it."""
    parser: argparse.ArgumentParser = parser_of(Parser, prog="dualpath", description=OVERVIEW, epilog=EXAMPLES)
    parser.add_argument("--version", action="version", version=f"dualpath {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in COMMANDS:
        module.add(commands)
    return parser
