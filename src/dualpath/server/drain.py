"""How a server stops: nothing new, what runs may end, and what still runs then is told."""

import asyncio
import contextlib

from dualpath.server.errors import SHUTTING_DOWN, ApiError

_RETRY_AFTER_S = 5.0
_LAST_WORDS_S = 2.0
"""How long requests have to say that they end."""


class Drain:
    """The requests that run, and whether they still may. One per application, used from its event loop."""

    def __init__(self) -> None:
        self.begun = False
        """True: new requests are refused."""
        self.hand_over = asyncio.Event()
        """Set: another process takes new connections. Those here get their answers, then they are closed."""
        self._over = False
        self._running: set[asyncio.Task[object]] = set()
        self._empty = asyncio.Event()

    def __enter__(self) -> None:
        """Around a request: its task is cancelled when the drain is over."""
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        if self._over:
            task.cancel()

    def __exit__(self, *_: object) -> None:
        self._running.discard(asyncio.current_task())
        if not self._running:
            self._empty.set()

    def ended_this(self) -> bool:
        """Whether the drain has cancelled the current task. If so, the task may go on, to say so."""
        task = asyncio.current_task()
        if not self._over or task is None:
            return False
        task.uncancel()
        return True

    def error(self) -> ApiError:
        """Returns what a request is told that the server no longer serves."""
        message = "the server is shutting down; send the request again, to another server or in a while"
        return ApiError(503, message, code=SHUTTING_DOWN, retry_after_s=_RETRY_AFTER_S)

    async def run_out(self, seconds: float) -> None:
        """Refuse new requests, give those that run `seconds`, then end them. Cancelled: end them at once."""
        self.begun = True
        try:
            await self._emptied(seconds)
        finally:
            self._over = True
            for task in self._running:
                task.cancel()
        await self._emptied(_LAST_WORDS_S)

    async def _emptied(self, seconds: float) -> None:
        self._empty.clear()
        if self._running:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._empty.wait()
