"""The socket at which engines arrive, held by the supervisor: the address stays, whichever coordinator is there."""

import re
import socket

_TCP = re.compile(r"tcp://(?P<host>\[[^]]+\]|[^:/]+):(?P<port>\d+)")
_BACKLOG_ENGINES = 1024


def control_listener(address: str) -> tuple[str, socket.socket | None]:
    """Returns the address with its real port, and its listener; None where the coordinator itself can listen anew.

    Only TCP has ports that another process could take meanwhile, or that a client that calls again could get itself.
    Raises OSError that names an address at which nobody can listen.
    """
    match = _TCP.fullmatch(address)
    if match is None:
        return address, None
    host = match["host"].strip("[]")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            "0.0.0.0" if host == "*" else host, int(match["port"]), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen(_BACKLOG_ENGINES)
    except OSError as error:
        raise OSError(
            error.errno, f"can't listen for engines at {address!r} ({error}); try one such as tcp://0.0.0.0:5555"
        ) from error
    return f"tcp://{match['host']}:{listener.getsockname()[1]}", listener
