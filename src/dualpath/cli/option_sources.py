"""A command's options from a file and from the environment: command line > environment > file > default.

An option has one name everywhere: ``--max-waiting 9`` on the command line, ``max-waiting: 9`` in the file,
``DUALPATH_SERVE_MAX_WAITING=9`` in the environment. Values are written as on the command line, and checked as there.
"""

import argparse
import json
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dualpath.cli.arguments import did_you_mean
from dualpath.cli.outcome import UsageError

HELP = """\
Every option can also be set in the environment, as {prefix}MAX_WAITING=9 for --max-waiting 9, and in a file that
--config names (.yaml, .toml or .json), as max-waiting: 9. The command line wins over the environment, the environment
over the file. Options that take several values are lists in the file and split at spaces in the environment.
"""


def prefix_of(command: str) -> str:
    return f"DUALPATH_{command.upper()}_"


def parse_with_sources(
    parser: argparse.ArgumentParser, command: str, argv: Sequence[str], environment: Mapping[str, str] = os.environ
) -> argparse.Namespace:
    """Parse `argv` again, over what the environment and the file named by --config say.

    `parser` must be new: its defaults change. Raises UsageError that names the variable, or the file and the key.
    """
    options = {
        flag.removeprefix("--"): action
        for action in parser._actions
        for flag in action.option_strings
        if flag.startswith("--") and flag != "--help"
    }
    given = parser.parse_args(argv)
    from_environment = dict(_of_environment(environment, prefix_of(command), options))
    file = given.config or from_environment.get("config")
    if file is not None:
        parser.set_defaults(**dict(_of_file(Path(file), options)))
    parser.set_defaults(**from_environment)
    return parser.parse_args(argv)


def _of_environment(
    environment: Mapping[str, str], prefix: str, options: Mapping[str, argparse.Action]
) -> Iterable[tuple[str, Any]]:
    for name, text in sorted(environment.items()):
        if not name.startswith(prefix):
            continue
        where = name
        if "_SERVICE_" in name or text.startswith("tcp://"):
            where += " (as Kubernetes sets it for a service of that name; enableServiceLinks: false prevents it)"
        action = _find(name.removeprefix(prefix).lower(), options, where)
        yield action.dest, _value(action, text.split() if _takes_several(action) else text, where)


def _of_file(path: Path, options: Mapping[str, argparse.Action]) -> Iterable[tuple[str, Any]]:
    for key, value in _read(path).items():
        where = f"{path}: {key}"
        action = _find(str(key).removeprefix("--"), options, where)
        if action.dest == "config":
            raise UsageError(f"{where}: a file can't name another")
        if value is not None:
            yield action.dest, _value(action, value, where)


def _read(path: Path) -> dict[str, Any]:
    import yaml  # not above, because --help must be quick

    readers: dict[str, Callable[[str], Any]] = {
        ".yaml": yaml.safe_load,
        ".yml": yaml.safe_load,
        ".toml": tomllib.loads,
        ".json": json.loads,
    }
    reader = readers.get(path.suffix)
    if reader is None:
        raise UsageError(f"--config: {path} must end in {', '.join(readers)}")
    try:
        told = reader(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"--config: {path} can't be read: {' '.join(str(error).split())}") from error
    if not isinstance(told, dict):
        raise UsageError(f"--config: {path} must be a table of options, such as max-waiting: 9")
    return told


def _find(name: str, options: Mapping[str, argparse.Action], where: str) -> argparse.Action:
    action = options.get(name.replace("_", "-"))
    if action is None:
        name = name.replace("_", "-")
        raise UsageError(f"{where}: there is no option --{name}{did_you_mean(name, options)}")
    return action


def _takes_several(action: argparse.Action) -> bool:
    return action.nargs == "+" or isinstance(action, argparse._AppendAction)


def _value(action: argparse.Action, value: Any, where: str) -> Any:
    """Returns a value as the command line would have it."""
    if action.nargs == 0:
        return _truth(value, where)
    if _takes_several(action):
        return [_one(action, each, where) for each in (value if isinstance(value, list) else [value])]
    return _one(action, value, where)


def _truth(value: Any, where: str) -> bool:
    known = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    found = known.get(str(value).lower())
    if found is None:
        raise UsageError(f"{where} must be true or false")
    return found


def _one(action: argparse.Action, value: Any, where: str) -> Any:
    if isinstance(value, dict):
        value = json.dumps(value)
    if isinstance(value, bool | list):
        raise UsageError(f"{where} takes one value, not {type(value).__name__}")
    try:
        made = action.type(str(value)) if callable(action.type) else str(value)
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise UsageError(f"{where}: {error}") from error
    if action.choices is not None and made not in action.choices:
        raise UsageError(f"{where} must be one of {', '.join(action.choices)}")
    return made
