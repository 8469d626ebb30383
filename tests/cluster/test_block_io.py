"""Blocks between a buffer and a store that hangs, refuses, loses single blocks, or comes back."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest

from dualpath.cluster.agent.block_io import IO_THREADS, MAX_HUNG, BlockIO
from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.messages import BlockFaultReport, LoadLeg
from dualpath.cluster.store_standing import MAX_REFUSED_BLOCKS, READ_ONLY, SLOW, UNREACHABLE
from dualpath.core.vocabulary import Leg, Side
from dualpath.kv import BlockKey, KVLayout, KVPart, LayerKV, PosixStore, StoreError, block_keys, namespace
from dualpath.spec import metrics
from dualpath.transfer.pool import BufferPool
from dualpath.transfer.traffic import TrafficManager

from .faulty_store import Faults, FaultyStore

LAYOUT = KVLayout.alike(layers=2, parts=(KVPart("kv", 1, 4),), dtype="float32")
SPACE = namespace("model", "", LAYOUT)
OWNER = (1, 0)
WAIT_S = 20.0
PAGES = 40


def load(keys: list[BlockKey]) -> LoadLeg:
    return LoadLeg(*OWNER, Leg(Side.DE, 0, len(keys)), 64 * len(keys), SPACE, keys)


def payload(n: int) -> np.ndarray:
    return np.full(LAYOUT.full_block_bytes, n, np.uint8)


class Bench:
    """A BlockIO, its buffer, and a store with `blocks` blocks of one prompt; block n is full of bytes n."""

    def __init__(self, where: Path, blocks: int, pool: BufferPool, timeout_s: float) -> None:
        self.faults: Faults = {}
        self.store = FaultyStore(PosixStore(where, durable=False), lambda: self.faults)
        self.pool = pool
        cluster = ClusterConfig(model="", store=str(where), store_timeout_s=timeout_s)
        self.io = BlockIO(cluster, LAYOUT, pool, TrafficManager(), store=self.store)
        self.keys = block_keys(SPACE.root, range(64 * blocks))
        for n, (parent, key) in enumerate(zip([SPACE.root, *self.keys], self.keys, strict=False)):
            self.store.write(SPACE, key, parent, payload(n))
        self.store.calls.clear()

    async def read(self, keys: list[BlockKey]) -> tuple[list[int], list[BlockFaultReport]]:
        """Returns the first byte of each page, and the faults. No page is held after it."""
        pages = self.pool.allocate(OWNER, len(keys))
        for page in pages:
            self.pool.view(page)[:] = 255
        try:
            faults = await self.io.read_leg(load(keys), pages, lambda: False)
            return [int(self.pool.view(page)[0]) for page in pages], faults
        finally:
            self.pool.free(OWNER, pages)

    async def write(self, n: int, block: np.ndarray) -> int:
        parent = self.keys[n - 1] if n else SPACE.root
        return await self.io.write(SPACE, self.keys[n], parent, block)

    def gauge(self, metric: metrics.Metric, label: str) -> float:
        return self.io.gauges()[metric(label)]

    async def becomes(self, metric: metrics.Metric, label: str, value: float) -> None:
        async with asyncio.timeout(WAIT_S):
            while self.gauge(metric, label) != value:
                await asyncio.sleep(0.002)

    def let(self, call: str, fault: str, *blocks: int) -> None:
        """From now on only these faults: of `call`, with these blocks if any is given."""
        self.faults = {f"{call} {self.keys[n].hex()}": fault for n in blocks} if blocks else {call: fault}

    def heal(self) -> None:
        self.faults = {}


def with_bench(
    where: Path, work: Callable[[Bench], Awaitable[None]], *, blocks: int = 6, timeout_s: float = 0.2
) -> None:
    async def run() -> None:
        with closing(BufferPool.create("block-io", LAYOUT.full_block_bytes, PAGES)) as pool:
            bench = Bench(where, blocks, pool, timeout_s)
            try:
                await work(bench)
                assert pool.statistics().free_pages == PAGES
            finally:
                bench.heal()
                bench.io.close()

    asyncio.run(run())


def test_of_layers_with_a_window_only_what_it_sees_is_read(tmp_path: Path) -> None:
    """Three layers, one with a window of 100 tokens: after 256 tokens it sees from 157 on, in the last two blocks."""
    layer = LayerKV((KVPart("kv", 1, 4),))
    layout = KVLayout.of([layer, LayerKV(layer.parts, 100), layer], "float32")
    space, layer_bytes = namespace("model", "", layout), layout.layer_block_bytes[0]
    store, keys = PosixStore(tmp_path, durable=False), block_keys(space.root, range(256))
    for n, (parent, key) in enumerate(zip([space.root, *keys], keys, strict=False)):
        store.write(space, key, parent, np.full(layout.full_block_bytes, n, np.uint8))

    async def work(pool: BufferPool) -> None:
        io = BlockIO(ClusterConfig(model="", store=str(tmp_path)), layout, pool, TrafficManager(), store=store)
        pages = pool.allocate(OWNER, 3)
        for page in pages:
            pool.view(page)[:] = 255
        try:
            leg = LoadLeg(*OWNER, Leg(Side.PE, 1, 3), 256, space, keys[1:])  # the other side reads block 0
            assert await io.read_leg(leg, pages, lambda: False) == []
        finally:
            io.close()
        found = [pool.view(page)[: layout.full_block_bytes].reshape(3, layer_bytes) for page in pages]
        assert [[int(part[0]) for part in block] for block in found] == [[1, 255, 1], [2, 2, 2], [3, 3, 3]]
        assert all((part == part[0]).all() for block in found for part in block)
        assert io.read_bytes == 8 * layer_bytes

    with closing(BufferPool.create("block-io", layout.full_block_bytes, 3)) as pool:
        asyncio.run(work(pool))


def test_blocks_come_in_order_and_a_missing_one_is_told(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.store.delete(SPACE.root, bench.keys[2])
        found, faults = await bench.read(bench.keys)
        assert found[:2] + found[3:] == [0, 1, 3, 4, 5]
        assert faults == [BlockFaultReport(bench.keys[2], "missing")]
        assert await bench.read([]) == ([], [])

    with_bench(tmp_path, work)


@pytest.mark.parametrize("where", ["read", "end read"])
def test_a_block_that_hangs_is_missed_alone_and_its_page_is_free(tmp_path: Path, where: str) -> None:
    """Whether it hangs before its bytes come or after them, nothing gets into the page that is another's by then."""

    async def work(bench: Bench) -> None:
        bench.let(where, "hang", 2)
        found, faults = await bench.read(bench.keys)
        assert faults == [BlockFaultReport(bench.keys[2], "unavailable")]
        assert found == [0, 1, 255, 3, 4, 5]
        assert bench.gauge(metrics.BLOCK_IO_HUNG, "read") == 1
        pages = bench.pool.allocate(OWNER, PAGES)
        for page in pages:
            bench.pool.view(page)[:] = 77
        bench.heal()
        await bench.becomes(metrics.BLOCK_IO_HUNG, "read", 0)
        assert all((bench.pool.view(page) == 77).all() for page in pages)
        bench.pool.free(OWNER, pages)
        assert (await bench.read(bench.keys))[0] == [0, 1, 2, 3, 4, 5]

    with_bench(tmp_path, work)


def test_a_store_that_hangs_is_left_alone_until_it_is_back(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.let("read", "hang")
        with pytest.raises(StoreError, match=r"not read within 0\.3 s"):
            await bench.read(bench.keys)
        await bench.becomes(metrics.BLOCK_IO_HUNG, "read", IO_THREADS)
        asked = len(bench.store.calls)
        for _ in range(5):
            with pytest.raises(StoreError, match="did not answer a moment ago"):
                await bench.read(bench.keys)
        assert len(bench.store.calls) == asked
        assert bench.gauge(metrics.BLOCK_IO_TROUBLE, SLOW) > 0
        bench.heal()
        await bench.becomes(metrics.BLOCK_IO_HUNG, "read", 0)
        assert (await bench.read(bench.keys)) == ([0, 1, 2, 3, 4, 5], [])
        assert bench.gauge(metrics.BLOCK_IO_TROUBLE, SLOW) == 0

    with_bench(tmp_path, work, timeout_s=0.3)


@pytest.mark.parametrize("call", ["read", "write"])
def test_nobody_waits_for_the_trial_that_finds_the_store_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The threads that hang stay where they are: a dead connection, say."""
    dead = threading.Event()
    begun: list[int] = []

    async def work(bench: Bench) -> None:
        genuine = getattr(bench.store, call)
        standing = bench.io._readable if call == "read" else bench.io._writable

        def connected(*arguments: object) -> object:
            begun.append(len(begun))
            if len(begun) <= IO_THREADS + 1:
                assert dead.wait(WAIT_S)
            return genuine(*arguments)

        async def ask() -> None:
            await (bench.read(bench.keys) if call == "read" else bench.write(5, payload(5)))

        monkeypatch.setattr(bench.store, call, connected)
        while not standing.hangs:
            with pytest.raises(StoreError):
                await ask()
        with pytest.raises(StoreError, match="did not answer a moment ago"):
            await ask()
        async with asyncio.timeout(WAIT_S):
            while standing.hangs:
                standing._retry_s = 0.0
                with suppress(StoreError):
                    await ask()
                await asyncio.sleep(0.01)
        assert len(begun) > IO_THREADS + 1, "a trial was answered"
        await ask()
        dead.set()

    with_bench(tmp_path, work)


def test_threads_that_hang_for_ever_are_bounded(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.let("read", "hang")
        async with asyncio.timeout(WAIT_S):
            while bench.gauge(metrics.BLOCK_IO_HUNG, "read") < IO_THREADS + MAX_HUNG:
                with pytest.raises(StoreError):
                    await bench.read(bench.keys)
                await asyncio.sleep(0.005)
        for _ in range(3):
            bench.io._readable._retry_s = 0.0
            with pytest.raises(StoreError, match="did not answer a moment ago"):
                await bench.read(bench.keys)
        assert bench.io._reads._threads == IO_THREADS + MAX_HUNG
        assert await bench.write(0, payload(0)) > 0, "writes have threads of their own"

    with_bench(tmp_path, work, timeout_s=0.02)


def test_one_block_that_can_not_be_fetched_costs_no_other(tmp_path: Path) -> None:
    """Round after round, with others between: it alone is missed, and no other read is refused."""

    async def work(bench: Bench) -> None:
        bench.let("read", "unavailable", 3)
        for _ in range(3 * MAX_REFUSED_BLOCKS):
            found, faults = await bench.read(bench.keys)
            assert faults == [BlockFaultReport(bench.keys[3], "unavailable")]
            assert found[:3] + found[4:] == [0, 1, 2, 4, 5]
        assert bench.gauge(metrics.BLOCK_IO_TROUBLE, UNREACHABLE) == 0

    with_bench(tmp_path, work, timeout_s=WAIT_S)


def test_a_refusal_among_answers_is_the_blocks(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.let("read", "hang", 0)
        reading = asyncio.create_task(bench.read(bench.keys))
        async with asyncio.timeout(WAIT_S):
            while bench.store.calls.count("end read") < 5:
                await asyncio.sleep(0.002)
        bench.let("read", "refuse", 0)
        found, faults = await reading
        assert (found[1:], faults) == ([1, 2, 3, 4, 5], [BlockFaultReport(bench.keys[0], "unavailable")])
        assert bench.gauge(metrics.BLOCK_IO_TROUBLE, UNREACHABLE) == 0

    with_bench(tmp_path, work, timeout_s=WAIT_S)


@pytest.mark.parametrize("fault", ["refuse", "unavailable"])
def test_a_store_that_refuses_everything_is_unreachable_until_it_answers(tmp_path: Path, fault: str) -> None:
    async def work(bench: Bench) -> None:
        bench.let("read", fault)
        with pytest.raises(StoreError):
            await bench.read(bench.keys)
        await asyncio.sleep(0.01)
        assert bench.gauge(metrics.BLOCK_IO_TROUBLE, UNREACHABLE) > 0
        bench.heal()
        async with asyncio.timeout(WAIT_S):
            while True:
                try:
                    assert await bench.read(bench.keys) == (list(range(len(bench.keys))), [])
                    break
                except StoreError:
                    await asyncio.sleep(0.01)
        assert bench.gauge(metrics.BLOCK_IO_TROUBLE, UNREACHABLE) == 0

    with_bench(tmp_path, work, blocks=MAX_REFUSED_BLOCKS + 4, timeout_s=WAIT_S)


@pytest.mark.parametrize("fault", ["hang", "refuse"])
def test_writes_that_fail_harm_no_reads_and_are_done_when_the_store_is_back(tmp_path: Path, fault: str) -> None:
    trouble = SLOW if fault == "hang" else READ_ONLY

    async def work(bench: Bench) -> None:
        bench.store.delete(SPACE.root, bench.keys[5])
        bench.let("write", fault)
        for _ in range(4):
            with pytest.raises(StoreError, match="was not written"):
                await bench.write(5, payload(5))
            assert (await bench.read(bench.keys[:5])) == ([0, 1, 2, 3, 4], [])
        await asyncio.sleep(0.01)
        assert bench.gauge(metrics.BLOCK_IO_TROUBLE, trouble) > 0
        bench.heal()
        async with asyncio.timeout(WAIT_S):
            while True:
                try:
                    await bench.write(5, payload(5))
                    break
                except StoreError:
                    await asyncio.sleep(0.01)
        assert await bench.read(bench.keys) == ([0, 1, 2, 3, 4, 5], [])
        assert not any(bench.gauge(metrics.BLOCK_IO_TROUBLE, name) for name in (SLOW, READ_ONLY, UNREACHABLE))

    with_bench(tmp_path, work, timeout_s=0.1)


def test_a_late_write_writes_what_it_was_given_whatever_becomes_of_its_page(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.store.delete(SPACE.root, bench.keys[5])
        page = payload(5)
        bench.let("write", "hang")
        with pytest.raises(StoreError):
            await bench.write(5, page)
        page[:] = 99  # another request's
        bench.heal()
        await bench.becomes(metrics.BLOCK_IO_HUNG, "write", 0)
        found, faults = await bench.read(bench.keys)
        assert (found[5], faults) in ((5, []), (255, [BlockFaultReport(bench.keys[5], "missing")]))

    with_bench(tmp_path, work, timeout_s=0.1)


def test_a_cancelled_leg_starts_no_further_block(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        pages = bench.pool.allocate(OWNER, 6)
        assert await bench.io.read_leg(load(bench.keys), pages, lambda: True) == []
        assert bench.store.calls == []
        bench.let("read", "hang")
        reading = asyncio.create_task(bench.io.read_leg(load(bench.keys), pages, lambda: False))
        await bench.becomes(metrics.BLOCK_IO_RUNNING, "read", IO_THREADS)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        bench.pool.free(OWNER, pages)
        bench.heal()
        await bench.becomes(metrics.BLOCK_IO_RUNNING, "read", 0)
        assert bench.store.calls.count("read") == IO_THREADS

    with_bench(tmp_path, work, timeout_s=WAIT_S)


def test_waiting_for_the_nic_is_not_the_stores_fault(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        rate = 8 * LAYOUT.full_block_bytes  # each block takes longer than the deadline
        slow = TrafficManager(snic_bytes_per_s=rate)
        cluster = ClusterConfig(model="", store=str(tmp_path), store_timeout_s=0.1)
        io = BlockIO(cluster, LAYOUT, bench.pool, slow, store=bench.store)
        pages = bench.pool.allocate(OWNER, 6)
        assert await io.read_leg(load(bench.keys), pages, lambda: False) == []
        bench.pool.free(OWNER, pages)
        assert io.gauges()[metrics.BLOCK_IO_LATE("read")] == 0
        io.close()

    with_bench(tmp_path, work)
