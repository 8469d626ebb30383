"""The deadlines of live requests, and the Aborts that engines have not answered.

Theory of operation. A request holds its own deadline. The heap has an entry for it at or before that time. Postponing a
deadline, by far the most frequent change, is therefore only an assignment, and a request that ends needs no change at
all. An entry that comes up too early goes back into the heap with the current deadline. Stale entries are skipped, and
the heap is rebuilt once more than half of it is stale, so its size stays proportional to the live requests.

An aborted attempt's blocks are freed only when the engine answers that no transfer touches them any more. The PE's
answer (or its loss) also proves that nobody writes into the DE's blocks, so the DE's Abort waits *behind* the PE's. All
Aborts have the same time limit, so those in time are in order of their deadlines. A late one is counted; it frees
nothing.
"""

from collections import OrderedDict
from collections.abc import Mapping
from heapq import heapify, heappop, heappush, heapreplace

from dualpath.core.request import NEVER_NS, Request
from dualpath.core.vocabulary import Abort, EngineId, RequestId


class Deadlines:
    """The deadlines of the requests in `live`, which is a view. Amortised O(log n); ties are due in order of id."""

    def __init__(self, live: Mapping[RequestId, Request]) -> None:
        self._live = live
        self._heap: list[tuple[int, RequestId]] = []

    def set(self, request: Request, at_ns: int) -> None:
        """Set or replace a live request's deadline; NEVER_NS or later means none."""
        known_ns = request.deadline_ns
        request.deadline_ns = at_ns if at_ns < NEVER_NS else NEVER_NS
        if at_ns >= known_ns:
            return
        heappush(self._heap, (at_ns, request.id))
        if len(self._heap) > 2 * len(self._live) + 64:
            self._heap = [(live.deadline_ns, live.id) for live in self._live.values() if live.deadline_ns != NEVER_NS]
            heapify(self._heap)

    def earliest(self) -> int | None:
        """Returns the next deadline; None when there is none."""
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
            if at_ns < posted_ns or at_ns == NEVER_NS:  # an earlier deadline has its own entry, or it was popped
                heappop(heap)
            else:
                heapreplace(heap, (at_ns, key))
        return None

    def pop_due(self, now: int) -> list[Request]:
        """Returns the requests whose deadline is at or before `now`, earliest first, and removes their deadlines."""
        due: list[Request] = []
        while (at_ns := self.earliest()) is not None and at_ns <= now:
            _, key = heappop(self._heap)
            request = self._live[key]
            request.deadline_ns = NEVER_NS
            due.append(request)
        return due

    def posted(self) -> dict[RequestId, int]:
        """Returns the earliest entry of every request that has one, live or not; for the audit."""
        return {key: at_ns for at_ns, key in sorted(self._heap, reverse=True)}


AttemptAt = tuple[EngineId, RequestId, int]
"""``(engine, request, attempt)``."""


class Aborts:
    """All unanswered Aborts. Times in nanoseconds."""

    def __init__(self, release_ns: int) -> None:
        self._release_ns = release_ns
        self.in_time: OrderedDict[AttemptAt, int] = OrderedDict()
        """Unanswered Aborts whose deadline has not passed, with that deadline."""
        self.overdue: dict[AttemptAt, None] = {}
        """Unanswered Aborts whose deadline has passed."""
        self.behind: dict[AttemptAt, EngineId] = {}
        """The DE whose Abort waits for this PE's answer."""

    def send(self, now: int, at: AttemptAt, lost_peer: EngineId | None = None) -> Abort:
        """Returns the Abort for the outbox and starts to wait for its answer."""
        self.in_time[at] = now + self._release_ns
        engine, request, attempt = at
        return Abort(request, attempt, engine, lost_peer)

    def awaited(self, at: AttemptAt) -> bool:
        return at in self.in_time or at in self.overdue

    def answered(self, at: AttemptAt) -> EngineId | None:
        """Forget the Abort. Returns the DE whose Abort waited behind it, if any."""
        self.in_time.pop(at, None)
        self.overdue.pop(at, None)
        return self.behind.pop(at, None)

    def lose(self, engine: EngineId) -> list[AttemptAt]:
        """Forget a lost engine's Aborts. Returns the DE attempts that waited behind it; they can be aborted now."""
        for at in [at for at in self.in_time if at[0] == engine]:
            del self.in_time[at]
        self.overdue = {at: None for at in self.overdue if at[0] != engine}
        behind, self.behind = self.behind, {}
        proven: list[AttemptAt] = []
        for at, decode in behind.items():
            if at[0] == engine:
                proven.append((decode, at[1], at[2]))
            elif decode != engine:
                self.behind[at] = decode
        return proven

    def earliest(self) -> int:
        """Returns the earliest deadline in `in_time`, which must not be empty."""
        return next(iter(self.in_time.values()))

    def expire(self, now: int) -> None:
        """Move the Aborts that are due at or before `now` to `overdue`."""
        while self.in_time and self.earliest() <= now:
            at, _ = self.in_time.popitem(last=False)
            self.overdue[at] = None
