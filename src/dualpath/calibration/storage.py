"""Full Blocks from and to storage, through the runtime's own I/O threads, block files warm in the page cache."""

import asyncio
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from dualpath.kv.keys import Namespace, block_keys, namespace
from dualpath.kv.layout import KVLayout
from dualpath.prediction.machine import StorageCost
from dualpath.runtime.block_io import IO_THREADS, BlockIO
from dualpath.runtime.config import ClusterConfig
from dualpath.transfer import BufferPool, TrafficManager

BLOCKS = 24
PASSES = 3


def measure_storage(layout: KVLayout, directory: Path) -> StorageCost:
    """Writes and reads `BLOCKS` blocks in a new folder of `directory`, which is removed again."""
    directory.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="calibrate-", dir=directory) as folder,
        BufferPool.create(f"calibrate-{os.getpid()}-io", layout.full_block_bytes, BLOCKS) as pool,
    ):
        blocks = BlockIO(ClusterConfig(model="", store=folder), layout, pool, TrafficManager())
        try:
            return asyncio.run(_measure(layout, blocks, pool))
        finally:
            blocks.close()


async def _measure(layout: KVLayout, blocks: BlockIO, pool: BufferPool) -> StorageCost:
    space = namespace("calibration", "", layout)
    keys = block_keys(space.root, range(BLOCKS * layout.block_tokens), layout.block_tokens)
    pages = pool.allocate((0, 0), BLOCKS)
    write_ns, wait_ns = await _writes(blocks, space, keys, pool.view(pages[0])[: layout.full_block_bytes])
    read_ns = []
    for _ in range(PASSES + 1):
        started_ns = time.process_time_ns()
        faults = await blocks.read_leg(space, keys, pages, lambda: False)
        if faults:
            raise RuntimeError(f"a block that was just written can't be read: {faults[0].fault}")
        read_ns.append((time.process_time_ns() - started_ns) / BLOCKS)
    pool.free((0, 0), pages)
    return StorageCost(
        read_ns=min(read_ns),
        write_ns=write_ns,
        write_wait_ns=wait_ns,
        read_threads=IO_THREADS,
        write_threads=IO_THREADS,
    )


async def _writes(blocks: BlockIO, space: Namespace, keys: list[bytes], payload: np.ndarray) -> tuple[float, float]:
    """CPU and waiting time of a block, one written after the other; medians."""
    cpu_ns, waited_ns = [], []
    for parent, key in zip([space.root, *keys], keys, strict=False):
        wall, cpu = time.perf_counter_ns(), time.process_time_ns()
        await blocks.write(space, key, parent, payload)
        wall, cpu = time.perf_counter_ns() - wall, time.process_time_ns() - cpu
        cpu_ns.append(cpu)
        waited_ns.append(max(0, wall - cpu))
    return statistics.median(cpu_ns), statistics.median(waited_ns)
