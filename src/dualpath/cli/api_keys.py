"""Where ``dualpath serve`` takes its clients' keys from: a file, the environment, or its arguments."""

import argparse
import os
import stat
from pathlib import Path
from typing import Any

from dualpath.cli.outcome import UsageError

KEY_VARIABLE = "DUALPATH_API_KEY"


def add_key_options(group: Any) -> None:
    file = f"accept only the keys in it, one a line, # for comments; ${KEY_VARIABLE} has one more"
    group.add_argument("--api-key-file", type=Path, metavar="FILE", help=file)
    keys = "accept this key; repeatable. Every user of this host can read it in the list of processes"
    group.add_argument("--api-key", action="append", default=[], dest="api_keys", metavar="KEY", help=keys)


def api_keys(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Returns all keys, each once. Raises UsageError. Processes that this one starts don't inherit them."""
    keys = [*arguments.api_keys, *_of_file(arguments.api_key_file)]
    if KEY_VARIABLE in os.environ:
        keys.append(os.environ.pop(KEY_VARIABLE))
    if not all(key.strip() for key in keys):
        raise UsageError(f"an API key is empty; give --api-key, --api-key-file and ${KEY_VARIABLE} keys with letters")
    return tuple(dict.fromkeys(key.strip() for key in keys))


def _of_file(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        mode, text = path.stat().st_mode, path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--api-key-file: cannot read {path}: {error}") from error
    if mode & stat.S_IRWXO:
        raise UsageError(f"--api-key-file: every user of this host has access to {path}; chmod o-rwx {path}")
    keys = [line for line in map(str.strip, text.splitlines()) if line and not line.startswith("#")]
    if not keys:
        raise UsageError(f"--api-key-file: {path} has no key; write one a line")
    return keys
