"""What all endpoints share: the cluster, the tokenizer, the checks, the figures, and how a checked request is answered.

An endpoint reads its body (`Service.body`), makes a `CheckedRequest` of it, and gives that to `Service.answer` with a
`Writer`, which knows the shape of the answer. Nothing else generates tokens, whatever API the client speaks.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from dualpath.cluster.generator import Generator
from dualpath.server.answers import Writer
from dualpath.server.body import Body, BodyReader
from dualpath.server.chat.dialect import Dialect
from dualpath.server.codec import TextCodec
from dualpath.server.drain import Drain
from dualpath.server.errors import INTERNAL, ApiError, as_api_error
from dualpath.server.generation import Usage, run_request
from dualpath.server.http import EventStream, while_connected
from dualpath.server.limits import ServerLimits
from dualpath.server.metrics import GenerationTimer, ServerMetrics
from dualpath.server.request_record import current
from dualpath.server.requests import CheckedRequest, RequestChecker

logger = logging.getLogger(__name__)


class Route(NamedTuple):
    """One endpoint. `endpoints/` has a module per group, each with a function `routes`."""

    path: str
    endpoint: Callable[[Request], Awaitable[Response]]
    methods: tuple[str, ...] = ("GET",)


class Service:
    """The state of one application. `endpoints` holds its paths, for the figures."""

    endpoints: frozenset[str] = frozenset()
    who_controls: Literal["nobody", "keys", "this host"] = "nobody"
    """Who may use the endpoints of `endpoints/control.py`; ``keys``: the gate has asked for one already."""

    def __init__(
        self, generator: Generator, codec: TextCodec, dialect: Dialect, limits: ServerLimits, drain: Drain
    ) -> None:
        self.generator = generator
        self.codec = codec
        self.limits = limits
        self.checker = RequestChecker(generator.model, codec, dialect, limits.max_choices)
        self.drain = drain
        self._bodies = BodyReader(limits)
        self.metrics = ServerMetrics(generator.model.name)
        self.created = int(time.time())

    async def body(self, request: Request, kind: type[Body]) -> Body:
        return await self._bodies.read(request, kind)

    async def optional_body(self, request: Request, kind: type[Body]) -> Body:
        """As `body`; no body counts as an empty object."""
        return await self._bodies.read(request, kind, optional=True)

    async def answer(self, request: Request, checked: CheckedRequest, writer: Writer, arrived_s: float) -> Response:
        """Generate the answer: one body, or a stream of events while the client reads it."""
        path = request.url.path
        pieces = run_request(
            self.generator, self.codec, checked, partial(GenerationTimer, self.metrics, path, arrived_s)
        )
        record = current()
        record.checked, record.usage = checked, (usage := Usage(checked))
        if checked.stream:
            on_failure = partial(self._failed_midway, path, writer)
            events = self._events(pieces, writer, usage)
            return EventStream(events, on_failure, self.limits.write_timeout_s, self.drain)
        return await while_connected(request.receive, self._whole(pieces, writer, usage, checked.scores_prompt))

    async def _whole(self, pieces: AsyncGenerator[Any, None], writer: Writer, usage: Usage, is_large: bool) -> Response:
        collected = []
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                usage.add(piece)
                collected.append(piece)
        self._count(usage)
        # A prompt's log-probabilities may take a second to write: not on the loop.
        body = await asyncio.to_thread(writer.whole, collected, usage) if is_large else writer.whole(collected, usage)
        return Response(body, media_type="application/json")

    async def _events(
        self, pieces: AsyncGenerator[Any, None], writer: Writer, usage: Usage
    ) -> AsyncGenerator[bytes, None]:
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                usage.add(piece)
                yield writer.event(piece)
        self._count(usage)
        yield writer.end(usage)

    def _count(self, usage: Usage) -> None:
        self.metrics.answered(usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)

    # ── failures ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def failed(self, request: Request, failure: Exception) -> Response:
        """Answer every failure before an answer has started."""
        response = self.error_of(request, failure).response(request.url.path)
        response.headers.update(getattr(failure, "headers", None) or {})
        return response

    def error_of(self, request: Request, failure: Exception) -> ApiError:
        """Count a failure. Returns what the client is told of it."""
        error = as_api_error(failure)
        self.count_failure(request.url.path, error)
        return error

    def _failed_midway(self, path: str, writer: Writer, failure: Exception) -> bytes:
        """Count a failure after a stream has begun. Returns the event that tells the client."""
        error = as_api_error(failure)
        if error.code == INTERNAL:
            logger.error("request %s: its stream failed unexpectedly; please report it", current().id, exc_info=failure)
        self.count_failure(path, error)
        return writer.failed(error)

    def count_failure(self, path: str, error: ApiError) -> None:
        # Clients must not be able to create series.
        self.metrics.failed(path if path in self.endpoints else "other", error.code)


def json_response(record: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(record), status, media_type="application/json")
