"""Counts the store's blocks again after trouble: files that nobody could delete then still take space.

They enter the index as never used, so that they are the first to leave it, and are deleted then. A scan reads the
header of every block, so it runs on a thread of its own, and seldom.
"""

import asyncio
import logging
import time
from collections.abc import Callable

from dualpath.cluster.deadline_threads import Call, DeadlineThreads
from dualpath.kv import BlockKey, BlockRecord, PrefixIndex, Store, rebuild

logger = logging.getLogger(__name__)

PAUSE_S = 300.0
"""Shortest time between two scans; also `PAUSE_SCANS` times what a scan takes."""
PAUSE_SCANS = 20
SLICE = 1000
"""Blocks that enter the index at a time; the event loop runs in between."""
MAX_HUNG = 1


class Recount:
    """Used from one asyncio thread. `counted` is called after blocks have entered `index`."""

    def __init__(
        self,
        store: Store,
        index: PrefixIndex,
        timeout_s: float,
        counted: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._index = index
        self._counted = counted
        self._clock = clock
        self._threads = DeadlineThreads(1, "store-recount", timeout_s, most_hung=MAX_HUNG, clock=clock)
        self._next_s = clock() + PAUSE_S
        self._call: Call[list[BlockRecord]] | None = None
        self._failed = False
        self.begun = 0

    def begin(self, wanted: bool) -> bool:
        """Begin a scan if one is wanted, or has failed. Returns False when not, when one runs, or was not long ago."""
        if not (wanted or self._failed) or self._call is not None or self._clock() < self._next_s:
            return False
        self.begun += 1
        self._failed = False
        began_s = self._clock()
        self._call = self._threads.submit(self._scan)
        self._call.future.add_done_callback(lambda ended: self._scanned(ended, began_s))
        return True

    def close(self) -> None:
        self._threads.close(0.0)

    def _scan(self, call: Call[list[BlockRecord]]) -> list[BlockRecord]:
        """On the thread: returns the store's blocks that can be reached, parents first."""
        found = _Found()
        rebuild(found, self._store, clean=True, on_block=call.progress)
        return found.records

    def _scanned(self, ended: "asyncio.Future[list[BlockRecord]]", began_s: float) -> None:
        self._call = None
        self._next_s = self._clock() + max(PAUSE_S, PAUSE_SCANS * (self._clock() - began_s))
        if ended.cancelled():
            return
        if (error := ended.exception()) is not None:
            self._failed = True
            logger.warning("the store's blocks could not be counted again: %s", error)
        else:
            self._enter(ended.result(), 0)

    def _enter(self, records: list[BlockRecord], first: int) -> None:
        for record in records[first : first + SLICE]:
            self._index.publish(record.root, record.key, record.parent, record.physical_bytes, used=False)
        self._counted()
        if first + SLICE < len(records):
            asyncio.get_running_loop().call_soon(self._enter, records, first + SLICE)


class _Found(PrefixIndex):
    """Remembers what is published."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[BlockRecord] = []

    def publish(
        self, root: BlockKey, key: BlockKey, parent: BlockKey, physical_bytes: int, *, used: bool = True
    ) -> bool:
        entered = super().publish(root, key, parent, physical_bytes, used=used)
        if entered:
            self.records.append(BlockRecord(root, key, parent, 0, physical_bytes, 0))
        return entered
