"""One choice of an answer: brought to a decode engine, posted to its vLLM server, read, and tried again elsewhere.

Until the first byte any failure leads to another attempt, which the cluster makes. After it, to an error event.
"""

import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import NamedTuple

import httpx
import msgspec
from starlette.types import Scope

from dualpath.cluster.generator import GenerateRequest, Handoff, Router
from dualpath.router.asked import Fields, Rendered, handed
from dualpath.router.reading import READERS, Reader
from dualpath.router.routing import Routing
from dualpath.router.upstream import RefusalError, Upstream, UpstreamError, events, whole
from dualpath.server.errors import ApiError
from dualpath.server.generation import Piece, Usage
from dualpath.server.metrics import GenerationTimer, ServerMetrics

MAX_ERROR_BYTES = 2**20
_OF_THE_OPERATOR = (401, 403, 408, 429)
"""What a server says to the router rather than to the client."""


class Shared(NamedTuple):
    """What the choices of one request share. `deadline_s` is of the loop's clock, `arrived_s` `time.perf_counter`'s."""

    cluster: Router
    upstream: Upstream
    metrics: ServerMetrics
    path: str
    scope: Scope
    stream: bool
    asked_usage: bool
    usage: Usage
    arrived_s: float
    deadline_s: float


class Choice(msgspec.Struct, frozen=True):
    """`body` is the client's, of this choice alone; `suffix` tells its request's id from the others'."""

    index: int
    prompt: Rendered
    request: GenerateRequest
    body: Fields
    suffix: str


class _Begun(msgspec.Struct, frozen=True):
    """An answer whose first byte is there: the first events of a stream and its `rest`, or the whole answer."""

    handoff: Handoff
    routing: Routing
    reader: Reader
    ready: list[bytes] = []
    rest: AsyncGenerator[bytes, None] | None = None
    answer: Fields = {}


class Run:
    """Generates one choice, once: `events` or `whole`. `reader` has read what came so far."""

    def __init__(self, shared: Shared, choice: Choice) -> None:
        self._shared = shared
        self.choice = choice
        self._timer = GenerationTimer(shared.metrics, shared.path, shared.arrived_s, choice.request)
        self.reader = READERS[shared.path](0, shared.asked_usage)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yields its events, except for the one with the usage and the last one, and ends when its blocks are durable.

        Raises ApiError, RequestError, or RefusalError before the first event.
        """
        try:
            async with self._begun() as begun:
                ready = begun.ready
                while True:
                    for event in ready:
                        self._step()
                        yield event + b"\n\n"
                    if begun.reader.last is not None:
                        break
                    ready = await _next(begun)
                await self._end(begun)
        finally:
            self._timer.close(sys.exc_info()[0])

    async def whole(self) -> Fields:
        """Returns the whole answer once its blocks are durable. Raises ApiError, RequestError, RefusalError."""
        try:
            async with self._begun() as begun:
                await self._end(begun)
                return begun.answer
        finally:
            self._timer.close(sys.exc_info()[0])

    @asynccontextmanager
    async def _begun(self) -> AsyncIterator[_Begun]:
        cluster = self._shared.cluster
        async with Routing(cluster.route(self.choice.request), self._shared.deadline_s) as routing:
            while True:
                handoff = await routing.handoff()
                async with AsyncExitStack() as closing:
                    try:
                        begun = await routing.unless_news(self._open(handoff, routing, closing))
                    except UpstreamError as failure:
                        cluster.hand_off_failed(handoff.owner, str(failure))
                        continue
                    if begun is None:
                        continue
                    if cluster.answered(handoff.owner) is None and not await routing.has_ended():
                        continue
                    self.reader = begun.reader
                    self._note(handoff)
                    yield begun
                    return

    async def _open(self, handoff: Handoff, routing: Routing, closing: AsyncExitStack) -> _Begun:
        """Post the choice. Raises UpstreamError when another server may do better, RefusalError when none will."""
        shared = self._shared
        body = handed(shared.path, self.choice.body, self.choice.prompt, handoff)
        headers = shared.upstream.headers(shared.scope, self.choice.suffix, handoff.dp_rank)
        response = await shared.upstream.send(handoff.url + shared.path, headers, body)
        closing.push_async_callback(response.aclose)
        if response.status_code != 200:
            raise await refused(response)
        reader = READERS[shared.path](handoff.cached_tokens, shared.asked_usage)
        if not shared.stream:
            return _Begun(handoff, routing, reader, answer=reader.whole(await whole(response)))
        rest = events(response)
        closing.push_async_callback(rest.aclose)
        async for block in rest:
            if block.startswith(b":"):  # a comment, to keep the connection alive
                continue
            if (why := reader.server_failed(block)) is not None:
                raise UpstreamError(f"{handoff.url}: {why}")
            return _Begun(handoff, routing, reader, reader.take(block), rest)
        raise UpstreamError(f"{handoff.url}: the stream ended without an event")

    def _note(self, handoff: Handoff) -> None:
        """The first byte has come."""
        piece = Piece(
            choice=self.choice.index,
            text="",
            token_ids=[],
            logprobs=None,
            finish_reason=None,
            cached_tokens=handoff.cached_tokens,
        )
        self._shared.usage.add(piece)

    def _step(self) -> None:
        self._timer.step(0, self.reader.cached_tokens, None, None)

    async def _end(self, begun: _Begun) -> None:
        """The last byte has come."""
        used, usage = begun.reader.used, self._shared.usage
        usage.completion_tokens += used.completion_tokens
        usage.reasoning_tokens += used.reasoning_tokens
        answered = self._shared.cluster.answered(begun.handoff.owner)
        await begun.routing.durable()
        usage.timings = begun.routing.timings or answered or usage.timings
        self._timer.step(used.completion_tokens, begun.reader.cached_tokens, used.finish_reason, usage.timings)


async def refused(response: httpx.Response) -> Exception:
    """Returns what an answer other than 200 means. Raises UpstreamError when it can't be read."""
    body = await whole(response, MAX_ERROR_BYTES)
    status = response.status_code
    if 400 <= status < 500 and status not in _OF_THE_OPERATOR:
        return RefusalError(status, response.headers.get("content-type", "application/json"), body)
    return UpstreamError(f"{response.url}: HTTP {status}: {body[:300].decode(errors='replace')}")


async def _next(begun: _Begun) -> list[bytes]:
    """Returns what comes next of a begun stream, maybe nothing yet."""
    assert begun.rest is not None
    try:
        block = await begun.routing.next_of(begun.rest)
        if block is None:
            raise UpstreamError("it ended in the middle")
        if (why := begun.reader.server_failed(block)) is not None:
            raise UpstreamError(why)
        return begun.reader.take(block)
    except UpstreamError as error:
        raise _broke_off(str(error)) from error


def _broke_off(why: str) -> ApiError:
    message = f"the vLLM server broke its answer off ({why}); send the request again"
    return ApiError(502, message, code="answer_broke_off")
