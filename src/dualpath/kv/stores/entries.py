"""Entries of a store's directories, as they are: what lies in a file's or folder's place hangs and ends nobody.

A FIFO, a socket, a device, a link that leads nowhere or in a circle: each is told from a file that can't be read now.
"""

import errno
import os
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

NOT_THERE = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ELOOP))
"""Errors of a path that leads nowhere: nothing is there, and some folder on the way may be something else."""
_OPEN = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY


class NotAFileError(OSError):
    """Something else lies in the place of a regular file."""


def open_file(path: Path) -> int:
    """Opens a regular file for reading, at once. A symbolic link counts as what it is, not as what it leads to.

    Raises FileNotFoundError if nothing is there, NotAFileError if something else is, another OSError if it can't be
    told or opened now.
    """
    try:
        fd = os.open(path, _OPEN)
    except OSError as error:
        raise _reason(path, error) from error
    try:
        _check(path, os.fstat(fd).st_mode)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_file(path: Path, most_bytes: int) -> bytes | None:
    """Returns a regular file's bytes, at most `most_bytes` of them; None if it can't be read."""
    try:
        fd = open_file(path)
    except OSError:
        return None
    try:
        return os.pread(fd, most_bytes, 0)
    except OSError:
        return None
    finally:
        os.close(fd)


def names(folder: Path) -> list[str]:
    """Names in a folder, in order; none where it is gone, or where something else has its name. Raises OSError."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError as error:
        if error.errno in NOT_THERE:
            return []
        raise


def names_now(folder: Path) -> list[str]:
    """`names`; none where the folder can't be listed now."""
    try:
        return names(folder)
    except OSError:
        return []


def is_empty(folder: Path) -> bool:
    """Returns False if anything is in a folder, True if nothing is or it is none. Raises OSError."""
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except OSError as error:
        if error.errno in NOT_THERE:
            return True
        raise


def is_folder(path: Path) -> bool:
    """Returns True for a folder, or a link to one. Raises OSError if it can't be told now."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except OSError as error:
        if error.errno in NOT_THERE:
            return False
        raise


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it; nothing happens if it is gone. Raises OSError."""
    try:
        if stat.S_ISDIR(path.lstat().st_mode):
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise


def remove_all(paths: Iterable[Path]) -> None:
    """`remove` each. Raises the last OSError after it has tried them all."""
    failure: OSError | None = None
    for path in paths:
        try:
            remove(path)
        except OSError as error:
            failure = error
    if failure is not None:
        raise failure


def _reason(path: Path, error: OSError) -> OSError:
    """Returns why `path` can't be opened: nothing is there, something else is, or `error`."""
    try:
        _check(path, path.lstat().st_mode)
    except NotAFileError as found:
        return found
    except OSError as other:
        return (
            FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) if other.errno in NOT_THERE else error
        )
    return error


def _check(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise NotAFileError(f"{path} is not a regular file ({stat.filemode(mode)})")
