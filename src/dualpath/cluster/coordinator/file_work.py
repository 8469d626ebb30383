"""What is done to the store's files after blocks have left the prefix index: deleting, setting aside.

Threads do it, with a deadline for each block. Each has a lane: deletions are spread over all of them by their keys, and
what must be done in order is in the first. A block whose work hangs is given up, and another thread goes on with the
next. Work that fails, hangs, or finds the queue full is counted and logged, and serving does not depend on it. What
fails is tried again when the store has answered for another block: else each trouble would leave files that no quota
counts. What is given up stays in the store, until `recount` finds it again.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Container, Iterable
from functools import partial
from typing import NamedTuple

from dualpath.cluster.deadline_threads import Call, DeadlineThreads
from dualpath.cluster.store_standing import StoreStanding
from dualpath.kv import BlockKey, GoneBlock, Store, delete_orphan

logger = logging.getLogger(__name__)

MAX_WAITING = 100_000
"""Most blocks that wait for their work."""
TRIES = 5
LANES = 8
"""Threads: a server that takes 50 ms for a deletion must not fall behind the engines, which write with several, too."""
BATCH = 256
"""Blocks that the thread takes at a time."""
MAX_HUNG = 3
"""Most threads that may hang and are replaced."""
WARN_S = 1.0
"""At most one warning in this time: a disk that refuses would fill the log."""


class BlockWork(NamedTuple):
    do: Callable[[GoneBlock], object]
    block: GoneBlock
    tries: int = 1
    """This one included."""


class Complaints:
    """Counts what went wrong, and logs at most one line in `WARN_S`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._warned_s = float("-inf")
        self.count = 0

    def add(self, error: BaseException | str, n: int = 1) -> None:
        self.count += n
        if self._clock() >= self._warned_s + WARN_S:
            self._warned_s = self._clock()
            logger.warning("%s", error)


class FileWork:
    """Used from one asyncio thread. Work on a block that is in `index` again by its turn is left out."""

    def __init__(
        self,
        store: Store,
        index: Container[BlockKey],
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        lanes: int = LANES,
    ) -> None:
        self._store = store
        self.threads = DeadlineThreads(lanes, "store-files", timeout_s, most_hung=MAX_HUNG, clock=clock)
        self.standing = StoreStanding(late_away_s=timeout_s / 2, clock=clock)
        self.complaints = Complaints(clock)
        """One for each block whose work has failed or was given up."""
        self._lanes = [_Lane(self, index, clock) for _ in range(lanes)]
        self.forgotten = False
        """Whether files stay that nobody counts: some work was given up."""

    @property
    def waiting(self) -> int:
        """Blocks whose work is not done yet."""
        return sum(lane.waiting for lane in self._lanes)

    def delete(self, blocks: Iterable[GoneBlock]) -> None:
        for block in blocks:
            lane = self._lanes[block.key[0] % len(self._lanes)]
            self._put(lane, lambda block: self._store.delete(block.root, block.key), block)

    def delete_orphans(self, blocks: Iterable[GoneBlock]) -> None:
        """Parents first. If a neighbour has written a parent again, the block stays, and a look finds it."""
        for block in blocks:
            self._put(self._lanes[0], lambda at: delete_orphan(self._store, at.root, at.parent, at.key), block)

    def set_aside(self, block: GoneBlock) -> None:
        self._put(self._lanes[0], lambda block: self._store.quarantine(block.root, block.key), block)

    def give_up(self, error: BaseException | str, n: int = 1) -> None:
        self.forgotten = True
        self.complaints.add(error, n)

    async def settled(self) -> None:
        """Wait until all work queued so far, and what follows from it, is done."""
        while calls := [lane.call.future for lane in self._lanes if lane.call is not None]:
            await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.sleep(0)

    def close(self, wait_s: float) -> None:
        """Wait for the blocks in hand. The rest stays in the store until the next start."""
        for lane in self._lanes:
            lane.clear()
        self.threads.close(wait_s)

    def _put(self, lane: "_Lane", work: Callable[[GoneBlock], object], block: GoneBlock) -> None:
        if self.waiting < MAX_WAITING:
            lane.put(BlockWork(work, block))
        else:
            self.give_up(f"{MAX_WAITING} blocks wait to be deleted: more stay in the store for now")


class _Lane:
    """Work that is done in order, by one thread at a time."""

    def __init__(self, files: FileWork, index: Container[BlockKey], clock: Callable[[], float]) -> None:
        self._files = files
        self._index = index
        self._clock = clock
        self._queue: deque[BlockWork] = deque()
        self._batch: deque[BlockWork] = deque()
        self._failed: deque[BlockWork] = deque(maxlen=MAX_WAITING)
        """To be tried again."""
        self._done = _Done()
        self.call: Call[None] | None = None

    @property
    def waiting(self) -> int:
        return len(self._queue) + len(self._batch) + (self.call is not None)

    def put(self, work: BlockWork) -> None:
        self._queue.append(work)
        self._pump()

    def clear(self) -> None:
        for works in (self._queue, self._batch, self._failed):
            works.clear()

    def _pump(self) -> None:
        if self.call is None and self._queue:
            self._batch = deque(self._queue.popleft() for _ in range(min(BATCH, len(self._queue))))
            self._done = _Done()
            self.call = self._files.threads.submit(partial(self._work, self._batch, self._done))
            self.call.future.add_done_callback(self._ended)

    def _work(self, batch: deque[BlockWork], done: "_Done", call: Call[None]) -> None:
        """On a thread: work through `batch`."""
        taken: list[BlockWork] = []
        while True:
            call.progress()
            call.hand_over(lambda: taken.append(batch.popleft()) if batch else None)  # what is left is not ours if late
            if not taken:
                return
            work = taken.pop()
            try:
                if work.block.key not in self._index:
                    work.do(work.block)
                    self._files.standing.answered()
                    done.answered = True
            except Exception as error:
                self._files.standing.failed(self._clock())
                done.failed.append((work, error))
                done.answered = False

    def _ended(self, ended: asyncio.Future[None]) -> None:
        assert self.call is not None
        begun = self.call.began_s < float("inf")
        self.call = None
        if ended.cancelled():
            return
        self._note_failures()
        late = ended.exception() is not None
        if late:
            self._files.standing.failed(self._clock(), late=True)
            given_up = 1
            if not begun:  # every thread hangs
                given_up = len(self._queue) + len(self._batch)
                self._queue.clear()
                self._batch.clear()
            self._files.give_up("a block stays in the store, which does not answer", given_up)
        self._queue.extendleft(reversed(self._batch))
        self._batch.clear()
        if self._done.answered and not late:
            self._queue.extend(self._failed)
            self._failed.clear()
        self._pump()

    def _note_failures(self) -> None:
        for work, failure in self._done.failed:
            if work.tries < TRIES:
                self._failed.append(work._replace(tries=work.tries + 1))
                self._files.complaints.add(failure)
            else:
                self._files.give_up(failure)


class _Done:
    """What a thread has done of a batch, up to where it hangs."""

    def __init__(self) -> None:
        self.failed: list[tuple[BlockWork, Exception]] = []
        self.answered = False
        """At last."""
