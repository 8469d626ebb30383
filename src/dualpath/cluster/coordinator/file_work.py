"""What is done to the store's files after blocks have left the prefix index: deleting, setting aside.

One thread does it, in order, with a deadline for each block. A block whose work hangs is given up, and another thread
goes on with the next. Work that fails, hangs, or finds the queue full is counted and logged, and serving does not
depend on it. What fails is tried again when the store has answered for another block: else each trouble would leave
files that no quota counts. Other blocks stay in the store, where a look or the next start finds them again.
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
    ) -> None:
        self._store = store
        self._index = index
        self._clock = clock
        self._queue: deque[BlockWork] = deque()
        self._batch: deque[BlockWork] = deque()
        self._failed: deque[BlockWork] = deque(maxlen=MAX_WAITING)
        """To be tried again."""
        self._call: Call[None] | None = None
        self._done = _Done()
        self.threads = DeadlineThreads(1, "store-files", timeout_s, most_hung=MAX_HUNG, clock=clock)
        self.standing = StoreStanding(late_away_s=timeout_s / 2, clock=clock)
        self.complaints = Complaints(clock)
        """One for each block whose work has failed or was given up."""

    @property
    def waiting(self) -> int:
        """Blocks whose work is not done yet."""
        return len(self._queue) + len(self._batch) + (self._call is not None)

    def delete(self, blocks: Iterable[GoneBlock]) -> None:
        self._put(lambda block: self._store.delete(block.root, block.key), blocks)

    def delete_orphans(self, blocks: Iterable[GoneBlock]) -> None:
        """Parents first. If a neighbour has written a parent again, the block stays, and a look finds it."""
        self._put(lambda block: delete_orphan(self._store, block.root, block.parent, block.key), blocks)

    def set_aside(self, block: GoneBlock) -> None:
        self._put(lambda block: self._store.quarantine(block.root, block.key), [block])

    async def settled(self) -> None:
        """Wait until all work queued so far, and what follows from it, is done."""
        while self._call is not None:
            await asyncio.wait([self._call.future])
            await asyncio.sleep(0)

    def close(self, wait_s: float) -> None:
        """Wait for the block in hand. The rest stays in the store until the next start."""
        self._queue.clear()
        self._batch.clear()
        self._failed.clear()
        self.threads.close(wait_s)

    def _put(self, work: Callable[[GoneBlock], object], blocks: Iterable[GoneBlock]) -> None:
        for block in blocks:
            if len(self._queue) < MAX_WAITING:
                self._queue.append(BlockWork(work, block))
            else:
                self.complaints.add(
                    f"{MAX_WAITING} blocks wait to be deleted: more stay in the store until the next start"
                )
        self._pump()

    def _pump(self) -> None:
        if self._call is None and self._queue:
            self._batch = deque(self._queue.popleft() for _ in range(min(BATCH, len(self._queue))))
            self._done = _Done()
            self._call = self.threads.submit(partial(self._work, self._batch, self._done))
            self._call.future.add_done_callback(self._ended)

    def _work(self, batch: deque[BlockWork], done: "_Done", call: Call[None]) -> None:
        """On the thread: work through `batch`."""
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
                    self.standing.answered()
                    done.answered = True
            except Exception as error:
                self.standing.failed(self._clock())
                done.failed.append((work, error))

    def _ended(self, ended: asyncio.Future[None]) -> None:
        assert self._call is not None
        begun = self._call.began_s < float("inf")
        self._call = None
        if ended.cancelled():
            return
        error = ended.exception()
        for work, failure in self._done.failed:
            self.complaints.add(failure)
            if work.tries < TRIES:
                self._failed.append(work._replace(tries=work.tries + 1))
        if error is not None:
            self.standing.failed(self._clock(), late=True)
            given_up = 1
            if not begun:  # every thread hangs
                given_up = len(self._queue) + len(self._batch)
                self._queue.clear()
                self._batch.clear()
            self.complaints.add("a block stays in the store, which does not answer", given_up)
        self._queue.extendleft(reversed(self._batch))
        self._batch.clear()
        if self._done.answered:
            self._queue.extend(self._failed)
            self._failed.clear()
        self._pump()


class _Done:
    """What a thread has done of a batch, up to where it hangs."""

    def __init__(self) -> None:
        self.failed: list[tuple[BlockWork, Exception]] = []
        self.answered = False
