"""How a decode engine's new KV reaches storage: prompt blocks from the DE buffer, generated ones from the device as
each fills (paper §4.1). A block is reported as stored only when it is durable and verified, and after its parent.
"""

import asyncio
from concurrent.futures import Executor

import numpy as np

from dualpath.cluster import messages as m
from dualpath.cluster.engines.decode_attempt import DecodeAttempt
from dualpath.cluster.engines.host import EngineHost
from dualpath.kv import StoreError
from dualpath.model import DecodeEngine


class Persister:
    """Writes the blocks of one attempt at a time in order; attempts beside each other."""

    def __init__(self, host: EngineHost, engine: DecodeEngine, copies: Executor) -> None:
        self._host = host
        self._engine = engine
        self._copies = copies

    async def block_in_buffer(self, attempt: DecodeAttempt, block: int) -> None:
        """A prompt block that the prefill engine computed, from its page of the DE buffer."""
        page = self._host.pool.view(attempt.pages[block])
        await self._write(attempt, block, page[: self._host.layout.full_block_bytes])

    async def generated_blocks(self, attempt: DecodeAttempt) -> None:
        """Each block as it fills, until the attempt says that there are no more."""
        staging = np.empty(self._host.layout.full_block_bytes, dtype=np.uint8)
        loop = asyncio.get_running_loop()
        while (block := await attempt.to_persist.get()) is not None:
            if attempt.storing:
                await loop.run_in_executor(self._copies, self._copy_out, attempt.sequence, block, staging)
                await self._write(attempt, block, staging)

    def _copy_out(self, sequence: int, block: int, staging: np.ndarray) -> None:
        """On the copying thread: device → host, through the CNIC."""
        self._engine.copy_block(sequence, block, staging)
        self._host.traffic.local_copy(staging.nbytes)

    async def _write(self, attempt: DecodeAttempt, block: int, payload: np.ndarray) -> None:
        if not attempt.storing:
            return
        key = attempt.keys[block]
        parent = attempt.keys[block - 1] if block else attempt.space.root
        try:
            physical_bytes = await self._host.blocks.write(attempt.space, key, parent, payload)
        except StoreError as error:
            # Serving goes on without this prefix in storage; the counter and the log say so.
            attempt.storing = False
            self._host.counters["store_write_errors"] += 1
            self._host.log(f"block {key.hex()} could not be stored: {error}")
            return
        if attempt.storing:  # a step may have failed while this block was written
            self._host.send(m.Stored([m.StoredBlock(key, parent, physical_bytes)]))
