"""``dualpath checkpoint``."""

import argparse
from pathlib import Path
from typing import Any

from dualpath.cli.arguments import command, not_negative
from dualpath.cli.outcome import UsageError, command_errors

ARCHITECTURES = ("qwen2", "qwen3", "llama", "deepseek_v3")


def add(commands: Any) -> None:
    parser = command(
        commands,
        "checkpoint",
        "make a tiny seeded model to try things with",
        "example:\n  dualpath checkpoint .models/tiny --architecture deepseek_v3\n",
        run,
    )
    parser.add_argument("path", metavar="PATH", type=Path)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="qwen3", help="(default: %(default)s)")
    parser.add_argument("--seed", type=not_negative, default=0, help="seed of the weights (default: %(default)s)")
    parser.add_argument("--demo", action="store_true", help="the demo's model: qwen3, 16 KiB of KV per token, own seed")


def run(arguments: argparse.Namespace) -> int:
    """Makes a tiny checkpoint."""
    if arguments.path.exists():
        raise UsageError(f"{arguments.path} exists; give a new directory")
    from dualpath.model.checkpoint import DEMO_MODEL, make_checkpoint

    chosen = DEMO_MODEL if arguments.demo else {"architecture": arguments.architecture, "seed": arguments.seed}
    with command_errors(OSError):
        make_checkpoint(arguments.path, **chosen)
    print(arguments.path)
    return 0
