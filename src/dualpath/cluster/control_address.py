"""Where engines join: ``tcp://HOST:PORT``, or ``ipc:///PATH``, a Unix socket of this user's."""

import errno
import re
import socket
from pathlib import Path
from typing import Any

from dualpath.spec.private_files import PRIVATE, is_dead_socket

_TCP = re.compile(r"tcp://(?P<host>\[[^]\s]+\]|[^:/\s]+):(?P<port>\d+)")
_UNIX = "ipc://"
_MOST_PORT = 65535  # libzmq takes a larger number, and listens somewhere else
_BACKLOG_ENGINES = 1024


def control_place(address: str) -> tuple[str, int] | Path:
    """Returns the host, without brackets, and the port; or the Unix socket's path. Raises ValueError."""
    match = _TCP.fullmatch(address)
    if match is not None and int(match["port"]) <= _MOST_PORT:
        host = "0.0.0.0" if match["host"] == "*" else match["host"].strip("[]")
        return host, int(match["port"])
    if address.startswith(f"{_UNIX}/"):
        return Path(address.removeprefix(_UNIX))
    raise ValueError(
        f"{address!r} is not an address; give one such as tcp://10.0.0.1:5555, with a port up to {_MOST_PORT}, or "
        "ipc:///run/dualpath/join"
    )


def address_to_listen(text: str) -> str:
    """Returns `text`, an address at which a coordinator can listen. Raises ValueError."""
    control_place(text)
    return text


def address_to_join(text: str) -> str:
    """Returns `text`, an address at which a coordinator can be found. Raises ValueError."""
    place = control_place(text)
    if isinstance(place, tuple) and (place[1] == 0 or place[0] in ("0.0.0.0", "::")):
        raise ValueError(f"{text!r} is where to listen; give the host and port at which `dualpath serve` is reached")
    return text


def control_listener(address: str) -> tuple[str, socket.socket]:
    """Returns the address with its real port, and its listener, whose owner calls `stop_listening` at the end.

    The supervisor holds it: the address stays, whichever coordinator is there. A Unix socket is this user's alone, and
    takes the place of one that a killed process has left. Raises OSError that names an address at which nobody can
    listen.
    """
    try:
        place = control_place(address)
        if isinstance(place, Path):
            return address, _unix_listener(place)
        listener = _tcp_listener(*place)
    except (OSError, ValueError) as error:
        number = error.errno if isinstance(error, OSError) else errno.EINVAL
        raise OSError(
            number, f"can't listen for engines at {address!r} ({error}); try one such as tcp://0.0.0.0:5555"
        ) from error
    host = f"[{place[0]}]" if ":" in place[0] else place[0]
    return f"tcp://{host}:{listener.getsockname()[1]}", listener


def stop_listening(address: str, listener: socket.socket) -> None:
    """Close the listener; the file of a Unix socket goes too."""
    listener.close()
    place = control_place(address)
    if isinstance(place, Path):
        place.unlink(missing_ok=True)


def _tcp_listener(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
        0
    ]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return _listening(listener, place)


def _unix_listener(path: Path) -> socket.socket:
    if is_dead_socket(path):
        path.unlink()
    return _listening(socket.socket(socket.AF_UNIX), str(path))


def _listening(listener: socket.socket, place: Any) -> socket.socket:
    try:
        listener.bind(place)
        if listener.family == socket.AF_UNIX:
            Path(place).chmod(PRIVATE)  # before anybody can connect
        listener.listen(_BACKLOG_ENGINES)
    except OSError:
        listener.close()
        raise
    return listener
