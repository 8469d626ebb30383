"""Requests that wait while generation is paused: new ones, and those that were taken off the engines."""

import asyncio
from collections.abc import Iterator

from dualpath.cluster.coordinator.live_request import LiveRequest
from dualpath.cluster.generator import RequestError


class Parking:
    """Used from one asyncio thread. A request that waits for longer than `deadline_s` ends with an error."""

    def __init__(self, most_new: int, deadline_s: float) -> None:
        self._most_new = most_new
        self._deadline_s = deadline_s
        self._parked: dict[LiveRequest, asyncio.TimerHandle] = {}
        self.paused = False

    def __len__(self) -> int:
        return len(self._parked)

    def __iter__(self) -> Iterator[LiveRequest]:
        return iter(list(self._parked))

    def add(self, live: LiveRequest) -> None:
        """Hold a request. Raises RequestError (429) when a new one finds too many; one that was running is held."""
        if len(self._parked) >= self._most_new and not live.generated:
            raise RequestError(429, "overloaded", "generation is paused, and too many requests wait for it", 5.0)
        self._parked[live] = asyncio.get_running_loop().call_later(self._deadline_s, self._expire, live)

    def remove(self, live: LiveRequest) -> bool:
        """Returns False when the request is not here."""
        timer = self._parked.pop(live, None)
        if timer is not None:
            timer.cancel()
        return timer is not None

    def _expire(self, live: LiveRequest) -> None:
        del self._parked[live]
        waited = f"generation has been paused for {self._deadline_s:g} s"
        live.end(RequestError(504, "deadline_exceeded", f"{waited}, longer than a request may wait", 5.0))
