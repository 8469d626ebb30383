"""Writes files that appear whole or not at all: under a temporary name in the same directory, then renamed.

The temporary name says which process on which host writes the file: ``.<name>.<host>.<pid>.<random>.tmp``. So a later
reader of the directory can tell a killed process's leftover from a file that is being written.
"""

import os
import secrets
import time
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from socket import gethostname

LEFTOVER_AGE_S = 3600.0
"""No write takes this long: an older temporary file is a leftover."""
_SUFFIX = ".tmp"


def _host() -> str:
    """Returns eight hex digits for this boot of this host and its process-id namespace; pids have no meaning outside.

    Cloned machines share a host name, and every first process-id namespace has the same number; boot ids differ.
    """
    boot = pids = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        pids = str(Path("/proc/self/ns/pid").readlink())
    return blake2b(f"{gethostname()}/{boot}/{pids}".encode(), digest_size=4).hexdigest()


_HOST = _host()


class Draft:
    """A file being written. End it with `commit` or `discard`; both close `fd`. All methods pass OSError on.

    `mode` has its permission bits, less the umask's.
    """

    def __init__(self, final: Path, mode: int = 0o644) -> None:
        self._final = final
        self._temporary = final.with_name(f".{final.name}.{_HOST}.{os.getpid()}.{secrets.token_hex(4)}{_SUFFIX}")
        self.fd = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)

    def append(self, data: bytes | memoryview) -> None:
        """Write all of `data` at the end of the file."""
        view = memoryview(data)
        while view:
            view = view[os.write(self.fd, view) :]

    def commit(self, *, durable: bool) -> None:
        """Rename the file to its final name, replacing any file there; `durable` makes that name survive a power cut.

        The caller must fsync the bytes themselves before.
        """
        self._close()
        self._temporary.replace(self._final)
        if durable:
            fsync_directory(self._final.parent)

    def discard(self) -> None:
        """Delete the file; harmless after `commit`."""
        with suppress(OSError):
            self._close()
        with suppress(OSError):
            self._temporary.unlink()

    def _close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def write_whole(final: Path, data: bytes, *, durable: bool = False) -> None:
    """Write `data` to `final`, replacing any file there: readers see the old file or the new one. Raises OSError."""
    fill_whole(Draft(final), data, durable=durable)


def fill_whole(draft: Draft, data: bytes, *, durable: bool) -> None:
    """`write_whole` into a draft that is just begun."""
    try:
        draft.append(data)
        if durable:
            os.fsync(draft.fd)
        draft.commit(durable=durable)
    finally:
        draft.discard()


def fsync_directory(directory: Path) -> None:
    """Make the names in `directory` survive a power cut."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def is_draft(name: str) -> bool:
    """Returns True when a file name is a draft's."""
    return name.startswith(".") and name.endswith(_SUFFIX)


def is_leftover(path: Path) -> bool:
    """Returns True when the draft at `path` is abandoned: its process on this host is gone, or it is too old."""
    parts = path.name.split(".")
    host, pid = parts[-4:-2] if len(parts) >= 6 else ("", "")
    if host == _HOST and pid.isdecimal() and not _is_running(int(pid)):
        return True
    try:
        return time.time() - path.lstat().st_mtime > LEFTOVER_AGE_S
    except OSError:  # it is gone, or can't be told now
        return False


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
