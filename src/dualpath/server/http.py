"""HTTP around a request: who may ask, and an answer while the client is connected and the server is not stopping.

A client that goes away ends the work at once: `while_connected` watches the connection during the work. (Starlette's
StreamingResponse leaves a suspended source to the garbage collector; here it is closed before the call returns.)
"""

import asyncio
import contextlib
import hmac
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from dualpath.server.drain import Drain
from dualpath.server.errors import ApiError

T = TypeVar("T")

OPEN_PATHS = frozenset({"/health", "/livez", "/metrics", "/ping", "/ready", "/version"})
_BUSY_RETRY_AFTER_S = 1.0


class Gate:
    """ASGI middleware: requires an API key if any is set, bounds the requests in flight, and ends them with the server.

    Spares `OPEN_PATHS`, which show nothing that is secret.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_keys: frozenset[str],
        max_inflight_requests: int,
        drain: Drain,
        on_refusal: Callable[[str, ApiError], None],
    ) -> None:
        self._app = app
        self._on_refusal = on_refusal
        self._keys = [key.encode() for key in sorted(api_keys)]
        self._free = max_inflight_requests
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            return await self._app(scope, receive, send)
        error = self._refusal(scope)
        if error is not None:
            return await self._refuse(error, scope, receive, send)
        self._free -= 1
        try:
            with self._drain:
                await self._app(scope, receive, send)
        except asyncio.CancelledError:
            if not self._drain.ended_this():
                raise
            with contextlib.suppress(RuntimeError):  # an answer has begun, of which no more will come
                await self._refuse(self._drain.error(), scope, receive, send)
        finally:
            self._free += 1

    async def _refuse(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        self._on_refusal(scope["path"], error)
        await error.response(scope["path"])(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        if self._keys and not self._has_key(scope):
            return ApiError(
                401,
                "missing or wrong API key; send the header Authorization: Bearer <key>, or x-api-key: <key>",
                code="invalid_api_key",
            )
        if self._drain.begun:
            return self._drain.error()
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
        self,
        events: AsyncGenerator[bytes, None],
        on_failure: Callable[[Exception], bytes],
        write_timeout_s: float,
        drain: Drain,
    ) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._events = events
        self._on_failure = on_failure
        self._write_timeout_s = write_timeout_s
        self._drain = drain
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        try:
            await while_connected(receive, self._answer(send))
        except ClientDisconnect as gone:
            if not self._begun:
                raise
            self._on_failure(gone)
        except asyncio.CancelledError:
            if not (self._begun and self._drain.ended_this()):
                raise
            await self._fail(send, self._drain.error())
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
            await self._fail(send, failure)
        else:
            await self._write(send, b"", more_body=False)

    async def _fail(self, send: Send, failure: Exception) -> None:
        await self._write(send, self._on_failure(failure))
        await self._write(send, b"", more_body=False)

    async def _write(self, send: Send, event: bytes, more_body: bool = True) -> None:
        """Send an event. Raises ClientDisconnect when the client has stopped reading."""
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await send({"type": "http.response.body", "body": event, "more_body": more_body})
        except TimeoutError:
            raise ClientDisconnect from None
