"""Run the application on a port, in the event loop that is already running, until cancelled."""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator

import uvicorn
from starlette.types import ASGIApp

_BACKLOG_CONNECTIONS = 2048
_KEEP_ALIVE_S = 30


class _Server(uvicorn.Server):
    """uvicorn that leaves signals to the process it runs in and tells when it accepts connections."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()


async def serve(
    app: ASGIApp,
    host: str,
    port: int,
    *,
    on_bound: Callable[[int], None] | None = None,
    shutdown_grace_s: int = 5,
) -> None:
    """Serve until cancelled; then refuse new requests, give running ones `shutdown_grace_s`, and cut off the rest.

    `port` 0 takes a free one. `on_bound` is called with the port once connections are accepted. Raises OSError, saying
    what to do, when the address cannot be had.
    """
    listener = _bind(host, port)
    bound = int(listener.getsockname()[1])
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=shutdown_grace_s,
    )
    server = _Server(config, lambda: on_bound(bound) if on_bound else None)
    with contextlib.closing(listener):
        running = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            await asyncio.shield(running)
        finally:
            server.should_exit = True
            await running


def _bind(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG_CONNECTIONS)
    except OSError as error:
        raise OSError(
            error.errno, f"cannot listen on {host}:{port}: {error.strerror}; choose another address, or port 0 for any"
        ) from error
    # asyncio sets this only where a socket names its protocol, which accepted ones of this kind do not. Without it the
    # first event waits until the client has acknowledged the headers, which it does 40 ms later.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
