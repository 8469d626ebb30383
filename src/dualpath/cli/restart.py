"""``dualpath restart``: every part of a running server in turn, without a request lost."""

import argparse
from typing import Any

import msgspec

from dualpath.cli.arguments import command
from dualpath.cli.outcome import UsageError

EXAMPLES = """\
Each engine ends what it has in hand and is replaced; then the server itself is. Requests wait where they must.

example:
  dualpath serve ~/models/Qwen3-0.6B --ready-file /run/dualpath.json
  dualpath restart --ready-file /run/dualpath.json
"""


class _Ready(msgspec.Struct):
    """What is read of a ready file."""

    orders: str


def add(commands: Any) -> None:
    parser = command(commands, "restart", "restart the parts of a running server, one by one", EXAMPLES, run)
    parser.add_argument("--ready-file", metavar="FILE", required=True, help="serve's own")


def run(arguments: argparse.Namespace) -> int:
    """Restarts all parts of the server that has written the ready file. Returns 1 when one could not be."""
    from dualpath.serving.orders_socket import RESTART, give_order

    path = arguments.ready_file
    try:
        with open(path, "rb") as file:
            ready = msgspec.json.decode(file.read(), type=_Ready)
    except OSError as error:
        raise UsageError(f"--ready-file: {path} can't be read: {error.strerror}; is the server ready?") from error
    except msgspec.MsgspecError as error:
        raise UsageError(f"--ready-file: {path} is not the ready file of `dualpath serve`: {error}") from error
    try:
        why = give_order(ready.orders, RESTART, lambda line: print(line, flush=True))
    except OSError as error:
        raise UsageError(f"--ready-file: the server of {path} does not run any more ({error.strerror})") from error
    print(f"dualpath restart: {why}" if why else "all parts have been restarted", flush=True)
    return 1 if why else 0
