"""A file that appears whole or not at all: written under a temporary name beside its place, then renamed.

The temporary name says which process on which host writes it, so that whoever opens the directory later can tell a
leftover of a killed process from a file being written right now: ``.<name>.<host>.<pid>.<random>.tmp``.
"""

import os
import secrets
import time
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from socket import gethostname

LEFTOVER_AGE_S = 3600.0
"""No write takes this long: an older temporary file is a leftover, whoever wrote it."""
_SUFFIX = ".tmp"


def _host() -> str:
    """Eight hex digits for this boot of this host and its process-id namespace: process ids mean nothing outside.

    Cloned machines have one host name, and every first process-id namespace has one number; boots differ.
    """
    boot = pids = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        pids = str(Path("/proc/self/ns/pid").readlink())
    return blake2b(f"{gethostname()}/{boot}/{pids}".encode(), digest_size=4).hexdigest()


_HOST = _host()


class Draft:
    """A file being written. End with `commit` or `discard`; both close `fd`. All methods raise OSError as it comes."""

    def __init__(self, final: Path) -> None:
        self._final = final
        self._temporary = final.with_name(f".{final.name}.{_HOST}.{os.getpid()}.{secrets.token_hex(4)}{_SUFFIX}")
        self.fd = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def append(self, data: bytes | memoryview) -> None:
        """Write all of `data` at the end of the file."""
        view = memoryview(data)
        while view:
            view = view[os.write(self.fd, view) :]

    def commit(self, *, durable: bool) -> None:
        """Put the file in its place, over one that is there; `durable` makes the new name survive a power cut.

        The bytes themselves are the caller's to fsync, before this.
        """
        self._close()
        self._temporary.replace(self._final)
        if durable:
            fsync_directory(self._final.parent)

    def discard(self) -> None:
        """Leave no trace; harmless after `commit`."""
        with suppress(OSError):
            self._close()
        with suppress(OSError):
            self._temporary.unlink()

    def _close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def write_whole(final: Path, data: bytes, *, durable: bool = False) -> None:
    """Put `data` at `final`, over what is there: readers see the old file or the new one. Raises OSError."""
    draft = Draft(final)
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
    """Whether a file name is that of a draft."""
    return name.startswith(".") and name.endswith(_SUFFIX)


def is_leftover(path: Path) -> bool:
    """Whether nobody writes the draft at `path` any more: its process on this host is gone, or it is too old."""
    parts = path.name.split(".")
    host, pid = parts[-4:-2] if len(parts) >= 6 else ("", "")
    if host == _HOST and pid.isdecimal() and not _is_running(int(pid)):
        return True
    try:
        return time.time() - path.stat().st_mtime > LEFTOVER_AGE_S
    except FileNotFoundError:
        return False


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
