"""The server's listening socket, bound before anything else starts, by a process that needs no HTTP."""

import socket

_BACKLOG_CONNECTIONS = 2048


def bind(host: str, port: int) -> socket.socket:
    """Returns a listener; `port` 0 takes a free one. Raises OSError that says what to do when it can't listen there."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG_CONNECTIONS)
    except OSError as error:
        raise OSError(
            error.errno, f"cannot listen on {host}:{port}: {error.strerror}; choose another address, or port 0 for any"
        ) from error
    # asyncio sets this only for sockets with a protocol number, which accepted sockets of this kind lack. Without it
    # the first event waits until the client has acknowledged the headers, 40 ms later.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
