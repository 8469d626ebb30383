"""What the fork server imports last: from here on it has engines, which may leave when the supervisor has died."""

import contextlib
import os
import signal
import time
from pathlib import Path

from dualpath.cluster.engines.fork_server import DEATH
from dualpath.transfer.pool_files import sweep_dead_pools

LEAVE_S = 4.0
KILL_S = 1.0


def _end_engines(*_: object) -> None:
    """Give engines time to leave, kill the rest, and remove what killed ones have left behind."""
    with contextlib.suppress(ChildProcessError):  # all have left
        _reap(LEAVE_S)
        for child in Path("/proc/self/task").glob("*/children"):
            for pid in map(int, child.read_text().split()):
                os.kill(pid, signal.SIGKILL)
        _reap(KILL_S)
    sweep_dead_pools()
    os._exit(1)


def _reap(seconds: float) -> None:
    """Raises ChildProcessError as soon as there is no child any more."""
    give_up_s = time.monotonic() + seconds
    while time.monotonic() < give_up_s:
        if os.waitpid(-1, os.WNOHANG) == (0, 0):
            time.sleep(0.02)


signal.signal(DEATH, _end_engines)
