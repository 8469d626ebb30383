"""Moves Full Blocks between an engine's buffer and storage, through its SNIC, on I/O threads (paper §4.1 ①).

Only these threads touch the store: the main thread handles control messages and must never wait for a disk.

**A store that does not answer.** A read or write that misses its deadline is given up, and its thread replaced
(`deadline_threads`). What it still does is harmless, because a thread reads into memory of its own, and copies a block
to its page, or from it, only while the caller waits. So when `read_leg` or `write` has ended, however it ended, nothing
touches their pages, and they may be freed at once. The copy costs a thread a third of its speed (3.5 instead of 5.4
GB/s from the page cache, blocks of 4.5 MB); disks and NICs are the limit before. To read straight into a page would
mean to withhold it, and to tell the scheduler so, for as long as a thread hangs.

`store_standing` tells one block's failure from the store's. While the store hangs, reads and writes are refused at
once, and now and then one is tried for which nobody waits.
"""

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.deadline_threads import AbandonedError, Call, DeadlineThreads, LateError
from dualpath.cluster.guarded_store import guarded
from dualpath.cluster.messages import BlockFaultReport, LoadLeg
from dualpath.cluster.store_standing import StoreStanding, troubles_s
from dualpath.core.vocabulary import TrafficClass
from dualpath.kv import (
    BlockError,
    BlockFault,
    BlockKey,
    BlockUnavailableError,
    KVLayout,
    Namespace,
    Store,
    StoreError,
    open_store,
)
from dualpath.spec import metrics
from dualpath.spec.metrics import Figures
from dualpath.transfer.pool import BufferPool
from dualpath.transfer.traffic import TrafficManager

T = TypeVar("T")
IO_THREADS = 2
"""Threads that read blocks, and threads that write: enough to keep a NIC busy while one verifies checksums."""
MAX_HUNG = 6
"""Most threads of each that may hang and are replaced."""
_SILENT = "the store did not answer a moment ago"


class _Wanted(NamedTuple):
    """A block to read, or only the ranges of `layers`."""

    space: Namespace
    key: BlockKey
    layers: tuple[int, ...] | None


class BlockIO:
    """Reads and writes blocks. Used from the main thread. Its queues are bounded by the buffer's pages."""

    def __init__(
        self,
        cluster: ClusterConfig,
        layout: KVLayout,
        pool: BufferPool,
        traffic: TrafficManager,
        store: Store | None = None,
    ) -> None:
        timeout_s = cluster.store_timeout_s
        self._layout = layout
        self._pool = pool
        self._traffic = traffic
        self._timeout_s = timeout_s
        self._reads = DeadlineThreads(IO_THREADS, "block-reads", timeout_s, most_hung=MAX_HUNG)
        self._writes = DeadlineThreads(IO_THREADS, "block-writes", timeout_s, most_hung=MAX_HUNG)
        self._readable = StoreStanding(late_away_s=timeout_s / 2)
        self._writable = StoreStanding(late_away_s=timeout_s / 2)
        self._own = threading.local()
        self._store = guarded(store or open_store(cluster.store, durable=cluster.durable))
        self.read_bytes = 0
        """Bytes of this engine's reads; its node's SNIC counts those of all."""
        self.written_bytes = 0

    async def read_leg(self, load: LoadLeg, pages: list[int], cancelled: Callable[[], bool]) -> list[BlockFaultReport]:
        """Read a leg's blocks from storage into `pages`, in order. Returns the blocks that can't be read.

        Of a layer with a window only the blocks are read that the rest of the prompt sees. Earlier requests come first:
        the I/O threads take blocks in the order of the calls. Once `cancelled` returns True, no further block is
        started. Raises StoreError when the store itself does not answer. Then, too, nothing touches `pages` any more.
        """
        wanted = self._wanted(load)
        if wanted and self._readable.hangs:
            if self._readable.worth_a_try():
                self._try(self._reads, partial(self._fetch, wanted[0]), partial(self._give_up_read, wanted[0].key))
            raise StoreError(_SILENT)
        reads = [
            self._reads.submit(partial(self._read, one, page, cancelled), if_late=partial(self._give_up_read, one.key))
            for one, page in zip(wanted, pages, strict=True)
        ]
        try:
            return await self._outcomes([read.future for read in reads])
        finally:
            for read in reads:
                await read.let_go()

    def _wanted(self, load: LoadLeg) -> "list[_Wanted]":
        layout, first = self._layout, load.leg.first_block
        seen = [layout.layers_seen(block, load.hit_tokens) for block in range(first, first + len(load.keys))]
        return [
            _Wanted(load.namespace, key, None if len(layers) == layout.layers else layers)
            for key, layers in zip(load.keys, seen, strict=True)
        ]

    async def _outcomes(self, reads: "list[asyncio.Future[BlockFaultReport | None]]") -> list[BlockFaultReport]:
        """Returns what can't be read, or raises as soon as one read raises."""
        if not reads:
            return []
        await asyncio.wait(reads, return_when=asyncio.FIRST_EXCEPTION)
        errors = [error for read in reads if read.done() and (error := read.exception()) is not None]
        if errors:
            raise _as_store_error(errors[0])
        return [report for read in reads if (report := read.result()) is not None]

    async def write(self, space: Namespace, key: BlockKey, parent: BlockKey, payload: np.ndarray) -> int:
        """Write a block. Returns its size in storage once it is durable and verified. Raises StoreError.

        When it has ended, nothing reads `payload` any more.
        """
        give_up = partial(self._give_up_write, key)
        if self._writable.hangs:
            if self._writable.worth_a_try():
                self._try(self._writes, partial(self._put, space, key, parent, payload.copy()), give_up)
            raise StoreError(f"block {key.hex()} was not written: {_SILENT}")
        writing: Call[int] = self._writes.submit(partial(self._write, space, key, parent, payload), if_late=give_up)
        try:
            return await writing.future
        except (LateError, OSError, MemoryError) as error:
            raise _as_store_error(error) from error
        finally:
            await writing.let_go()

    @staticmethod
    def _try(threads: DeadlineThreads, work: Callable[[Call[T]], T], give_up: Callable[[Call[T]], T]) -> None:
        """Find out whether the store answers again; what comes of it is of no other use."""
        threads.submit(work, if_late=give_up).future.add_done_callback(lambda ended: ended.exception())

    def gauges(self) -> Figures:
        figures: Figures = {}
        for work, threads in (("read", self._reads), ("write", self._writes)):
            figures[metrics.BLOCK_IO_RUNNING(work)] = float(threads.running)
            figures[metrics.BLOCK_IO_HUNG(work)] = float(threads.hung)
            figures[metrics.BLOCK_IO_LATE(work)] = float(threads.late_calls)
        for trouble, seconds in troubles_s(self._readable, self._writable).items():
            figures[metrics.BLOCK_IO_TROUBLE(trouble)] = seconds
        return figures

    def close(self) -> None:
        """Wait for the blocks in progress, but for none that hangs; drop those not started."""
        for threads in (self._reads, self._writes):
            threads.close(self._timeout_s)

    # ── on an I/O thread ────────────────────────────────────────────────────────────────────────────────────────────

    def _read(
        self, wanted: "_Wanted", page: int, cancelled: Callable[[], bool], call: "Call[BlockFaultReport | None]"
    ) -> BlockFaultReport | None:
        if cancelled():
            return None
        if self._readable.hangs or not self._readable.worth_a_try():
            raise StoreError(_SILENT)
        fault = self._fetch(wanted, call)
        if fault is None:
            call.hand_over(lambda: self._copy_to_page(wanted, page))
        return fault

    def _copy_to_page(self, wanted: "_Wanted", page: int) -> None:
        view, own = self._pool.view(page), self._own_block()
        for start, stop in self._layout.extents(wanted.layers):  # the rest of `own` may be of another tenant
            np.copyto(view[start:stop], own[start:stop])

    def _fetch(self, wanted: "_Wanted", call: "Call[BlockFaultReport | None]") -> BlockFaultReport | None:
        """Read a block into this thread's memory."""
        own, key = self._own_block(), wanted.key
        try:
            self._store.read(wanted.space, key, own, partial(self._pace_read, call), wanted.layers)
        except BlockError as error:
            self._readable.answered()
            return BlockFaultReport(key, error.cause.value)
        except AbandonedError:
            self._readable.answered()  # late, but it answers again
            raise
        except BlockUnavailableError:
            if self._readable.refused_block(call.began_s):
                raise
            return BlockFaultReport(key, BlockFault.UNAVAILABLE.value)
        except (StoreError, OSError, MemoryError):
            if self._readable.failed(call.began_s):
                raise
            return BlockFaultReport(key, BlockFault.UNAVAILABLE.value)
        self._readable.answered()
        return None

    def _write(self, space: Namespace, key: BlockKey, parent: BlockKey, payload: np.ndarray, call: "Call[int]") -> int:
        if self._writable.hangs or not self._writable.worth_a_try():
            raise StoreError(f"block {key.hex()} was not written: {_SILENT}")
        own = self._own_block()
        call.hand_over(lambda: np.copyto(own, payload))
        return self._put(space, key, parent, own, call)

    def _put(self, space: Namespace, key: BlockKey, parent: BlockKey, payload: np.ndarray, call: "Call[int]") -> int:
        """Write a block from memory that nobody else has."""
        try:
            n_bytes = self._store.write(space, key, parent, payload, partial(self._pace_write, call))
        except (StoreError, OSError, MemoryError):
            self._writable.failed(call.began_s)
            raise
        except AbandonedError:
            self._writable.answered()
            raise
        self._writable.answered()
        return n_bytes

    def _pace_read(self, call: Call[Any], n_bytes: int) -> None:
        """Wait for the NIC, which is no fault of the store."""
        with call.paused():
            self.read_bytes += n_bytes
            self._traffic.snic.rx.acquire(TrafficClass.LOW, n_bytes)

    def _pace_write(self, call: Call[Any], n_bytes: int) -> None:
        with call.paused():
            self.written_bytes += n_bytes
            self._traffic.snic.tx.acquire(TrafficClass.LOW, n_bytes)

    def _own_block(self) -> np.ndarray:
        """Returns this thread's memory for one block."""
        own: np.ndarray | None = getattr(self._own, "block", None)
        if own is None:
            own = self._own.block = np.empty(self._layout.full_block_bytes, dtype=np.uint8)
        return own

    # ── late calls, on the main thread ──────────────────────────────────────────────────────────────────────────────

    def _give_up_read(self, key: BlockKey, call: "Call[BlockFaultReport | None]") -> BlockFaultReport:
        if self._readable.failed(call.began_s, late=True):
            raise StoreError(f"block {key.hex()} was not read within {self._timeout_s:g} s: the store does not answer")
        return BlockFaultReport(key, BlockFault.UNAVAILABLE.value)

    def _give_up_write(self, key: BlockKey, call: "Call[int]") -> int:
        self._writable.failed(call.began_s, late=True)
        raise StoreError(f"block {key.hex()} was not written within {self._timeout_s:g} s")


def _as_store_error(error: BaseException) -> BaseException:
    if isinstance(error, LateError | OSError | MemoryError):
        return StoreError(f"the store does not answer: {error}")
    return error
