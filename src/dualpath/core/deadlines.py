"""When what is due: deadlines of live requests, and Aborts that engines have not answered.

Theory of operation. A request holds its own deadline. The heap has an entry for it at or before that time, so moving a
deadline back, by far the most frequent change, is an assignment, and dropping one is nothing at all: a request that is
no longer live has none. An entry that surfaces too early is put back where it belongs, one of a request that is gone is
skipped, and the heap is rebuilt once more than half of it is stale, so it never outgrows what is live.

What an aborted attempt holds is only given back when the engine says that no transfer touches it any more. The PE's
word (or its loss) is also the proof that nobody writes into the DE's blocks, so the DE's Abort waits *behind* the PE's.
Every Abort may take equally long, so those in time are in order of their deadlines; a late one is counted, and frees
nothing.
"""

from collections import OrderedDict
from collections.abc import Mapping
from heapq import heapify, heappop, heappush, heapreplace

from dualpath.core.request import NEVER_NS, Request
from dualpath.core.vocabulary import Abort, EngineId, RequestId


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


AttemptAt = tuple[EngineId, RequestId, int]
"""``(engine, request, attempt)``."""


class Aborts:
    """All unanswered Aborts. Times in nanoseconds."""

    def __init__(self, release_ns: int) -> None:
        self._release_ns = release_ns
        self.in_time: OrderedDict[AttemptAt, int] = OrderedDict()
        """Unanswered Aborts in time, with their deadlines."""
        self.overdue: dict[AttemptAt, None] = {}
        """Unanswered Aborts out of time."""
        self.behind: dict[AttemptAt, EngineId] = {}
        """DEs whose Abort waits for their PE's answer, by the PE."""

    def send(self, now: int, at: AttemptAt, lost_peer: EngineId | None = None) -> Abort:
        """The command, for the outbox; its answer is awaited from now on."""
        self.in_time[at] = now + self._release_ns
        engine, request, attempt = at
        return Abort(request, attempt, engine, lost_peer)

    def awaited(self, at: AttemptAt) -> bool:
        return at in self.in_time or at in self.overdue

    def answered(self, at: AttemptAt) -> EngineId | None:
        """Forget the Abort; the DE behind it, if there is one, is no longer held back."""
        self.in_time.pop(at, None)
        self.overdue.pop(at, None)
        return self.behind.pop(at, None)

    def lose(self, engine: EngineId) -> list[AttemptAt]:
        """Nothing is awaited of a lost engine; the DEs that waited behind it can be told."""
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
        """The next deadline of those in time, of which there must be one."""
        return next(iter(self.in_time.values()))

    def expire(self, now: int) -> None:
        """What should have been answered at or before `now` is overdue."""
        while self.in_time and self.earliest() <= now:
            at, _ = self.in_time.popitem(last=False)
            self.overdue[at] = None
