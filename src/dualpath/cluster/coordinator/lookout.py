"""Looks at the store for blocks that neighbours have written, while requests wait, but not for long.

Looks are on threads with deadlines. A request waits `LOOK_S` at most, and what is found later is taken over then. A
store that does not answer is left alone for a while (`cluster.store_standing`).
"""

import asyncio
import time
from collections.abc import Callable

from dualpath.cluster.coordinator.file_work import Complaints
from dualpath.cluster.deadline_threads import Call, DeadlineThreads, LateError
from dualpath.cluster.store_standing import StoreStanding
from dualpath.kv import BlockKey, BlockRecord, BlockUnavailableError, Store

LOOK_S = 0.25
"""Longest time a request waits for a look at the store; blocks found later are published then."""
MAX_LOOKS = 4
"""Most looks at the same time. A request that finds all of them busy goes on without one."""
MAX_HUNG = 4
"""Most threads that may hang in a look and are replaced."""
ABSENT_S = 1.0
"""How long an absent block is not looked for again."""
MAX_ABSENT = 4096
"""Most blocks that are remembered as absent."""


class Recently:
    """Remembers keys for `seconds` each, and at most `most` of them: then the oldest is forgotten."""

    def __init__(self, seconds: float, most: int, clock: Callable[[], float]) -> None:
        self._seconds = seconds
        self._most = most
        self._clock = clock
        self._until_s: dict[BlockKey, float] = {}

    def add(self, key: BlockKey) -> None:
        self._until_s.pop(key, None)
        self._until_s[key] = self._clock() + self._seconds
        if len(self._until_s) > self._most:
            del self._until_s[next(iter(self._until_s))]

    def __contains__(self, key: BlockKey) -> bool:
        until_s = self._until_s.get(key)
        return until_s is not None and self._clock() < until_s

    def __len__(self) -> int:
        """How many are remembered, some of them perhaps for longer than `seconds`."""
        return len(self._until_s)


class Lookout:
    """Used from one asyncio thread. `found` gets the blocks of each look, before the requests that wait continue."""

    def __init__(
        self,
        store: Store,
        found: Callable[[list[BlockRecord]], None],
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._found = found
        self._timeout_s = timeout_s
        self._looks: dict[BlockKey, Call[list[BlockRecord]]] = {}
        self._absent = Recently(ABSENT_S, MAX_ABSENT, clock)
        self.threads = DeadlineThreads(MAX_LOOKS, "store-looks", timeout_s, most_hung=MAX_HUNG, clock=clock)
        self.standing = StoreStanding(late_away_s=timeout_s / 2, clock=clock)
        self.looks = 0
        self.complaints = Complaints(clock)

    async def look(self, root: BlockKey, beyond: list[BlockKey]) -> None:
        """Look for `beyond`, blocks of one prompt that follow each other.

        New tokens cost one look for one block, and no look when that block was absent within `ABSENT_S`.
        """
        if not beyond or beyond[0] in self._absent:
            return
        call = self._looks.get(beyond[0])
        if call is None:
            if len(self._looks) >= MAX_LOOKS or not self.standing.worth_a_try():
                return
            self.looks += 1
            call = self.threads.submit(lambda _: self._store.find(root, beyond))
            self._looks[beyond[0]] = call
            call.future.add_done_callback(lambda ended: self._looked(beyond, ended))
        await asyncio.wait([call.future], timeout=LOOK_S)

    def _looked(self, beyond: list[BlockKey], ended: "asyncio.Future[list[BlockRecord]]") -> None:
        call = self._looks.pop(beyond[0])
        error = None if ended.cancelled() else ended.exception()
        if error is not None:
            self._note(error, call.began_s)
            self._absent.add(beyond[0])
        elif not ended.cancelled():
            self.standing.answered()
            found = ended.result()
            self._found(found)
            for absent in beyond[len(found) : len(found) + 1]:
                self._absent.add(absent)

    def _note(self, error: BaseException, began_s: float) -> None:
        late = isinstance(error, LateError)
        if not isinstance(error, BlockUnavailableError):
            self.standing.failed(began_s, late=late)
        self.complaints.add(f"a look had no answer within {self._timeout_s:g} s" if late else error)

    def close(self, wait_s: float) -> None:
        self.threads.close(wait_s)
