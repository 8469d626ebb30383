"""Moves Full Blocks between an engine's buffer and storage, through its SNIC, on I/O threads (paper §4.1 ①).

Only these threads touch the store: the main thread handles control messages and must never wait for a disk.
"""

import asyncio
from collections.abc import Callable

import numpy as np

from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.messages import BlockFaultReport
from dualpath.core.vocabulary import TrafficClass
from dualpath.kv import BlockError, BlockKey, KVLayout, Namespace, open_store
from dualpath.thread_names import named_threads
from dualpath.transfer.pool import BufferPool
from dualpath.transfer.traffic import TrafficManager

IO_THREADS = 2
"""Threads that read blocks, and threads that write: enough to keep a NIC busy while one verifies checksums."""


class BlockIO:
    """Reads and writes blocks. Used from the main thread. Its queues are bounded by the buffer's pages."""

    def __init__(self, cluster: ClusterConfig, layout: KVLayout, pool: BufferPool, traffic: TrafficManager) -> None:
        self._layout = layout
        self._pool = pool
        self._traffic = traffic
        self._reads = named_threads(IO_THREADS, "block-reads")
        self._writes = named_threads(IO_THREADS, "block-writes")
        self._store = open_store(cluster.store, durable=cluster.durable)
        self.read_bytes = 0
        """Bytes of this engine's reads; its node's SNIC counts those of all."""
        self.written_bytes = 0

    async def read_leg(
        self, space: Namespace, keys: list[BlockKey], pages: list[int], cancelled: Callable[[], bool]
    ) -> list[BlockFaultReport]:
        """Read blocks from storage into the buffer, in order. Returns the blocks that can't be read.

        Earlier requests come first: the I/O threads take blocks in the order of the calls. Once `cancelled` returns
        True, no further block is started. Raises StoreError when the store itself does not answer.
        """
        loop = asyncio.get_running_loop()
        reads = [
            loop.run_in_executor(self._reads, self._read, space, key, page, cancelled)
            for key, page in zip(keys, pages, strict=True)
        ]
        # Every read must have ended before the pages may be freed, also when one of them raises.
        outcomes = await asyncio.gather(*reads, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return [outcome for outcome in outcomes if isinstance(outcome, BlockFaultReport)]

    async def write(self, space: Namespace, key: BlockKey, parent: BlockKey, payload: np.ndarray) -> int:
        """Write a block. Returns its size in storage once it is durable and verified. Raises StoreError."""
        return await asyncio.get_running_loop().run_in_executor(self._writes, self._write, space, key, parent, payload)

    def close(self) -> None:
        """Wait for the blocks in progress; drop those not started."""
        for threads in (self._reads, self._writes):
            threads.shutdown(wait=True, cancel_futures=True)

    def _read(
        self, space: Namespace, key: BlockKey, page: int, cancelled: Callable[[], bool]
    ) -> BlockFaultReport | None:
        if cancelled():
            return None
        into = self._pool.view(page)[: self._layout.full_block_bytes]
        try:
            self._store.read(space, key, into, self._pace_read)
        except BlockError as error:
            return BlockFaultReport(key, error.cause.value)
        return None

    def _write(self, space: Namespace, key: BlockKey, parent: BlockKey, payload: np.ndarray) -> int:
        return self._store.write(space, key, parent, payload, self._pace_write)

    def _pace_read(self, n_bytes: int) -> None:
        self.read_bytes += n_bytes
        self._traffic.snic.rx.acquire(TrafficClass.LOW, n_bytes)

    def _pace_write(self, n_bytes: int) -> None:
        self.written_bytes += n_bytes
        self._traffic.snic.tx.acquire(TrafficClass.LOW, n_bytes)
