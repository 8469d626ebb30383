"""Runs iproute2's `ip` and `tc`, many lines at a time, with errors that say what to do."""

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

from dualpath.lab.testbed.failure import TestbedError

TIMEOUT_S = 30.0
TOOLS = ("ip", "tc")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_HINTS = (
    ("Operation not permitted", "run as root with CAP_NET_ADMIN and CAP_SYS_ADMIN"),
    ("Permission denied", "run as root with CAP_NET_ADMIN and CAP_SYS_ADMIN"),
    ("qdisc kind is unknown", "the kernel lacks it: load or build sch_htb, or use another host"),
    ("Unknown filter", "the kernel lacks it: load or build cls_u32, or use another host"),
    ("TC classifier not found", "the kernel lacks it: load or build cls_u32, or use another host"),
    ("File exists", "a testbed of this name is up, or was left over: dualpath testbed down"),
)


def check_tools() -> None:
    """Raises TestbedError unless this is root and iproute2 is installed."""
    missing = [tool for tool in TOOLS if _which(tool) is None]
    if missing:
        raise TestbedError(f"there is no {' and no '.join(missing)}: install iproute2")
    if os.geteuid() != 0:
        raise TestbedError("network namespaces need root: run the command with sudo")


def run(tool: str, *arguments: str, text: str | None = None) -> str:
    """Returns what a command prints. Raises TestbedError naming the command and its message."""
    command = [_which(tool) or tool, *arguments]
    shown = " ".join([tool, *arguments])
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=TIMEOUT_S)
    except FileNotFoundError as error:
        raise TestbedError(f"there is no {tool}: install iproute2") from error
    except subprocess.TimeoutExpired as error:
        raise TestbedError(f"{shown} did not end within {TIMEOUT_S:g} s") from error
    if done.returncode != 0:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        hint = next((f"; {advice}" for sign, advice in _HINTS if sign in said), "")
        raise TestbedError(f"{shown}: {_failed_line(said, text)}{hint}")
    return done.stdout


def batch(tool: str, namespace: str, lines: Sequence[str]) -> None:
    """Runs lines of `ip` or `tc` inside a namespace, up to the first that fails. Raises TestbedError."""
    if lines:
        run(tool, "-n", namespace, "-batch", "-", text="\n".join(lines) + "\n")


def read_json(tool: str, *arguments: str) -> list[dict[str, Any]]:
    """Returns what a command with ``-json`` prints. Raises TestbedError."""
    text = run(tool, "-json", *arguments).strip()
    found: list[dict[str, Any]] = json.loads(text) if text else []
    return found


def namespaces(prefix: str) -> list[str]:
    """Lists network namespaces whose names start with `prefix`. Raises TestbedError."""
    names = [str(found["name"]) for found in read_json("ip", "netns", "list")]
    return sorted(name for name in names if name.startswith(prefix))


def pids(namespace: str) -> list[int]:
    """Lists the processes in a namespace. Raises TestbedError."""
    return [int(pid) for pid in run("ip", "netns", "pids", namespace).split()]


def inside(namespace: str) -> tuple[str, ...]:
    """Returns the words that make a command run in a namespace when put before it."""
    return (_which("ip") or "ip", "netns", "exec", namespace)


def _which(tool: str) -> str | None:
    return shutil.which(tool, path=_PATH)


def _failed_line(said: str, text: str | None) -> str:
    """Adds to `said` the line of a batch that it is about."""
    _, found, rest = said.partition("Command failed -:")
    number = rest.split()[0] if found and rest.split() else ""
    if text is None or not number.isdecimal():
        return said
    return f"{text.splitlines()[int(number) - 1]!r}: {said}"
