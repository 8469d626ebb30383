"""A bound on what concurrent work may hold together."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator

from dualpath.server.errors import ApiError

_RETRY_AFTER_S = 1.0


class Budget:
    """Hands out `total` units, first come first served. Used from one event loop.

    A claim above `total` is granted alone. At most `max_waiting` claims wait, each for at most `timeout_s`; beyond
    that ApiError (429) says that the server is busy with `what`.
    """

    def __init__(self, total: int, max_waiting: int, timeout_s: float, what: str) -> None:
        self._total = total
        self._free = total
        self._max_waiting = max_waiting
        self._timeout_s = timeout_s
        self._what = what
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @contextlib.asynccontextmanager
    async def hold(self, units: int) -> AsyncIterator[None]:
        claim = await self.claim(units)
        try:
            yield
        finally:
            self.give_back(claim)

    async def claim(self, units: int) -> int:
        """Wait for `units`. Returns what is to be given back."""
        units = min(units, self._total)
        if not self._waiting and units <= self._free:
            self._free -= units
            return units
        if len(self._waiting) >= self._max_waiting:
            raise self._busy()
        granted = asyncio.get_running_loop().create_future()
        place = (units, granted)
        self._waiting.append(place)
        try:
            async with asyncio.timeout(self._timeout_s):
                await granted
        except BaseException as error:
            if granted.done() and not granted.cancelled():
                self.give_back(units)
            else:
                with contextlib.suppress(ValueError):  # `_grant` may have passed it over
                    self._waiting.remove(place)
                self._grant()
            if isinstance(error, TimeoutError):
                raise self._busy() from None
            raise
        return units

    def give_back(self, units: int) -> None:
        self._free += units
        self._grant()

    def _grant(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._free:
            units, granted = self._waiting.popleft()
            if granted.cancelled():  # its owner is about to take itself out
                continue
            self._free -= units
            granted.set_result(None)

    def _busy(self) -> ApiError:
        message = f"the server is busy with {self._what} of other requests; try again soon"
        return ApiError(429, message, code="overloaded", retry_after_s=_RETRY_AFTER_S)
