"""HTTP around a request: listens, reads a body within a bound and a deadline, answers while the client is connected.

A client that goes away ends the work at once: `while_connected` watches the connection during the work. (Starlette's
StreamingResponse leaves a suspended source to the garbage collector; here it is closed before the call returns.)
"""

import asyncio
import contextlib
import hmac
import socket
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from typing import Any, TypeVar

import uvicorn
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from dualpath.server.errors import ApiError

T = TypeVar("T")

_OPEN_PATHS = frozenset({"/health", "/metrics", "/version"})
_BUSY_RETRY_AFTER_S = 1.0


class Gate:
    """ASGI middleware: requires an API key if any is set, and bounds the requests in flight. Spares `_OPEN_PATHS`."""

    def __init__(
        self,
        app: ASGIApp,
        api_keys: frozenset[str],
        max_inflight_requests: int,
        on_refusal: Callable[[str, ApiError], None],
    ) -> None:
        self._app = app
        self._on_refusal = on_refusal
        self._keys = [key.encode() for key in sorted(api_keys)]
        self._free = max_inflight_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _OPEN_PATHS:
            return await self._app(scope, receive, send)
        error = self._refusal(scope)
        if error is not None:
            self._on_refusal(scope["path"], error)
            return await error.response(scope["path"])(scope, receive, send)
        self._free -= 1
        try:
            return await self._app(scope, receive, send)
        finally:
            self._free += 1

    def _refusal(self, scope: Scope) -> ApiError | None:
        if self._keys and not self._has_key(scope):
            return ApiError(
                401,
                "missing or wrong API key; send the header Authorization: Bearer <key>, or x-api-key: <key>",
                code="invalid_api_key",
            )
        if self._free <= 0:
            return ApiError(
                429,
                "the server has reached its limit of requests in flight; try again soon",
                code="overloaded",
                retry_after_s=_BUSY_RETRY_AFTER_S,
            )
        return None

    def _has_key(self, scope: Scope) -> bool:
        given = api_key(Headers(scope=scope))
        matches = [hmac.compare_digest(given, key) for key in self._keys]
        return any(matches)


def api_key(headers: Headers) -> bytes:
    """Returns the key that a client has sent, in OpenAI's header or in Anthropic's; empty without one."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    return (given.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")).encode("latin-1")


async def read_body(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    """Returns the whole body. Raises ApiError 413 when it is too large, 408 when it does not arrive in time."""
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise ApiError(413, f"the request body is larger than {max_bytes} bytes", code="body_too_large")
    except TimeoutError:
        raise ApiError(408, f"the request body did not arrive within {timeout_s:g} s", code="body_timeout") from None
    return bytes(body)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Returns the result of `work`. If the client goes away, cancels `work`, waits for it, raises ClientDisconnect.

    The request's body must have been read before.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for pending in (task, watcher):
            pending.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events from a generator, which is always closed before the call returns.

    Headers are sent with the first event, so that an earlier failure is an ordinary HTTP error. A later failure becomes
    an event and ends the stream; `on_failure` gets the exception and returns that event.
    """

    def __init__(
        self, events: AsyncGenerator[bytes, None], on_failure: Callable[[Exception], bytes], write_timeout_s: float
    ) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._events = events
        self._on_failure = on_failure
        self._write_timeout_s = write_timeout_s
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        try:
            await while_connected(receive, self._answer(send))
        except ClientDisconnect as gone:
            if not self._begun:
                raise
            self._on_failure(gone)
        finally:
            await self._events.aclose()

    async def _answer(self, send: Send) -> None:
        event = await anext(self._events)
        self._begun = True
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await self._write(send, event)
            async for event in self._events:
                await self._write(send, event)
        except ClientDisconnect:
            raise
        except Exception as failure:
            await self._write(send, self._on_failure(failure))
        await self._write(send, b"", more_body=False)

    async def _write(self, send: Send, event: bytes, more_body: bool = True) -> None:
        """Send an event. Raises ClientDisconnect when the client has stopped reading."""
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await send({"type": "http.response.body", "body": event, "more_body": more_body})
        except TimeoutError:
            raise ClientDisconnect from None


_BACKLOG_CONNECTIONS = 2048
_KEEP_ALIVE_S = 30


class _Server(uvicorn.Server):
    """uvicorn that leaves signals to its process and calls `on_started` once it accepts connections."""

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
    """Serve until cancelled; then refuse new requests, give running ones `shutdown_grace_s`, and end the rest.

    `port` 0 takes a free one. `on_bound` is called with the port once connections are accepted. Raises OSError that
    says what to do when it can't listen at the address.
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
    # asyncio sets this only for sockets with a protocol number, which accepted sockets of this kind lack. Without it
    # the first event waits until the client has acknowledged the headers, 40 ms later.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
