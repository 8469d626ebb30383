"""What a prefill and a decode engine have in common: control socket, buffer, NICs, data server, block reading.

Threads of an engine process: the asyncio main thread (control only), one compute thread (torch), a few I/O threads that
read and write blocks, and the data channels' own. KV bytes never pass through the main thread.
"""

import asyncio
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import zmq
import zmq.asyncio

from dualpath.core.vocabulary import EngineId, TrafficClass
from dualpath.kv.block_file import BlockError
from dualpath.kv.keys import BlockKey, Namespace
from dualpath.kv.layout import KVLayout
from dualpath.kv.store import PosixStore
from dualpath.runtime import messages as m
from dualpath.runtime.config import ClusterConfig
from dualpath.runtime.links import CONTROL_QUEUE_MESSAGES
from dualpath.transfer import BufferPool, ChannelServer, TrafficManager

IO_THREADS = 2
"""Threads that read blocks, and as many that write them: enough to keep a NIC busy while one of them verifies a
checksum.
"""

Owner = tuple[int, int]
"""Who holds buffer pages: (request, attempt)."""


class EngineHost:
    """The process around an engine's work. Used from the main asyncio thread unless a method says otherwise."""

    def __init__(self, config: m.EngineConfig, layout: KVLayout, buffer_blocks: int) -> None:
        cluster = config.cluster
        self.config = config
        self.layout = layout
        self.traffic = TrafficManager(snic_bytes_per_s=cluster.snic_rate, cnic_bytes_per_s=cluster.cnic_rate)
        name = uuid.uuid4().hex[:12]
        self.pool = BufferPool.create(name, layout.full_block_bytes, buffer_blocks)
        self.server = ChannelServer(self.pool, self.traffic, _data_bind_address(cluster, name))
        self.block_reads = ThreadPoolExecutor(IO_THREADS, thread_name_prefix="block-reads")
        self.block_writes = ThreadPoolExecutor(IO_THREADS, thread_name_prefix="block-writes")
        self.compute = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self.engine: EngineId | None = None
        self.counters: Counter[str] = Counter()
        self.gauge_sources: list[Callable[[], dict[str, float]]] = [self._own_gauges]
        self._stores: dict[str, PosixStore] = {}
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, uuid.uuid4().bytes)
        self._socket.setsockopt(zmq.LINGER, 500)
        self._socket.set_hwm(CONTROL_QUEUE_MESSAGES)
        self._last_ack_ns = time.monotonic_ns()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    # ── control ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def send(self, message: m.FromEngine) -> None:
        """Queue a message to the coordinator; never blocks."""
        sending = self._socket.send(m.encoder.encode(message), flags=zmq.NOBLOCK)
        asyncio.ensure_future(sending).add_done_callback(self._on_sent)

    def _on_sent(self, sent: "asyncio.Future[Any]") -> None:
        if not sent.cancelled() and sent.exception() is not None:
            self.leave(f"the coordinator can't be reached: {sent.exception()}")

    async def run(self, join: m.Join, handle: Callable[[m.ToEngine], None]) -> str:
        """Join, then pass every message to `handle` until told or forced to leave; returns why."""
        self._socket.connect(self.config.coordinator)
        self.send(join)
        self.spawn(self._listen(handle))
        self.spawn(self._beat())
        reason = await self.ended
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        return reason

    async def _listen(self, handle: Callable[[m.ToEngine], None]) -> None:
        while True:
            message = m.to_engine_decoder.decode(await self._socket.recv())
            self._last_ack_ns = time.monotonic_ns()
            match message:
                case m.HeartbeatAck():
                    pass
                case m.Welcome():
                    self.engine = message.engine
                case m.Shutdown():
                    self.leave(message.reason)
                case m.PeerLost():
                    # What is in flight with a dead peer ends with its connection; nothing to decide here.
                    handle(message)
                case _:
                    handle(message)

    async def _beat(self) -> None:
        lease_ns = self.config.cluster.lease_ns
        while True:
            gauges: dict[str, float] = {}
            for source in self.gauge_sources:
                gauges |= source()
            self.send(m.Heartbeat(gauges))
            await asyncio.sleep(self.config.cluster.heartbeat_ns / 1e9)
            if time.monotonic_ns() - self._last_ack_ns > 2 * lease_ns:
                self.leave(f"the coordinator has been silent for {2 * lease_ns / 1e9:.0f} s")

    def leave(self, reason: str) -> None:
        if not self.ended.done():
            self.ended.set_result(reason)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a task this host owns. One that fails unexpectedly is a bug: the engine leaves rather than limp on."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)
        return task

    def _on_task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            asyncio.get_running_loop().call_exception_handler(
                {"message": "an engine task failed", "exception": task.exception(), "task": task}
            )
            self.leave(f"internal error: {task.exception()!r}")

    def log(self, line: str) -> None:
        print(f"[{self.config.role.value} engine {self.engine}] {line}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self.server.close()
        self.block_reads.shutdown(wait=True, cancel_futures=True)
        self.block_writes.shutdown(wait=True, cancel_futures=True)
        self.compute.shutdown(wait=True, cancel_futures=True)
        self.pool.close()
        self._socket.close()
        self._context.term()

    # ── storage ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def store(self, space: Namespace) -> PosixStore:
        """The namespace's store, opened once."""
        store = self._stores.get(space.hex)
        if store is None:
            cluster = self.config.cluster
            store = PosixStore(cluster.store, self.layout, space, durable=cluster.durable)
            self._stores[space.hex] = store
        return store

    async def read_leg(
        self, space: Namespace, keys: list[BlockKey], pages: list[int], cancelled: Callable[[], bool]
    ) -> list[m.BlockFaultReport]:
        """Storage → buffer over this engine's SNIC, block by block in order; returns the blocks that can't be read.

        Reads of earlier requests come first: the I/O threads take blocks in the order legs were asked for.
        """
        store = self.store(space)
        loop = asyncio.get_running_loop()
        reads = [
            loop.run_in_executor(self.block_reads, self._read_block, store, key, self.pool.view(page), cancelled)
            for key, page in zip(keys, pages, strict=True)
        ]
        return [fault for fault in await asyncio.gather(*reads) if fault is not None]

    def _read_block(
        self, store: PosixStore, key: BlockKey, into: np.ndarray, cancelled: Callable[[], bool]
    ) -> m.BlockFaultReport | None:
        if cancelled():
            return None
        try:
            store.read(key, into[: self.layout.full_block_bytes], self._pace_read)
        except BlockError as error:
            return m.BlockFaultReport(key, error.cause.value)
        return None

    def _pace_read(self, n_bytes: int) -> None:
        self.traffic.snic.rx.acquire(TrafficClass.LOW, n_bytes)

    def pace_write(self, n_bytes: int) -> None:
        self.traffic.snic.tx.acquire(TrafficClass.LOW, n_bytes)

    # ── gauges ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _own_gauges(self) -> dict[str, float]:
        pool = self.pool.statistics()
        figures = {
            "dualpath_buffer_free_blocks": float(pool.free_pages),
            "dualpath_buffer_held_blocks": float(pool.held_pages),
            "dualpath_buffer_quarantined_blocks": float(pool.quarantined_pages),
            "dualpath_buffer_high_water_blocks": float(pool.high_water_pages),
        }
        traffic = self.traffic.statistics()
        for nic, nic_figures in (("snic", traffic.snic), ("cnic", traffic.cnic)):
            for direction, lane in (("rx", nic_figures.rx), ("tx", nic_figures.tx)):
                for traffic_class, n_bytes in (("high", lane.high_bytes), ("low", lane.low_bytes)):
                    labels = f'nic="{nic}",direction="{direction}",traffic_class="{traffic_class}"'
                    figures[f"dualpath_nic_bytes_total{{{labels}}}"] = float(n_bytes)
        for name, value in self.counters.items():
            figures[f"dualpath_{name}_total"] = float(value)
        return figures


def _data_bind_address(cluster: ClusterConfig, name: str) -> str:
    if cluster.transport == "shm":
        return f"shm:{tempfile.gettempdir()}/dualpath-{name}.sock"
    return f"tcp://{cluster.data_host}:0"
