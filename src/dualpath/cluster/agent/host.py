"""What an agent keeps for one engine of its node: control link, buffer, CNIC, data server, block I/O.

An agent has these threads: the asyncio main thread (control only), and for each engine a few I/O threads that read and
write blocks, the data channels' threads, and those that serve a prefill engine's layers. KV bytes never pass through
the main thread.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from dualpath.cluster import messages as m
from dualpath.cluster.agent.attached import AttachedEngine
from dualpath.cluster.agent.block_io import BlockIO
from dualpath.cluster.agent.data_plane import STAGING_BLOCKS, DataPlane
from dualpath.cluster.agent.vllm_engine import VllmEngine
from dualpath.cluster.attachment import AgentConfig, Attached, Leave, Owner
from dualpath.cluster.control_link import ComeBack, ControlLink
from dualpath.core.vocabulary import Role
from dualpath.spec import metrics
from dualpath.spec.log import ROOT
from dualpath.spec.metrics import Figures, Sample

ABANDON_POLL_S = 0.005
"""How often a member that lets go of its attempts looks whether any is left."""
STAGING: Owner = (-1, 0)
"""The holder of those pages."""


class EngineHost:
    """One engine's part of its node. Used from the main asyncio thread unless a method says otherwise."""

    def __init__(self, config: AgentConfig, attached: AttachedEngine | VllmEngine, plane: DataPlane) -> None:
        """Raises StoreError for a store that can't be. `plane` is this engine's from then on."""
        cluster, facts = config.cluster, attached.facts
        self.config = config
        self.attached = attached
        self._logger = logging.getLogger(f"{ROOT}.engine {facts.name}")
        self.layout = facts.layout
        self.pool, self.traffic, self.transport, self.server = plane
        self.staging: asyncio.Queue[int] = asyncio.Queue()
        """Free staging pages."""
        staging_blocks = STAGING_BLOCKS if facts.role is Role.DECODE else 0
        self.buffer_blocks = self.pool.pages - staging_blocks
        for page in self.pool.allocate(STAGING, staging_blocks):
            self.staging.put_nowait(page)
        self.blocks = BlockIO(cluster, self.layout, self.pool, self.traffic)
        periods = {"heartbeat_ns": cluster.heartbeat_ns, "lease_ns": cluster.lease_ns}
        self.link = ControlLink(cluster.secret, **periods, grace_s=cluster.grace_s)
        self._heard_s = 0.0
        self.link.alive = self._engine_beats
        self.link.gauge_sources += [self._own_gauges, self.blocks.gauges]
        self.counters: Counter[Sample] = Counter({counter(): 0 for counter in metrics.ENGINE_COUNTERS})

    def _engine_beats(self) -> bool:
        """Returns whether the engine was heard since the last call: its lease must not go on when it is silent."""
        before_s, self._heard_s = self._heard_s, self.attached.heard_s
        return self._heard_s != before_s

    def tell_pool(self, attachment: str) -> None:
        """Tell the engine where its buffer is."""
        self.attached.tell(Attached(attachment, str(self.pool.path)))

    # ── control ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def gauge_sources(self) -> list[Callable[[], Figures]]:
        return self.link.gauge_sources

    @property
    def ended(self) -> "asyncio.Future[str]":
        return self.link.ended

    def send(self, message: m.FromEngine) -> None:
        self.link.send(message)

    def leave(self, reason: str) -> None:
        self.link.leave(reason)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        return self.link.spawn(work)

    async def end_tasks(self) -> None:
        await self.link.end_tasks()

    async def run(self, join: m.Join, handle: Callable[[m.ToEngine], None], come_back: ComeBack) -> str:
        """See `ControlLink.connect` and `ControlLink.run`."""
        self.link.connect(self.config.coordinator)
        return await self.link.run(join, handle, come_back)

    def log(self, line: str) -> None:
        self._logger.info(line)

    def dismiss(self, reason: str, failed: bool, refused: bool = False) -> None:
        """Tell the engine process to end."""
        self.attached.tell(Leave(reason, failed, refused))

    def free(self) -> None:
        """Free everything; from then on nothing here touches any memory. Blocks until transfers have ended."""
        self.server.close()
        self.blocks.close()
        self.pool.close()

    # ── gauges ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _own_gauges(self) -> Figures:
        pool = self.pool.statistics()
        staging = self.pool.pages - self.buffer_blocks
        figures: Figures = {
            metrics.BUFFER_FREE_BLOCKS(): float(pool.free_pages),
            metrics.BUFFER_HELD_BLOCKS(): float(pool.held_pages - staging),
            metrics.BUFFER_QUARANTINED_BLOCKS(): float(pool.quarantined_pages),
            metrics.BUFFER_HIGH_WATER_BLOCKS(): float(pool.high_water_pages - staging),
            metrics.DATA_REFUSED(): float(self.server.refused_connections),
        }
        cnic = self.traffic.statistics().cnic
        moved = {
            ("snic", "rx"): (0, self.blocks.read_bytes),
            ("snic", "tx"): (0, self.blocks.written_bytes),
            ("cnic", "rx"): (cnic.rx.high_bytes, cnic.rx.low_bytes),
            ("cnic", "tx"): (cnic.tx.high_bytes, cnic.tx.low_bytes),
        }
        for (nic, direction), (high_bytes, low_bytes) in moved.items():
            for traffic_class, n_bytes in (("high", high_bytes), ("low", low_bytes)):
                figures[metrics.NIC_BYTES(nic, direction, traffic_class, self.config.name)] = float(n_bytes)
        own = {sample: float(value) for sample, value in self.counters.items()}
        return own | figures | self.attached.gauges
