"""HTTP to the vLLM servers: bounded, with deadlines, and every failure told apart by whether another may do better."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator

import httpx
from starlette.datastructures import Headers
from starlette.types import Scope

from dualpath.server.limits import ServerLimits
from dualpath.server.request_record import current

CONNECT_S = 5.0
_WRITE_S = 60.0
_POOL_S = 10.0
_KEEP_ALIVE_S = 2.0
"""Less than the 5 s after which a vLLM server closes an idle connection, so that no request meets a closed one."""
_MOST_IDLE = 256
MAX_ANSWER_BYTES = 512 * 2**20
MAX_EVENT_BYTES = 64 * 2**20
"""A last event of /v1/responses holds the whole answer."""
_OF_ONE_HOP = frozenset(
    {
        *(b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"),
        *(b"host", b"content-length", b"accept-encoding", b"expect", b"content-encoding"),
    }
)
_OURS = frozenset({b"authorization", b"x-api-key", b"x-request-id", b"x-data-parallel-rank", b"cookie"})
_NOT_ANSWERED = _OF_ONE_HOP | {b"date", b"server", b"x-request-id", b"set-cookie"}


class UpstreamError(Exception):
    """A vLLM server that does not answer, or not with what makes sense; another may. `reached`: it may have begun."""

    def __init__(self, message: str, reached: bool = True) -> None:
        super().__init__(message)
        self.reached = reached


class RefusalError(Exception):
    """What a vLLM server has answered to a request that it does not carry out: the client's to read."""

    def __init__(self, status: int, content_type: str, body: bytes) -> None:
        super().__init__(f"HTTP {status}: {body[:300].decode(errors='replace')}")
        self.status = status
        self.content_type = content_type
        self.body = body


class Upstream:
    """A client of all the servers. `api_key` is theirs; empty: they want none."""

    def __init__(self, limits: ServerLimits, api_key: str) -> None:
        self._client = httpx.AsyncClient(
            trust_env=False,
            follow_redirects=False,
            limits=httpx.Limits(
                max_connections=2 * limits.max_inflight_requests,
                max_keepalive_connections=_MOST_IDLE,
                keepalive_expiry=_KEEP_ALIVE_S,
            ),
            # No time between two reads: each who reads has a deadline.
            timeout=httpx.Timeout(None, connect=CONNECT_S, write=_WRITE_S, pool=_POOL_S),
        )
        self._own = [(b"authorization", f"Bearer {api_key}".encode())] if api_key else []

    async def close(self) -> None:
        await self._client.aclose()

    def headers(self, scope: Scope, suffix: str = "", dp_rank: int | None = None) -> list[tuple[bytes, bytes]]:
        """Returns the headers of a client's request as they go on, with our id, their key and the rank."""
        kept = [(name, value) for name, value in scope["headers"] if name not in _OF_ONE_HOP and name not in _OURS]
        ours = [(b"x-request-id", f"{current().id}{suffix}".encode()), (b"accept-encoding", b"identity"), *self._own]
        if all(name != b"content-type" for name, _ in kept):
            ours.append((b"content-type", b"application/json"))
        if dp_rank is not None:
            ours.append((b"x-data-parallel-rank", str(dp_rank).encode()))
        return kept + ours

    async def send(
        self,
        url: str,
        headers: list[tuple[bytes, bytes]],
        body: bytes = b"",
        method: str = "POST",
    ) -> httpx.Response:
        """Returns the answer, its head read; to be closed. Raises UpstreamError."""
        with told(url):
            request = self._client.build_request(method, url, headers=headers, content=body)
            return await self._client.send(request, stream=True)


@contextlib.contextmanager
def told(url: str) -> Iterator[None]:
    """Turns what httpx raises into UpstreamError."""
    try:
        yield
    except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL) as error:
        reached = not isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.InvalidURL))
        raise UpstreamError(f"{url}: {str(error) or type(error).__name__}", reached) from error


async def whole(response: httpx.Response, most: int = MAX_ANSWER_BYTES) -> bytes:
    """Returns the body. Raises UpstreamError."""
    body = bytearray()
    async for chunk in pieces(response):
        body += chunk
        if len(body) > most:
            raise UpstreamError(f"{response.url}: the answer has more than {most} bytes")
    return bytes(body)


async def pieces(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """Yields the body as it comes, no more read ahead than one piece. Raises UpstreamError."""
    raw = response.aiter_raw()
    try:
        while True:
            with told(str(response.url)):
                piece = await anext(raw, None)
            if piece is None:
                return
            yield piece
    finally:
        await response.aclose()


async def events(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """Yields the blocks of a stream of server-sent events, each without the empty line that ends it."""
    rest = bytearray()
    searched = 0
    async with contextlib.aclosing(pieces(response)) as read:
        async for piece in read:
            rest += piece
            start = 0
            while (end := rest.find(b"\n\n", max(start, searched))) >= 0:
                yield bytes(rest[start:end])
                start = end + 2
            del rest[:start]
            searched = max(0, len(rest) - 1)
            if len(rest) > MAX_EVENT_BYTES:
                raise UpstreamError(f"{response.url}: an event has more than {MAX_EVENT_BYTES} bytes")


def data_of(block: bytes) -> bytes:
    """Returns the data of one event; empty for a comment."""
    return b"\n".join(line[5:].removeprefix(b" ") for line in block.split(b"\n") if line.startswith(b"data:"))


def with_data(block: bytes, data: bytes) -> bytes:
    """Returns the event with other data, which has no line breaks."""
    return b"\n".join([*(line for line in block.split(b"\n") if not line.startswith(b"data:")), b"data: " + data])


def answered_headers(response: httpx.Response) -> dict[str, str]:
    """Returns the headers of an answer that go on to the client."""
    kept = {name: value for name, value in response.headers.raw if name.lower() not in _NOT_ANSWERED}
    return dict(Headers(raw=[(name.lower(), value) for name, value in kept.items()]))


def left_s(deadline_s: float) -> float:
    return max(0.0, deadline_s - asyncio.get_running_loop().time())
