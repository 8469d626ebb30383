"""Where ``dualpath serve`` takes its clients' keys from: a file, the environment, or its arguments."""

import argparse
import os
import re
from pathlib import Path
from typing import Any

from dualpath.cli.outcome import UsageError
from dualpath.spec.private_files import read_secret

KEY_VARIABLE = "DUALPATH_API_KEY"
_SENDABLE = re.compile("[!-~]+")
"""What an HTTP header can carry as one word."""


def add_key_options(group: Any) -> None:
    file = f"accept only the keys in it, one a line, # for comments; ${KEY_VARIABLE} has one more"
    group.add_argument("--api-key-file", type=Path, metavar="FILE", help=file)
    keys = "accept this key; repeatable. Every user of this host can read it in the list of processes"
    group.add_argument("--api-key", action="append", default=[], dest="api_keys", metavar="KEY", help=keys)


def api_keys(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Returns all keys, each once. Raises UsageError. Processes that this one starts don't inherit them."""
    keys = [("--api-key", key) for key in arguments.api_keys]
    keys += [(f"--api-key-file: {arguments.api_key_file}", key) for key in _of_file(arguments.api_key_file)]
    if KEY_VARIABLE in os.environ:
        keys.append((f"${KEY_VARIABLE}", os.environ.pop(KEY_VARIABLE)))
    for source, key in keys:
        if not key.strip():
            raise UsageError(f"{source}: a key is empty; give one with letters")
        if not _SENDABLE.fullmatch(key.strip()):
            raise UsageError(
                f"{source}: a key has a space, or a letter beyond ASCII, which clients can't send; write one key a line"
            )
    return tuple(dict.fromkeys(key.strip() for _, key in keys))


def _of_file(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        text = read_secret(path)
    except ValueError as error:
        raise UsageError(f"--api-key-file: {error}") from None
    keys = [line for line in map(str.strip, text.splitlines()) if line and not line.startswith("#")]
    if not keys:
        raise UsageError(f"--api-key-file: {path} has no key; write one a line")
    return keys
