"""The server on its port: bound before anything else starts, served until it is told to stop, drained then."""

import asyncio
import contextlib
import resource
import socket
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

import uvicorn
from starlette.datastructures import State
from starlette.types import Receive, Scope, Send

from dualpath.server.connection import Connection
from dualpath.server.drain import Drain
from dualpath.server.limits import ServerLimits
from dualpath.server.tls_door import TlsDoor

DRAIN_S = 20.0
"""How long running requests have when the server is told to stop. (Kubernetes kills after 30 s.)"""
_FIRST_REQUEST_S = 0.5
"""How long a connection that has just been made may take to bring its request, before it counts as idle."""
_FILES_FOR_OTHERS = 256
"""Files that the process needs beside its connections."""


class Application(Protocol):
    """An ASGI application of `create_app`, or one around it that shares its `state`."""

    state: State

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...


async def serve(
    app: Application,
    listener: socket.socket,
    *,
    on_bound: Callable[[int], None] | None = None,
    drain_s: float = DRAIN_S,
    tls: Mapping[str, Any] | None = None,
) -> None:
    """Serve `app`, of `create_app`, until cancelled. Closes `listener`. `tls` has uvicorn's settings of that name.

    Then requests get 503 `shutting_down`; those that run have `drain_s` seconds, after which whole answers become that
    error too and streams end with it as an event. Cancelled once more, it ends them at once. `on_bound` is called with
    the port once connections are accepted. Returns after `Drain.hand_over`, when every request has its answer.
    """
    drain: Drain = app.state.drain
    port = int(listener.getsockname()[1])
    server = _Server(_config(app, tls or {}), lambda: on_bound(port) if on_bound else None)
    with contextlib.closing(listener):
        running = asyncio.create_task(server.serve(sockets=[listener]))
        handing_over = asyncio.create_task(server.leave_after(drain.hand_over))
        try:
            await asyncio.shield(running)
        except asyncio.CancelledError:
            await drain.run_out(drain_s)
            raise
        finally:
            handing_over.cancel()
            server.should_exit = True
            await running
            await app.state.close()


class _Server(uvicorn.Server):
    """uvicorn that leaves signals to its process and calls `on_started` once it accepts connections."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def leave_after(self, handed_over: asyncio.Event) -> None:
        """Wait for the event; then take no more connections, and end when all have been answered, however late."""
        await handed_over.wait()
        for server in self.servers:
            server.close()
        await asyncio.sleep(_FIRST_REQUEST_S)
        self.config.timeout_graceful_shutdown = None
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        context = self.config.ssl
        if context is None or sockets is None:
            await super().startup(sockets)
        else:
            kind: Any = self.config.http_protocol_class
            make = partial(kind, self.config, self.server_state, self.lifespan.state)
            self.servers = [TlsDoor(listener, context, make) for listener in sockets]  # type: ignore[misc]
            self.started = True
        self._on_started()


def _config(app: Application, tls: Mapping[str, Any]) -> uvicorn.Config:
    limits: ServerLimits = app.state.limits
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    connection: Any = partial(
        Connection,
        limits=limits,
        most_connections=max(1, min(limits.max_connections, files - _FILES_FOR_OTHERS)),
        on_refusal=app.state.on_refusal,
    )
    return uvicorn.Config(
        app,
        http=connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=limits.keep_alive_s,  # type: ignore[arg-type]  # seconds, whole or not
        timeout_graceful_shutdown=1,
        **tls,
    )
