"""Follows one request's way through the cluster, beside the answer that a vLLM server gives it."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from dualpath.cluster.generator import GeneratedTokens, Handoff, RequestError
from dualpath.router.upstream import left_s
from dualpath.server.errors import INTERNAL, ApiError
from dualpath.server.request_record import current
from dualpath.spec.timings import Timings

logger = logging.getLogger(__name__)
T = TypeVar("T")

DURABLE_S = 10.0
"""How long the end of an answer is held back until its blocks are durable, so that the next turn hits them."""
_CLOSE_S = 30.0


class Routing:
    """What `Router.route` has given so far. An async context manager; leaving it cancels the request."""

    def __init__(self, steps: AsyncGenerator[Handoff | GeneratedTokens, None], deadline_s: float) -> None:
        self._steps = steps
        self.deadline_s = deadline_s
        self._handoff: Handoff | None = None
        self._ended: GeneratedTokens | None = None
        self._failure: Exception | None = None
        self._news = asyncio.Event()
        """A hand-off to take, or that there will be no more."""
        self._reading: asyncio.Timeout | None = None
        self._over = self._waiting = False

    async def __aenter__(self) -> "Routing":
        self._task = asyncio.create_task(self._follow())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        done, _pending = await asyncio.wait({self._task}, timeout=_CLOSE_S)
        if not done:
            logger.error("the cluster did not end a cancelled request within %.0f s", _CLOSE_S)

    async def _follow(self) -> None:
        try:
            async with contextlib.aclosing(self._steps):
                async for step in self._steps:
                    if isinstance(step, Handoff):
                        self._handoff = step
                        self._news.set()
                    elif step.finish_reason is not None:
                        self._ended = step
        except Exception as error:
            self._failure = error
        self._over = True
        normally = self._failure is None and self._ended is not None and self._ended.finish_reason != "abort"
        if not normally or self._waiting:
            self._news.set()
        if self._stops and self._reading is not None:
            with contextlib.suppress(RuntimeError):  # its time is over already
                self._reading.reschedule(asyncio.get_running_loop().time())

    @property
    def _stops(self) -> bool:
        """Whether an answer that has begun must end: the request is too late, or was aborted."""
        late = isinstance(self._failure, RequestError) and self._failure.code == "deadline_exceeded"
        return late or (self._ended is not None and self._ended.finish_reason == "abort")

    def raise_if_over(self, begun: bool = False) -> None:
        """Raises what ends the request. An answer that has `begun` outlives most failures: its server needs nobody."""
        if begun and not self._stops:
            return
        if self._failure is not None:
            raise self._failure
        if self._ended is not None and self._ended.finish_reason == "abort":
            raise ApiError(503, "the request was aborted by the operator", code="aborted")
        if self._ended is None and self._over:
            raise ApiError(500, "the request ended without a finish reason; please report it", code=INTERNAL)

    async def handoff(self) -> Handoff:
        """Returns the next hand-off. Raises ApiError or RequestError when there is none."""
        await self._next_step()
        if self._handoff is None:
            raise ApiError(502, "the vLLM server ended the request without an answer", code="no_answer")
        taken, self._handoff, self._waiting = self._handoff, None, False
        self._news.clear()
        return taken

    async def has_ended(self) -> bool:
        """Returns whether the request has ended well rather than gone on to another attempt, once that is known.

        A server counts a request as finished before it has sent the answer. Raises as `handoff`.
        """
        await self._next_step()
        return self._handoff is None

    async def _next_step(self) -> None:
        """Wait for a hand-off, or a good end."""
        self._waiting = True
        while self._handoff is None and not self._over:
            self._news.clear()
            try:
                async with asyncio.timeout(left_s(self.deadline_s)):
                    await self._news.wait()
            except TimeoutError:
                raise self.late() from None
        if self._handoff is None:
            self.raise_if_over()

    @property
    def timings(self) -> Timings | None:
        """Of the whole, once it has ended."""
        return self._ended.timings if self._ended is not None else None

    async def unless_news(self, work: Coroutine[Any, Any, T]) -> T | None:
        """Returns the result of `work`; or None, with `work` cancelled, if another hand-off or the end comes first.

        Raises what `work` raises, and ApiError when it is too late.
        """
        working, news = asyncio.create_task(work), asyncio.create_task(self._news.wait())
        try:
            timeout_s = left_s(self.deadline_s)
            await asyncio.wait({working, news}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            if not news.done():
                raise self.late()
            return None
        finally:
            for task in (working, news):
                task.cancel()
            await asyncio.gather(working, news, return_exceptions=True)

    async def next_of(self, source: AsyncGenerator[T, None]) -> T | None:
        """Returns the next of a begun answer, None at its end. Raises as `raise_if_over` and `source`."""
        self.raise_if_over(begun=True)
        try:
            async with asyncio.timeout(left_s(self.deadline_s)) as self._reading:
                return await anext(source, None)
        except TimeoutError:
            self.raise_if_over(begun=True)
            raise self.late() from None
        finally:
            self._reading = None

    async def durable(self) -> None:
        """Wait until the answer's blocks are durable, or it is known that they will not be, or for too long."""
        done, _ = await asyncio.wait({self._task}, timeout=min(DURABLE_S, left_s(self.deadline_s)))
        if not done:
            logger.warning("request %s: its KV is not durable after %.0f s; its answer ends", current().id, DURABLE_S)
        elif self._failure is not None:
            logger.warning("request %s: its KV may not be stored: %s", current().id, self._failure)

    def late(self) -> ApiError:
        return ApiError(504, "the request took longer than it may", code="deadline_exceeded")
