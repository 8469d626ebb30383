"""When what is due: a heap of deadlines whose entries can be moved and dropped.

Every key has a heap entry at or before its deadline; moving a deadline back, by far the most frequent call, touches no
heap. An entry that surfaces too early is put back where it belongs, one whose key is gone is skipped, and the heap is
rebuilt once more than half of it is stale, so it never outgrows what is live.
"""

from heapq import heapify, heappop, heappush, heapreplace
from typing import Generic, TypeVar

KeyT = TypeVar("KeyT", int, tuple[int, int, int])


class Deadlines(Generic[KeyT]):
    """At most one deadline a key. Amortised O(log n); equal deadlines fall due in key order."""

    def __init__(self) -> None:
        self._at_ns: dict[KeyT, int] = {}
        self._heap: list[tuple[int, KeyT]] = []

    def __contains__(self, key: KeyT) -> bool:
        return key in self._at_ns

    def __len__(self) -> int:
        return len(self._at_ns)

    def keys(self) -> list[KeyT]:
        """Every key with a deadline."""
        return list(self._at_ns)

    def set(self, key: KeyT, at_ns: int) -> None:
        """Give `key` a deadline, in place of any it has."""
        known_ns = self._at_ns.get(key)
        self._at_ns[key] = at_ns
        if known_ns is not None and known_ns <= at_ns:
            return
        heappush(self._heap, (at_ns, key))
        if len(self._heap) > 2 * len(self._at_ns) + 64:
            self._heap = [(at_ns, key) for key, at_ns in self._at_ns.items()]
            heapify(self._heap)

    def drop(self, key: KeyT) -> None:
        """Forget the deadline of `key`, if it has one."""
        self._at_ns.pop(key, None)

    def earliest(self) -> int | None:
        """The next deadline, None where there is none."""
        heap = self._heap
        while heap:
            posted_ns, key = heap[0]
            at_ns = self._at_ns.get(key)
            if at_ns == posted_ns:
                return at_ns
            if at_ns is None or at_ns < posted_ns:  # gone, or moved forward by an entry of its own
                heappop(heap)
            else:
                heapreplace(heap, (at_ns, key))
        return None

    def pop_due(self, now: int) -> list[KeyT]:
        """Drop and return the keys whose deadline is at or before `now`, earliest first."""
        due: list[KeyT] = []
        while (at_ns := self.earliest()) is not None and at_ns <= now:
            _, key = heappop(self._heap)
            del self._at_ns[key]
            due.append(key)
        return due
