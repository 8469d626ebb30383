"""A session of processes: one program with all that it has started, however deep, and whoever their parent is now.

Programs such as vLLM start processes that start processes, and these outlive a parent that was killed. A session's
number is inherited and nobody else's, so all of them can be found.
"""

import contextlib
import os
import signal
import time
from pathlib import Path

TRACKERS_S = 1.0
"""How long Python's resource trackers get: they end by themselves, once they have removed what the others shared."""
_TRACKER = b"multiprocessing.resource_tracker"
_LOOK_S = 0.01


def end_session(leader: int, patience_s: float = 5.0) -> bool:
    """Kill every process of a session but the caller. Returns whether none is left after `patience_s`."""
    start_s = time.monotonic()
    while left := session_members(leader) - {os.getpid()}:
        waited_s = time.monotonic() - start_s
        if waited_s > patience_s:
            return False
        for pid in left:
            if waited_s > TRACKERS_S or not _is_tracker(pid):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(_LOOK_S)
    return True


def session_members(leader: int) -> set[int]:
    """Returns the processes that run in a session; zombies don't."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                state, _, _, session, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(session) == leader and state != "Z":
                    found.add(int(entry.name))
    return found


def _is_tracker(pid: int) -> bool:
    try:
        return _TRACKER in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
