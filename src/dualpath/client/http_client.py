"""HTTP/1.1 for a load generator: thousands of streams in one thread, each piece stamped when it arrives.

Theory of operation. A stream brings a piece of body every few milliseconds, times thousands of agents. A general client
wakes a task for every piece, which costs more than all the rest (``benchmarks/replay_pacing.py``). Nobody needs a piece
before the stream has ended, but its time of arrival counts. So a connection's callback stamps the piece, hands it to
llhttp (the parser, through httptools), keeps the body it finds, and wakes its task once, at the end of the response::

    socket ──data_received──► (time, body) … (time, body) ──end of message──► Response(status, headers, pieces)

Connections are kept for the next request, but not for long: a server may close an idle one just as it is used again.
"""

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from urllib.parse import urlsplit

import httptools
import msgspec

CONNECT_DEADLINE_S = 30.0
KEEP_ALIVE_S = 2.0
"""uvicorn closes idle connections after 5 s."""
MAX_BODY_BYTES = 256 * 2**20

Pieces = list[tuple[float, bytes]]


class HttpError(Exception):
    """There is no connection, it broke off, or the answer is not HTTP."""


class Response(msgspec.Struct, frozen=True):
    """A complete answer. Times are `time.perf_counter` seconds; header names are in lower case."""

    status: int
    headers: dict[str, str]
    pieces: Pieces
    sent_at_s: float
    """When the request was handed to its connection."""

    @property
    def body(self) -> bytes:
        return b"".join(piece for _, piece in self.pieces)


class HttpClient:
    """Requests to one server, with one connection per request under way. Use it as a context manager."""

    def __init__(self, url: str, headers: Mapping[str, str] | None = None) -> None:
        """`url` is the root that paths are appended to. Raises ValueError unless it is http:// or https://."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not a server's URL; write one such as http://127.0.0.1:8000")
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._root = parts.path.rstrip("/")
        fixed = {"Host": parts.netloc.rpartition("@")[2], "Accept": "*/*", **(headers or {})}
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in fixed.items())
        self._idle: list[tuple[float, _Connection]] = []

    async def __aenter__(self) -> "HttpClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _, connection in self._idle:
            connection.close()
        self._idle.clear()

    async def request(
        self, method: str, path: str, body: bytes = b"", on_first: Callable[[], object] | None = None
    ) -> Response:
        """Returns the whole answer; calls `on_first` when the first piece of its body arrives. Raises HttpError.

        Only connecting has a deadline; the caller owns the rest. Cancelling the request closes its connection.
        """
        connection = self._reused() or await self._connected()
        head = f"{method} {self._root}{path} HTTP/1.1\r\n{self._headers}"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        try:
            response = await connection.exchange(head.encode() + b"\r\n", body, on_first)
        except BaseException:
            connection.close()
            raise
        if connection.reusable:
            self._idle.append((time.monotonic(), connection))
        else:
            connection.close()
        return response

    def _reused(self) -> "_Connection | None":
        """Takes the connection used last if it is young enough; otherwise the older ones are too old as well."""
        while self._idle:
            since_s, connection = self._idle.pop()
            if connection.reusable and time.monotonic() - since_s < KEEP_ALIVE_S:
                return connection
            connection.close()
        return None

    async def _connected(self) -> "_Connection":
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_DEADLINE_S):
                _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._ssl)
        except TimeoutError as error:
            raise HttpError(f"no connection to {self._host}:{self._port} within {CONNECT_DEADLINE_S:g} s") from error
        except OSError as error:
            raise HttpError(f"no connection to {self._host}:{self._port}: {error.strerror or error}") from error
        return connection


class _Connection(asyncio.Protocol):
    """One connection, which does one exchange at a time. The methods named ``on_…`` are the parser's callbacks."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport
        self._parser = httptools.HttpResponseParser(self)
        self._ended: asyncio.Future[None] | None = None
        self._on_first: Callable[[], object] | None = None
        self._headers: dict[str, str] = {}
        self._pieces: Pieces = []
        self._body_bytes = 0
        self._now_s = 0.0
        self._broken = False

    @property
    def reusable(self) -> bool:
        return not self._broken and not self._transport.is_closing()

    async def exchange(self, head: bytes, body: bytes, on_first: Callable[[], object] | None) -> Response:
        self._headers, self._pieces, self._body_bytes = {}, [], 0
        self._on_first = on_first
        self._ended = asyncio.get_running_loop().create_future()
        sent_at_s = time.perf_counter()
        self._transport.writelines((head, body))
        await self._ended
        return Response(self._parser.get_status_code(), self._headers, self._pieces, sent_at_s)

    def close(self) -> None:
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # a stream's; uvloop's is of no asyncio class

    def data_received(self, data: bytes) -> None:
        self._now_s = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"the answer is not HTTP: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(f"the connection ended before the answer did{f': {error}' if error else ''}")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        if self._on_first is not None:
            self._on_first()
            self._on_first = None
        self._pieces.append((self._now_s, body))
        self._body_bytes += len(body)
        if self._body_bytes > MAX_BODY_BYTES:
            self._fail(f"the answer is longer than {MAX_BODY_BYTES} bytes")

    def on_message_complete(self) -> None:
        self._broken |= not self._parser.should_keep_alive()
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    def _fail(self, message: str) -> None:
        self._broken = True
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(HttpError(message))
        self._transport.abort()
