"""What the fork server imports last: from here on it has engines, which may leave when the supervisor has died."""

import contextlib
import os
import select
import signal
import time
from pathlib import Path

from dualpath.cluster.children import PARENT_VARIABLE
from dualpath.cluster.engines.fork_server import DEATH
from dualpath.cluster.leftovers import sweep

LEAVE_S = 4.0
KILL_S = 1.0
_MARK = f"{PARENT_VARIABLE}={os.environ.get(PARENT_VARIABLE)}".encode()
"""In the environment of all children of the supervisor."""


def _end_engines(*_: object) -> None:
    """Give engines and agents time to leave, kill the rest, and remove what killed ones have left behind.

    An agent that hangs, or is stopped, does not hear that the supervisor has died.
    """
    with contextlib.suppress(ChildProcessError):  # all have left
        _reap(LEAVE_S)
        for child in Path("/proc/self/task").glob("*/children"):
            for pid in map(int, child.read_text().split()):
                os.kill(pid, signal.SIGKILL)
        _reap(KILL_S)
    left = _still_there(_siblings(), LEAVE_S)
    for process in left:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGKILL)
    _still_there(left, KILL_S)
    sweep("shm")  # the one transport of ours that leaves files
    os._exit(1)


def _siblings() -> list[int]:
    """Returns pidfds of the supervisor's other children."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                if _MARK in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(os.pidfd_open(int(entry.name)))
    return found


def _still_there(processes: list[int], seconds: float) -> list[int]:
    """Waits until they have ended, their files closed. Returns the pidfds of those that have not."""
    give_up_s = time.monotonic() + seconds
    while processes and (left_s := give_up_s - time.monotonic()) > 0:
        ended, _, _ = select.select(processes, [], [], left_s)
        processes = [process for process in processes if process not in ended]
    return processes


def _reap(seconds: float) -> None:
    """Raises ChildProcessError as soon as there is no child any more."""
    give_up_s = time.monotonic() + seconds
    while time.monotonic() < give_up_s:
        if os.waitpid(-1, os.WNOHANG) == (0, 0):
            time.sleep(0.02)


signal.signal(DEATH, _end_engines)
