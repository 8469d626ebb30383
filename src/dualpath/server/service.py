"""What all endpoints share: the cluster, the tokenizer, the checks, the figures, and how a checked request is answered.

An endpoint reads its body (`Service.body`), makes a `CheckedRequest` of it, and gives that to `Service.answer` with a
`Writer`, which knows the shape of the answer. Nothing else generates tokens, whatever API the client speaks.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from dualpath.cluster.generator import Generator
from dualpath.server.answers import Writer
from dualpath.server.chat.dialect import Dialect
from dualpath.server.codec import TextCodec
from dualpath.server.door import Door
from dualpath.server.drain import Drain
from dualpath.server.generation import Usage, run_request
from dualpath.server.http import EventStream, while_connected
from dualpath.server.limits import ServerLimits
from dualpath.server.metrics import GenerationTimer
from dualpath.server.request_record import current
from dualpath.server.requests import CheckedRequest, RequestChecker


class Service(Door):
    """The state of one application."""

    def __init__(
        self, generator: Generator, codec: TextCodec, dialect: Dialect, limits: ServerLimits, drain: Drain
    ) -> None:
        super().__init__(generator, limits, drain)
        self.codec = codec
        self.checker = RequestChecker(generator.model, codec, dialect, limits.max_choices)
        self.created = int(time.time())

    async def answer(self, request: Request, checked: CheckedRequest, writer: Writer, arrived_s: float) -> Response:
        """Generate the answer: one body, or a stream of events while the client reads it."""
        path = request.url.path
        pieces = run_request(
            self.generator, self.codec, checked, partial(GenerationTimer, self.metrics, path, arrived_s)
        )
        record = current()
        record.checked, record.usage = checked, (usage := Usage(checked))
        if checked.stream:
            on_failure = partial(self.failed_midway, path, writer.failed)
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
