"""What is this user's alone: files, the directory of running processes' sockets and secrets, a socket's other end."""

import errno
import os
import socket
import stat
import struct
import tempfile
from pathlib import Path

PRIVATE = 0o600
MAX_SECRET_BYTES = 1 << 20
_CREDENTIALS = struct.Struct("3i")
"""Process, user, group."""


def runtime_directory() -> Path:
    """Returns this user's directory for them, made if it is not there: below ``$XDG_RUNTIME_DIR`` where that is this
    user's, else in the temporary directory.

    Raises OSError that says what to do when another user has taken its name.
    """
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if base and _is_mine(Path(base)):
        path = Path(base, "dualpath")
    else:
        path = Path(tempfile.gettempdir(), f"dualpath-{os.geteuid()}")
    path.mkdir(mode=0o700, exist_ok=True)
    if not _is_mine(path):
        raise OSError(
            errno.EACCES, f"{path} is not a directory of this user's; remove it, or set XDG_RUNTIME_DIR to one that is"
        )
    path.chmod(0o700)
    return path


def peer_user(connected: socket.socket) -> int:
    """Returns the user id of a Unix socket's other end, as the kernel noted it when that connected or listened."""
    told = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(told)
    return int(user)


def read_secret(path: Path) -> str:
    """Returns the text of a file that others may not read. Raises ValueError that names the file and says what to do.

    Nothing but a regular file: a FIFO would be waited for, for ever, and can be read only once.
    """
    try:
        with open(path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise ValueError(f"{path} is no regular file; write it into one")
            if mode & stat.S_IRWXO:
                raise ValueError(f"every user of this host has access to {path}; chmod o-rwx {path}")
            text = file.read(MAX_SECRET_BYTES + 1)
        if len(text) > MAX_SECRET_BYTES:
            raise ValueError(f"{path} has more than {MAX_SECRET_BYTES} bytes; give another file")
        return text.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"can't read {path}: {error}") from None


def is_dead_socket(path: Path) -> bool:
    """Returns True for the socket file of a killed server. The file stays, but its kernel object is gone: connecting is
    refused at once. To a live one a datagram socket is of the wrong kind, so no connection is made.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as probe:
        return path.is_socket() and probe.connect_ex(str(path)) == errno.ECONNREFUSED


def private_opener(path: str, flags: int) -> int:
    """`open`'s opener: a file that is made is this user's alone; one that is there keeps its mode."""
    return os.open(path, flags, PRIVATE)


def _is_mine(path: Path) -> bool:
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
