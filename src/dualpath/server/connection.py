"""One connection: HTTP/1.1 within bounds and deadlines, and a JSON error for whatever is no request.

uvicorn's protocol over httptools, which accepts heads of any size, waits for ever for one that drips, answers what it
can't parse with plain text, and loses the body of a request that offers an upgrade (Java's HttpClient and
``curl --http2`` offer h2c in the first request of a connection; a server may ignore the offer, and this one does).
"""

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from dualpath.server.errors import ApiError
from dualpath.server.limits import ServerLimits

_LINGER_S = 5.0
"""How long what a client still sends is read after its answer: closing at once would take the answer from it."""
_UPGRADE_HEADERS = frozenset({b"connection", b"upgrade", b"http2-settings"})


class Connection(HttpToolsProtocol):
    """`on_refusal` is told of every error that this class answers, which no application sees."""

    def __init__(
        self, *args: Any, limits: ServerLimits, most_connections: int, on_refusal: Callable[[ApiError], None], **kw: Any
    ) -> None:
        super().__init__(*args, **kw)
        self._limits = limits
        self._most_connections = most_connections
        self._on_refusal = on_refusal
        self._running: RequestResponseCycle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._in_head = False
        self._head_bytes = 0
        self._silent_bytes = 0  # since the parser last said that it got anywhere
        self._refused = False

    # ── the transport's events ──────────────────────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._after(self._limits.head_timeout_s, self._head_is_late)
        if len(self.connections) > self._most_connections:
            message = f"the server has {self._most_connections} open connections, all that it may have; try again soon"
            self._refuse(ApiError(503, message, code="overloaded", retry_after_s=1.0))

    def connection_lost(self, exc: Exception | None) -> None:
        self._after(None)
        self._unset_keepalive_if_required()
        if self._running is not None and not self._running.response_complete:  # uvicorn tells only the last in line
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._silent_bytes += len(data)
        try:
            self._feed(data)
            if self._in_head or self._silent_bytes:
                self._await_more()
        except ApiError as error:
            self._refuse(error)
        except httptools.HttpParserError as error:
            cause = error.__context__
            self._refuse(cause if isinstance(cause, ApiError) else _not_http(error))

    def _await_more(self) -> None:
        if self._silent_bytes > self._limits.max_head_bytes:
            raise self._head_too_large()
        if self._in_head and self._timer is None:
            self._after(self._limits.head_timeout_s, self._head_is_late)

    def _feed(self, data: bytes) -> None:
        while True:
            try:
                return self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                data = self._without_upgrade() + data[offer.args[0] :]

    def _without_upgrade(self) -> bytes:
        """Returns the head of the request again, without its offer of another protocol, for a new parser."""
        if self.parser.get_method() == b"CONNECT":
            raise ApiError(405, "CONNECT is for proxies; this is a server", code="method_not_allowed")
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        lines += [b"%b: %b" % header for header in self.headers if header[0] not in _UPGRADE_HEADERS]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
        return b"\r\n".join([*lines, b"", b""])

    # ── the parser's events ─────────────────────────────────────────────────────────────────────────────────────────

    def on_message_begin(self) -> None:
        self._unset_keepalive_if_required()
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > self._limits.max_target_bytes:
            raise ApiError(
                414, f"the request's target has more than {self._limits.max_target_bytes} bytes", code="target_too_long"
            )

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes > self._limits.max_head_bytes or len(self.headers) >= self._limits.max_headers:
            raise self._head_too_large()
        if not self._in_head:  # what follows a chunked body is no header of the request
            return
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self._silent_bytes = 0
        if self.parser.should_upgrade():
            return  # comes again without its offer
        self._in_head = False
        self._after(None)
        if len(self.pipeline) >= self._limits.max_pipelined:
            message = f"more than {self._limits.max_pipelined} requests wait on this connection; wait for answers"
            raise ApiError(429, message, code="overloaded", retry_after_s=1.0)
        super().on_headers_complete()

    def on_chunk_header(self) -> None:
        self._silent_bytes = 0

    def on_body(self, body: bytes) -> None:
        self._silent_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        late = self.cycle.response_complete
        super().on_message_complete()
        self.cycle.more_body = False
        if late:  # the answer did not need the body; now the connection can be used again
            self._keep_alive(self.timeout_keep_alive)

    # ── answers, and their end ──────────────────────────────────────────────────────────────────────────────────────

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._after(self._limits.write_timeout_s, self.transport.abort)  # if its client does not read
        elif self.cycle is not None and self.cycle.response_complete and self.cycle.more_body:
            self._keep_alive(_LINGER_S)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._after(self._limits.write_timeout_s, self.transport.abort)

    def _refuse(self, error: ApiError) -> None:
        """Answer `error` and close, unless an earlier request is being answered: then close after that."""
        self._refused = True
        self._after(None)
        running = self._running
        if running is not None and not running.response_complete:
            if running is not self.cycle or not running.more_body:
                self.pipeline.clear()
                running.keep_alive = False
                return
            running.disconnected = True
            running.message_event.set()
        self._on_refusal(error)
        if running is None or not running.response_started or running.response_complete:
            self.transport.write(_raw_response(error))
        self.transport.write_eof()
        self.flow.resume_reading()
        self._after(_LINGER_S, self.transport.abort)

    def _head_is_late(self) -> None:
        self._timer = None
        if self._in_head:
            message = f"the request's headers did not arrive within {self._limits.head_timeout_s:g} s"
            self._refuse(ApiError(408, message, code="head_timeout"))
        else:
            self.transport.close()

    def _head_too_large(self) -> ApiError:
        limits = self._limits
        message = f"the headers are more than {limits.max_headers}, or larger than {limits.max_head_bytes} bytes"
        return ApiError(431, message, code="headers_too_large")

    def _keep_alive(self, seconds: float) -> None:
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def _after(self, seconds: float | None, act: Callable[[], None] | None = None) -> None:
        """Have `act` called after `seconds`, in place of what waits now."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None or act is None else self.loop.call_later(seconds, act)


def _not_http(error: Exception) -> ApiError:
    return ApiError(400, f"this is not an HTTP/1.1 request: {error}", code="invalid_http")


def _raw_response(error: ApiError) -> bytes:
    response = error.response()
    lines = [b"HTTP/1.1 %d %b" % (error.status, HTTPStatus(error.status).phrase.encode())]
    lines += [b"%b: %b" % header for header in response.raw_headers if header[0] != b"connection"]
    return b"\r\n".join([*lines, b"connection: close", b"", bytes(response.body)])
