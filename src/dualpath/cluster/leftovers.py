"""Files that end with their owner, and what removes them when that was killed."""

import atexit
import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from pathlib import Path

from dualpath.cluster.deadline_threads import DeadlineThreads, LateError
from dualpath.spec.log import ROOT
from dualpath.transfer.guarded_transport import GuardedTransport
from dualpath.transfer.pool_files import create_locked, sweep_dead_pools

logger = logging.getLogger(f"{ROOT}.cluster")

SWEEP_S = 3.0
"""How long a transport's `sweep` may take."""
_SOCKETS = "dualpath-sockets-"
_LOCK = "lock"


def socket_directory() -> str:
    """Returns a directory of this user alone, which a sweep spares while this process lives."""
    directory = tempfile.mkdtemp(prefix=_SOCKETS)
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    create_locked(Path(directory) / _LOCK)
    return directory


class Sweep:
    """Removes what killed processes of any cluster with this transport have left behind; await it after each end.

    It raises nothing and takes at most twice `SWEEP_S`, whatever the transport does: what is wrong is a warning.
    """

    def __init__(self, transport: str) -> None:
        """Raises UnknownNameError."""
        self._transport = GuardedTransport(transport)
        self._threads = DeadlineThreads(1, "sweep", SWEEP_S, most_hung=0)
        self._told: set[str] = set()

    async def __call__(self) -> None:
        try:
            sweep_own()
            await self._threads.submit(lambda _: self._transport.sweep()).future
        except LateError:
            self._warn(self._transport.complaint("sweep", f"hangs, and may take {SWEEP_S:g} s"))
        except (OSError, ValueError) as error:
            self._warn(str(error))

    def _warn(self, what: str) -> None:
        if what not in self._told:  # an engine that ends again and again
            self._told.add(what)
            logger.warning("what killed engines have left behind may stay: %s", what)


def sweep_own() -> None:
    """Remove what killed processes of any cluster have left behind, but for a transport's own."""
    sweep_dead_pools()
    for directory in Path(tempfile.gettempdir()).glob(f"{_SOCKETS}*"):
        with contextlib.suppress(OSError):  # its owner lives, it is gone, or it is another user's
            descriptor = os.open(directory / _LOCK, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory, ignore_errors=True)
            finally:
                os.close(descriptor)
