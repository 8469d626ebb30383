"""Measures this machine's store and links with the runtime's own code: the best of a few passes, wall time.

Blocks are read back from the page cache, so the result is what the runtime can take in, not what a disk can give.
"""

import asyncio
import secrets
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np

from dualpath.cluster.agent.block_io import BlockIO
from dualpath.cluster.agent.layer_transfers import BatchTransfers, ItemTransfers
from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.messages import LoadLeg
from dualpath.core.load_plan import chunk_plan
from dualpath.core.vocabulary import BLOCK_TOKENS, Leg, Side, TrafficClass
from dualpath.kv import KVLayout, block_keys, namespace
from dualpath.lab.facts.profile import Rates
from dualpath.model import LoadedModel, PagedDecode
from dualpath.spec.sampling import SamplingParams
from dualpath.transfer import TRANSPORTS
from dualpath.transfer.pool import BufferPool
from dualpath.transfer.traffic import TrafficManager

BLOCKS = 24
PASSES = 4
KEY = secrets.token_bytes(32)
ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)


def measure_rates(model: LoadedModel, store: Path) -> Rates:
    """Writes and reads `BLOCKS` blocks in a new directory under `store`, which is removed again, and moves as many."""
    read, write = _store_rates(model.layout, store)
    return Rates(
        store_read_bytes_per_s=read,
        store_write_bytes_per_s=write,
        transfer_bytes_per_s=_transfer_rate(model.layout),
        copy_bytes_per_s=_copy_rate(model),
    )


def _store_rates(layout: KVLayout, store: Path) -> tuple[float, float]:
    store.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="profile-", dir=store) as folder,
        closing(BufferPool.create("profile-io", layout.full_block_bytes, BLOCKS)) as pool,
    ):
        blocks = BlockIO(ClusterConfig(model="", store=folder), layout, pool, TrafficManager())
        try:
            return asyncio.run(_write_and_read(layout, blocks, pool))
        finally:
            blocks.close()


async def _write_and_read(layout: KVLayout, blocks: BlockIO, pool: BufferPool) -> tuple[float, float]:
    space = namespace("profile", "", layout)
    keys = block_keys(space.root, range(BLOCKS * layout.block_tokens), layout.block_tokens)
    pages = pool.allocate((0, 0), BLOCKS)
    payloads = [pool.view(page)[: layout.full_block_bytes] for page in pages]
    started_ns = time.perf_counter_ns()
    parents = [space.root, *keys[:-1]]
    await asyncio.gather(*(blocks.write(space, k, p, b) for k, p, b in zip(keys, parents, payloads, strict=True)))
    written_ns = time.perf_counter_ns() - started_ns
    read_ns = []
    for _ in range(PASSES):
        started_ns = time.perf_counter_ns()
        leg = LoadLeg(0, 0, Leg(Side.PE, 0, BLOCKS), BLOCKS * layout.block_tokens, space, keys)
        faults = await blocks.read_leg(leg, pages, lambda: False)
        if faults:
            raise OSError(f"a block that was just written can't be read again: {faults[0].fault}")
        read_ns.append(time.perf_counter_ns() - started_ns)
    pool.free((0, 0), pages)
    n_bytes = BLOCKS * layout.full_block_bytes
    return n_bytes * 1e9 / min(read_ns), n_bytes * 1e9 / written_ns


def _transfer_rate(layout: KVLayout) -> float:
    """Pulls all layers of a prompt from a DE's buffer, over shared memory."""
    name = f"profile-{uuid.uuid4().hex[:12]}"
    with (
        closing(BufferPool.create("profile-pe", layout.full_block_bytes, BLOCKS + 1)) as pool,
        closing(BufferPool.create("profile-de", layout.full_block_bytes, BLOCKS + 1)) as remote,
    ):
        here, transport = TrafficManager(), TRANSPORTS.get("shm")
        server = transport.serve(remote, TrafficManager(), host="", name=f"{name}-de", key=KEY)
        try:
            channel = transport.connect(server.address, here, traffic_class=TrafficClass.LOW, peer_tag=name, key=KEY)
            try:
                hit_tokens = BLOCKS * BLOCK_TOKENS
                rows = [np.zeros(hit_tokens * row, np.uint8) for row in layout.row_bytes]
                plan = chunk_plan((Leg(Side.DE, 0, BLOCKS),), hit_tokens, hit_tokens, 1)
                item = ItemTransfers(plan, [], 0, list(range(BLOCKS + 1)), channel, lambda: False)
                batch = BatchTransfers(layout, pool, here, [item])

                def pull() -> None:
                    for layer in range(layout.layers):
                        for error in batch.load_layer(layer, [rows[layer]]):
                            if error is not None:
                                raise error

                return hit_tokens * layout.kv_bytes.bytes_per_token * 1e9 / _least_ns(pull)
            finally:
                channel.close()
        finally:
            server.close()


def _copy_rate(model: LoadedModel) -> float:
    """Copies Full Blocks from a buffer to the device."""
    engine = PagedDecode(model, BLOCKS + 1)
    tokens = model.layout.block_tokens
    page = np.zeros(model.layout.full_block_bytes, np.uint8)
    engine.admit(0, min(BLOCKS * tokens, model.max_length_tokens - 1), 0, ONE_TOKEN)
    blocks = min(BLOCKS, (model.max_length_tokens - 1) // tokens)

    def fill() -> None:
        for block in range(blocks):
            engine.fill_block(0, block, page, tokens)

    return blocks * page.nbytes * 1e9 / _least_ns(fill)


def _least_ns(work: Callable[[], None]) -> int:
    spent_ns = []
    for _ in range(PASSES):
        started_ns = time.perf_counter_ns()
        work()
        spent_ns.append(time.perf_counter_ns() - started_ns)
    return min(spent_ns)
