"""What the fork server imports last: from here on it has engines, which may leave when the supervisor has died."""

import contextlib
import os
import shutil
import signal
import socket
import time
from pathlib import Path

from dualpath.cluster.engines.fork_server import DEATH
from dualpath.cluster.leftovers import sweep_own
from dualpath.cluster.siblings import KILL_S, end_siblings
from dualpath.transfer import TRANSPORTS

LEAVE_S = 4.0


def _end_engines(*_: object) -> None:
    """Give engines and agents time to leave, kill the rest, and remove what killed ones have left behind."""
    signal.signal(DEATH, signal.SIG_IGN)  # it may come again
    with contextlib.suppress(ChildProcessError):  # all have left
        _reap(LEAVE_S)
        for child in Path("/proc/self/task").glob("*/children"):
            for pid in map(int, child.read_text().split()):
                os.kill(pid, signal.SIGKILL)
        _reap(KILL_S)
    end_siblings(LEAVE_S)
    _remove_own_folder()
    sweep_own()
    TRANSPORTS.get("shm").sweep()  # the one transport of ours that leaves files
    os._exit(1)


def _remove_own_folder() -> None:
    """multiprocessing's, with the socket that this process listens at; the supervisor would have removed it."""
    for entry in list(Path("/proc/self/fd").iterdir()):
        descriptor = int(entry.name)
        with contextlib.suppress(OSError), socket.fromfd(descriptor, socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            address = listener.getsockname()
            if isinstance(address, str) and Path(address).parent.name.startswith("pymp-"):
                shutil.rmtree(Path(address).parent, ignore_errors=True)


def _reap(seconds: float) -> None:
    """Raises ChildProcessError as soon as there is no child any more."""
    give_up_s = time.monotonic() + seconds
    while time.monotonic() < give_up_s:
        if os.waitpid(-1, os.WNOHANG) == (0, 0):
            time.sleep(0.02)


TRANSPORTS.get("shm")  # now: a handler may interrupt an import of it, and can't import it then
signal.signal(DEATH, _end_engines)
