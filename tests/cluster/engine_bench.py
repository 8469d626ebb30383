"""A node agent and an engine in the test's own process, all real; the coordinator is the test.

The agent is on the test's event loop; the engine is on threads, attached by its agent's socket. Messages go straight
into `worker.handle`; what the agent would send is kept in `sent`.
"""

import asyncio
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from dualpath.cluster import messages as m
from dualpath.cluster.agent.decode import DecodeWorker
from dualpath.cluster.agent.host import EngineHost
from dualpath.cluster.agent.main import NodeAgent
from dualpath.cluster.agent.prefill import PrefillWorker
from dualpath.cluster.attachment import AgentConfig, EngineConfig
from dualpath.cluster.cluster_secret import ClusterSecret
from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.engines.decode import DecodeCompute
from dualpath.cluster.engines.main import Engine
from dualpath.cluster.engines.prefill import PrefillCompute
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

    def __init__(
        self,
        host: EngineHost,
        worker: DecodeWorker | PrefillWorker,
        compute: DecodeCompute | PrefillCompute,
        sent: list[m.FromEngine],
    ) -> None:
        self.host = host
        self.worker = worker
        self.compute = compute
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
            self.host.server.address,
            TrafficManager(),
            traffic_class=TrafficClass.LOW,
            peer_tag=tag,
            key=self.host.config.cluster.secret.data_key,
        )
        try:
            yield channel
        finally:
            channel.close()


@asynccontextmanager
async def bench(model: Path, store: Path, role: Role, **settings: object) -> AsyncIterator[Bench]:
    torch.set_num_threads(1)
    loaded = LoadedModel.load(str(model), device="cpu", dtype="float32", threads=1)
    # No coordinator answers, and none is missed.
    cluster: ClusterConfig = cluster_config(
        model, store, lease_ns=10**15, cluster_secret=ClusterSecret.random(), **settings
    )
    sent: list[m.FromEngine] = []
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/agent.sock"
        engine = Engine(EngineConfig(role=role, agent=path, cluster=cluster, name="engine"), loaded, lambda _: None)
        running = threading.Thread(target=engine.run, args=(lambda _: None,), daemon=True)
        try:
            config = AgentConfig(coordinator="tcp://127.0.0.1:9", cluster=cluster, name="node", socket=path)
            async with NodeAgent(config) as agent:
                running.start()
                async with asyncio.timeout(WAIT_S):
                    while not agent.members:
                        await asyncio.sleep(0.005)
                member = next(iter(agent.members))
                member.host.link.send = sent.append  # type: ignore[method-assign]
                member.host.link.engine = 7
                if isinstance(engine.worker, PrefillCompute):
                    while engine.worker.io is None:
                        await asyncio.sleep(0.005)
                yield Bench(member.host, member.worker, engine.worker, sent)
            await asyncio.to_thread(running.join)
        finally:
            engine.close()
