"""When what is due: a heap of the deadlines of live requests, which can be moved and dropped without touching it.

Theory of operation. A request holds its own deadline. The heap has an entry for it at or before that time, so moving a
deadline back, by far the most frequent change, is an assignment, and dropping one is nothing at all: a request that is
no longer live has none. An entry that surfaces too early is put back where it belongs, one of a request that is gone is
skipped, and the heap is rebuilt once more than half of it is stale, so it never outgrows what is live.
"""

from collections.abc import Mapping
from heapq import heapify, heappop, heappush, heapreplace

from dualpath.core.request import NEVER_NS, Request
from dualpath.core.vocabulary import RequestId


class Deadlines:
    """The deadlines of the requests in `live`, a view. Amortised O(log n); equal ones fall due in order of id."""

    def __init__(self, live: Mapping[RequestId, Request]) -> None:
        self._live = live
        self._heap: list[tuple[int, RequestId]] = []

    def set(self, request: Request, at_ns: int) -> None:
        """Give a live request a deadline, in place of any it has; from NEVER_NS on it has none."""
        known_ns = request.deadline_ns
        request.deadline_ns = at_ns if at_ns < NEVER_NS else NEVER_NS
        if at_ns >= known_ns:
            return
        heappush(self._heap, (at_ns, request.id))
        if len(self._heap) > 2 * len(self._live) + 64:
            self._heap = [(live.deadline_ns, live.id) for live in self._live.values() if live.deadline_ns != NEVER_NS]
            heapify(self._heap)

    def earliest(self) -> int | None:
        """The next deadline, None where there is none."""
        heap, live = self._heap, self._live
        while heap:
            posted_ns, key = heap[0]
            request = live.get(key)
            if request is None:
                heappop(heap)
                continue
            at_ns = request.deadline_ns
            if at_ns == posted_ns:
                return at_ns
            if at_ns < posted_ns or at_ns == NEVER_NS:  # moved forward by an entry of its own, or popped
                heappop(heap)
            else:
                heapreplace(heap, (at_ns, key))
        return None

    def pop_due(self, now: int) -> list[Request]:
        """The requests whose deadline is at or before `now`, earliest first. They have none afterwards."""
        due: list[Request] = []
        while (at_ns := self.earliest()) is not None and at_ns <= now:
            _, key = heappop(self._heap)
            request = self._live[key]
            request.deadline_ns = NEVER_NS
            due.append(request)
        return due

    def posted(self) -> dict[RequestId, int]:
        """The earliest entry of every request that has one, live or not: for the audit."""
        return {key: at_ns for at_ns, key in sorted(self._heap, reverse=True)}
