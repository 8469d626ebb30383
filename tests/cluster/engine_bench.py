"""An engine's worker in the test's own process: real buffer, data server, store and model; the coordinator is the test.

Messages go straight into `worker.handle`; what the engine would send is kept in `sent`.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from dualpath.cluster import messages as m
from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.engines.decode import DecodeWorker
from dualpath.cluster.engines.host import EngineHost
from dualpath.cluster.engines.prefill import PrefillWorker
from dualpath.core.batching import AttentionCost
from dualpath.core.vocabulary import Role, TrafficClass
from dualpath.kv.keys import BlockKey, Namespace, block_keys, namespace
from dualpath.model import LoadedModel
from dualpath.spec.sampling import SamplingParams
from dualpath.transfer.traffic import TrafficManager
from dualpath.transfer.transport import Channel

from .conftest import cluster_config

WAIT_S = 20.0
Message = TypeVar("Message")


class Bench:
    """One worker and its host."""

    def __init__(self, host: EngineHost, worker: DecodeWorker | PrefillWorker, sent: list[m.FromEngine]) -> None:
        self.host = host
        self.worker = worker
        self.sent = sent

    @property
    def space(self) -> Namespace:
        return namespace("model", "", self.host.layout)

    def keys(self, token_ids: list[int]) -> list[BlockKey]:
        return block_keys(self.space.root, token_ids)

    def said(self, kind: type[Message]) -> list[Message]:
        return [message for message in self.sent if isinstance(message, kind)]

    async def hears(self, kind: type[Message], n: int = 1) -> Message:
        """Wait for the n-th message of a kind."""
        async with asyncio.timeout(WAIT_S):
            while len(self.said(kind)) < n:
                assert not self.host.ended.done(), f"the engine left: {self.host.ended.result()}"
                await asyncio.sleep(0.005)
        return self.said(kind)[n - 1]

    def still_serves(self) -> None:
        assert not self.host.ended.done(), f"the engine left: {self.host.ended.result()}"

    def prepare(self, request: int, token_ids: list[int], hit_tokens: int = 0) -> None:
        self.worker.handle(m.PrepareDecode(request, 0, len(token_ids), hit_tokens, self.space, self.keys(token_ids)))

    def start(self, request: int, token_ids: list[int], max_tokens: int = 4, **sampling: object) -> None:
        """The prompt's KV is whatever the pages hold."""
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, **sampling)  # type: ignore[arg-type]
        tail = token_ids[len(token_ids) // 64 * 64 :]
        self.worker.handle(m.StartDecode(request, 0, m.Draw(11), tail, params, 0))

    def nothing_held(self) -> None:
        """No attempt, page or device block is held."""
        gauges: dict[str, float] = {}
        for source in self.host.gauge_sources:
            gauges |= source()
        held = {
            name: gauges[name] for name in gauges if name.endswith(("attempts", "held_blocks", "quarantined_blocks"))
        }
        assert not any(held.values()), held

    @contextmanager
    def peer(self, tag: str) -> Iterator[Channel]:
        """A channel into the engine's buffer, as another engine would open it."""
        channel = self.host.transport.connect(
            self.host.server.address, TrafficManager(), traffic_class=TrafficClass.LOW, peer_tag=tag
        )
        try:
            yield channel
        finally:
            channel.close()


@asynccontextmanager
async def bench(model: Path, store: Path, role: Role, **settings: object) -> AsyncIterator[Bench]:
    torch.set_num_threads(1)
    loaded = LoadedModel.load(str(model), device="cpu", dtype="float32", threads=1)
    cluster: ClusterConfig = cluster_config(model, store, **settings)
    config = m.EngineConfig(role=role, coordinator="tcp://127.0.0.1:9", cluster=cluster)
    host = EngineHost(config, loaded.layout, cluster.buffer_bytes // loaded.layout.full_block_bytes)
    host.engine = 7
    sent: list[m.FromEngine] = []
    host.send = sent.append  # type: ignore[method-assign]
    worker: DecodeWorker | PrefillWorker
    if role is Role.DECODE:
        worker = DecodeWorker(host, loaded, cluster.hbm_bytes // loaded.layout.full_block_bytes)
    else:
        cost = AttentionCost(fixed_ns=0.0, ns_per_flop=0.0, flops_per_token=1.0, flops_per_pair=1.0)
        worker = PrefillWorker(host, loaded, cost)
    try:
        yield Bench(host, worker, sent)
    finally:
        await host.end_tasks()
        worker.close()
        host.close()
