"""Children of a supervisor end each other once it has died: one that hangs, or is stopped, does not hear of that."""

import contextlib
import os
import select
import signal
import time
from pathlib import Path

from dualpath.cluster.children import PARENT_VARIABLE, state_of

KILL_S = 1.0


def end_siblings(leave_s: float) -> None:
    """Give the supervisor's other children time to end, then kill them. Blocks until they are dead."""
    left = _still_there(kill_stopped_siblings(), leave_s)
    for process in left:
        _kill(process)
    _still_there(left, KILL_S)


def kill_stopped_siblings() -> list[int]:
    """Others may wait for each other, but nobody for these. Returns pidfds of all, the killed ones included."""
    found = _siblings()
    for process, state in found.items():
        if state == "T":
            _kill(process)
    return list(found)


def _siblings() -> dict[int, str]:
    """Returns pidfds and states. A supervisor's children have its mark in their environment."""
    mark = f"{PARENT_VARIABLE}={os.environ.get(PARENT_VARIABLE)}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (pid := int(entry.name)) != os.getpid():
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found[os.pidfd_open(pid)] = state_of(pid)
    return found


def _kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(process, signal.SIGKILL)


def _still_there(processes: list[int], seconds: float) -> list[int]:
    """Waits until they have ended, their files closed. Returns those that have not."""
    give_up_s = time.monotonic() + seconds
    while processes and (left_s := give_up_s - time.monotonic()) > 0:
        ended, _, _ = select.select(processes, [], [], left_s)
        processes = [process for process in processes if process not in ended]
    return processes
