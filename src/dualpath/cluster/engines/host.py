"""The part that prefill and decode engines share: control socket, buffer, NICs, data server, block I/O.

An engine process has these threads: the asyncio main thread (control only), one compute thread (torch), a few I/O
threads that read and write blocks, and the data channels' threads. KV bytes never pass through the main thread.
"""

import asyncio
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import zmq
import zmq.asyncio

from dualpath.cluster import messages as m
from dualpath.cluster.engines.block_io import BlockIO
from dualpath.core.vocabulary import EngineId
from dualpath.kv.layout import KVLayout
from dualpath.spec import metrics
from dualpath.spec.log import ROOT
from dualpath.spec.metrics import Figures, Sample
from dualpath.thread_names import COMPUTE_THREAD, named_threads
from dualpath.transfer import TRANSPORTS
from dualpath.transfer.pool import BufferPool
from dualpath.transfer.traffic import TrafficManager

JOIN_TIMEOUT_S = 600.0
"""How long an engine waits for `Welcome`: for the coordinator to start, or for the first prefill engine to join."""

Owner = tuple[int, int]
"""The holder of buffer pages: (request, attempt)."""


class EngineHost:
    """The shared part of an engine process. Used from the main asyncio thread unless a method says otherwise."""

    def __init__(self, config: m.EngineConfig, layout: KVLayout, buffer_blocks: int) -> None:
        cluster = config.cluster
        self.config = config
        self._logger = logging.getLogger(f"{ROOT}.engine {config.name}")
        self.layout = layout
        self.traffic = TrafficManager(snic_bytes_per_s=cluster.snic_rate, cnic_bytes_per_s=cluster.cnic_rate)
        name = uuid.uuid4().hex[:12]
        self.pool = BufferPool.create(name, layout.full_block_bytes, buffer_blocks)
        self.transport = TRANSPORTS.get(cluster.transport)
        self.server = self.transport.serve(self.pool, self.traffic, host=cluster.data_host, name=name)
        self.blocks = BlockIO(cluster, layout, self.pool, self.traffic)
        self.compute = named_threads(1, COMPUTE_THREAD)
        self.engine: EngineId | None = None
        self.counters: Counter[Sample] = Counter({counter(): 0 for counter in metrics.ENGINE_COUNTERS})
        self.gauge_sources: list[Callable[[], Figures]] = [self._own_gauges]
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, uuid.uuid4().bytes)
        self._socket.setsockopt(zmq.LINGER, 500)
        self._socket.set_hwm(m.CONTROL_QUEUE_MESSAGES)
        self._heard_ns = 0
        self._dismissed = False
        self._reason = "closed"
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
        """Join, then pass every message to `handle` until told or forced to leave. Returns the reason for leaving.

        Raises ValueError when the coordinator's address is invalid, ConnectionRefusedError when it refuses this engine.
        """
        try:
            self._socket.connect(self.config.coordinator)
        except zmq.ZMQError as error:
            raise ValueError(
                f"{self.config.coordinator!r} is not an address ({error}); give one such as tcp://10.0.0.1:5555"
            ) from error
        self._heard_ns = time.monotonic_ns()
        self.send(join)
        self.spawn(self._listen(handle))
        self.spawn(self._beat())
        try:
            self._reason = await self.ended
        finally:
            await self.end_tasks()
        return self._reason

    async def end_tasks(self) -> None:
        """Cancel every task and wait until all have ended."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _listen(self, handle: Callable[[m.ToEngine], None]) -> None:
        while True:
            message = m.to_engine_decoder.decode(await self._socket.recv())
            self._heard_ns = time.monotonic_ns()
            match message:
                case m.HeartbeatAck():
                    pass
                case m.Welcome():
                    self.engine = message.engine
                case m.Shutdown():
                    self._dismissed = True
                    self.leave(message.reason)
                case m.Refusal():
                    self._dismissed = True
                    if not self.ended.done():
                        self.ended.set_exception(ConnectionRefusedError(message.reason))
                case _:
                    handle(message)

    async def _beat(self) -> None:
        while True:
            gauges: Figures = {}
            for source in self.gauge_sources:
                gauges |= source()
            self.send(m.Heartbeat(gauges))
            await asyncio.sleep(self.config.cluster.heartbeat_ns / 1e9)
            # An engine that has not joined holds nothing, and may be started before its coordinator.
            patience_s = JOIN_TIMEOUT_S if self.engine is None else 2 * self.config.cluster.lease_ns / 1e9
            if (time.monotonic_ns() - self._heard_ns) / 1e9 > patience_s:
                self.leave(f"the coordinator has been silent for {patience_s:.0f} s")

    def leave(self, reason: str) -> None:
        if not self.ended.done():
            self.ended.set_result(reason)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a task that this host owns. If it raises, that is a bug, and the engine leaves."""
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
        self._logger.info(line)

    def close(self) -> None:
        """Free everything, then tell the coordinator: from then on nothing here touches any memory."""
        self.server.close()
        self.blocks.close()
        self.compute.shutdown(wait=True, cancel_futures=True)
        self.pool.close()
        if not self._dismissed and self.engine is not None:
            self.send(m.Leave(self._reason))
        self._socket.close()
        self._context.term()

    # ── gauges ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _own_gauges(self) -> Figures:
        pool = self.pool.statistics()
        figures: Figures = {
            metrics.BUFFER_FREE_BLOCKS(): float(pool.free_pages),
            metrics.BUFFER_HELD_BLOCKS(): float(pool.held_pages),
            metrics.BUFFER_QUARANTINED_BLOCKS(): float(pool.quarantined_pages),
            metrics.BUFFER_HIGH_WATER_BLOCKS(): float(pool.high_water_pages),
        }
        traffic = self.traffic.statistics()
        for nic, nic_figures in (("snic", traffic.snic), ("cnic", traffic.cnic)):
            for direction, lane in (("rx", nic_figures.rx), ("tx", nic_figures.tx)):
                for traffic_class, n_bytes in (("high", lane.high_bytes), ("low", lane.low_bytes)):
                    figures[metrics.NIC_BYTES(nic, direction, traffic_class)] = float(n_bytes)
        return figures | {sample: float(value) for sample, value in self.counters.items()}
