"""A cluster's `Control` for the server's tests: it remembers what it was asked, and pauses nothing."""

from collections.abc import Collection
from typing import Any

from dualpath.cluster.generator import Memory


class FakeControl:
    """Every call is noted in `calls`; `failure` is raised by the next one."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.failure: Exception | None = None
        self.paused = False
        self.requests = 0
        self.sleeping: frozenset[Memory] = frozenset()

    def _note(self, *call: Any) -> None:
        self.calls.append(call)
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure

    async def pause(self, inflight: str) -> None:
        self._note("pause", inflight)
        self.paused = True

    async def resume(self) -> None:
        self._note("resume")
        self.paused = False

    def abort(self, request_ids: Collection[str] | None) -> int:
        self._note("abort", request_ids if request_ids is None else list(request_ids))
        return 3

    async def update_weights(self, path: str, version: str, inflight: str) -> None:
        self._note("update_weights", path, version, inflight)

    async def reset_prefix_cache(self) -> None:
        self._note("reset_prefix_cache")

    async def sleep(self, memory: Collection[Memory], keep_weights: bool, inflight: str) -> None:
        self._note("sleep", tuple(memory), keep_weights, inflight)
        self.sleeping |= frozenset(memory)

    async def wake(self, memory: Collection[Memory]) -> None:
        self._note("wake", tuple(memory))
        self.sleeping -= frozenset(memory)
