"""An answer that passes as it comes, a piece at a time: of what is not routed."""

import asyncio
from collections.abc import AsyncGenerator, Callable

import httpx
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dualpath.router.upstream import UpstreamError, answered_headers, left_s, pieces
from dualpath.server.drain import Drain
from dualpath.server.errors import ApiError
from dualpath.server.http import while_connected


class Passing(Response):
    """Passes `answer` on, and closes it before the call returns. No piece is read before the last one is sent.

    A stream of events that fails ends with the event of `failed`; any other answer is cut off.
    """

    def __init__(
        self,
        answer: httpx.Response,
        failed: Callable[[Exception], bytes],
        write_timeout_s: float,
        deadline_s: float,
        drain: Drain,
    ) -> None:
        super().__init__(status_code=answer.status_code, headers=answered_headers(answer))
        self.raw_headers = [header for header in self.raw_headers if header[0] != b"content-length"]
        self._answer = answer
        self._failed = failed
        self._write_timeout_s = write_timeout_s
        self._deadline_s = deadline_s
        self._drain = drain
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        try:
            await while_connected(receive, self._pass(send))
        except ClientDisconnect as gone:
            self._failed(gone)
        except asyncio.CancelledError:
            if not (self._begun and self._drain.ended_this()):
                raise
            await self._fail(send, self._drain.error())
        except Exception as failure:
            await self._fail(send, failure)
        finally:
            await self._answer.aclose()

    async def _pass(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self._begun = True
        read = pieces(self._answer)
        try:
            while (piece := await self._next(read)) is not None:
                await self._write(send, piece)
        finally:
            await read.aclose()
        await self._write(send, b"", more_body=False)

    async def _next(self, read: AsyncGenerator[bytes, None]) -> bytes | None:
        try:
            async with asyncio.timeout(left_s(self._deadline_s)):
                return await anext(read, None)
        except TimeoutError:
            raise ApiError(504, "the request took longer than it may", code="deadline_exceeded") from None
        except UpstreamError as error:
            raise ApiError(502, f"the vLLM server broke its answer off: {error}", code="answer_broke_off") from error

    async def _fail(self, send: Send, failure: Exception) -> None:
        event = self._failed(failure)
        if self.headers.get("content-type", "").startswith("text/event-stream"):
            await self._write(send, event)
            await self._write(send, b"", more_body=False)
        # Else the connection is cut, as the answer has no end.

    async def _write(self, send: Send, piece: bytes, more_body: bool = True) -> None:
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await send({"type": "http.response.body", "body": piece, "more_body": more_body})
        except TimeoutError:
            raise ClientDisconnect from None
