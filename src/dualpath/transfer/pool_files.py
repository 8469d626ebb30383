"""Files that last as long as their creator, such as pools in shared memory: made under its lock, removed after it."""

import fcntl
import os
import secrets
from pathlib import Path

POOL_DIRECTORY = Path("/dev/shm")


def sweep_dead_pools(directory: Path = POOL_DIRECTORY) -> list[Path]:
    """Remove pools whose creator died without closing them. Returns their paths. Live pools are never touched."""
    return sweep_dead_files(directory, "dualpath-*")


def sweep_dead_files(directory: Path, pattern: str) -> list[Path]:
    """As `sweep_dead_pools`, of the files with such names."""
    removed = []
    for path in sorted(directory.glob(pattern)):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:  # removed meanwhile, or another user's
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, descriptor):
                path.unlink(missing_ok=True)
                removed.append(path)
        except OSError:  # its creator lives
            pass
        finally:
            os.close(descriptor)
    return removed


def own_path(directory: Path, name: str) -> Path:
    """Returns a new ``dualpath-<pid>-<name>-<random>``: all users, and containers with pids of their own, share
    ``/dev/shm``, and nobody may have taken the name first.
    """
    return directory / f"dualpath-{os.getpid()}-{name}-{secrets.token_hex(6)}"


def create_locked(path: Path) -> int:
    """Create an empty file at `path` and lock it. A sweeper may remove it between the two steps; then try again."""
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is_at(path, descriptor):
            return descriptor
        os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    mine = os.fstat(descriptor)
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)
