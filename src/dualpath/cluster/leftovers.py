"""Files that end with their owner, and what removes them when that was killed."""

import atexit
import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from dualpath.transfer import TRANSPORTS
from dualpath.transfer.pool_files import create_locked, sweep_dead_pools

_SOCKETS = "dualpath-sockets-"
_LOCK = "lock"


def socket_directory() -> str:
    """Returns a directory of this user alone, which a sweep spares while this process lives."""
    directory = tempfile.mkdtemp(prefix=_SOCKETS)
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    create_locked(Path(directory) / _LOCK)
    return directory


def sweep(transport: str) -> None:
    """Remove what killed processes of any cluster with this transport have left behind."""
    sweep_dead_pools()
    TRANSPORTS.get(transport).sweep()
    for directory in Path(tempfile.gettempdir()).glob(f"{_SOCKETS}*"):
        with contextlib.suppress(OSError):  # its owner lives, it is gone, or it is another user's
            descriptor = os.open(directory / _LOCK, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory, ignore_errors=True)
            finally:
                os.close(descriptor)
