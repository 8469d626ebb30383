"""What the fork server imports last: from here on it has engines, which may leave when the supervisor has died."""

import os
import signal
import time

from dualpath.cluster.engines.fork_server import DEATH

LEAVE_S = 4.0


def _wait_for_engines(*_: object) -> None:
    give_up_s = time.monotonic() + LEAVE_S
    try:
        while time.monotonic() < give_up_s:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.02)
    except ChildProcessError:
        pass  # all have left
    os._exit(1)


signal.signal(DEATH, _wait_for_engines)
