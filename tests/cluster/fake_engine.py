"""A coordinator in the test's own process, and engines that are only a control socket: every message is the test's."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import msgspec
import zmq
import zmq.asyncio

from dualpath.cluster import messages as m
from dualpath.cluster.cluster_secret import ClusterSecret
from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.coordinator.coordinator import Coordinator
from dualpath.cluster.curve import secure_client
from dualpath.core.vocabulary import Role
from dualpath.kv.layout import KVLayout, KVPart
from dualpath.spec.topology import Topology

LAYOUT = KVLayout.alike(layers=2, parts=(KVPart("k", 1, 2), KVPart("v", 1, 2)), dtype="float32")
WAIT_S = 10.0
SECRET = ClusterSecret.random()
Message = TypeVar("Message")
_decoder = msgspec.msgpack.Decoder(m.ToEngine)


def join_message(role: Role, **changes: object) -> m.Join:
    facts = {
        "role": role,
        "pid": 0,
        "host": "here",
        "buffer_blocks": 64,
        "hbm_blocks": 64 if role is Role.DECODE else 0,
        "data_address": f"shm:/nowhere/{role.value}",
        "transport": "shm",
        "layout": LAYOUT,
        "model_fingerprint": "model",
        "max_model_len_tokens": 4096,
        "vocab_size": 256,
        "eos_token_ids": (1,),
        "prefill_tokens_per_s": 1000.0 if role is Role.PREFILL else None,
    }
    return m.Join(**(facts | changes))  # type: ignore[arg-type]


class FakeEngine:
    """A DEALER socket with a heart that beats when told to."""

    def __init__(self, context: zmq.asyncio.Context, address: str, role: Role, secret: ClusterSecret = SECRET) -> None:
        self.role = role
        self.heard: list[m.ToEngine] = []
        self._socket = context.socket(zmq.DEALER)
        secure_client(self._socket, secret)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(address)
        self._listening = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        while True:
            self.heard.append(_decoder.decode(await self._socket.recv()))

    def say(self, message: m.FromEngine | bytes) -> None:
        payload = message if isinstance(message, bytes) else m.encoder.encode(message)
        self._socket.send(payload, flags=zmq.NOBLOCK)

    def beat(self) -> None:
        self.say(m.Heartbeat({}))

    async def join(self, **changes: object) -> "FakeEngine":
        self.say(join_message(self.role, **changes))
        await self.hears(m.Welcome)
        return self

    @property
    def engine(self) -> int:
        (welcome,) = self.all(m.Welcome)
        return welcome.engine

    def all(self, kind: type[Message]) -> list[Message]:
        return [message for message in self.heard if isinstance(message, kind)]

    async def hears(self, kind: type[Message], n: int = 1) -> Message:
        """Wait for the n-th message of a kind."""
        async with asyncio.timeout(WAIT_S):
            while len(self.all(kind)) < n:
                await asyncio.sleep(0.002)
        return self.all(kind)[n - 1]

    async def close(self) -> None:
        self._listening.cancel()
        await asyncio.gather(self._listening, return_exceptions=True)
        self._socket.close()


class FakeCrew:
    """Has children of any ticket, and notes what it is told of them."""

    def __init__(self) -> None:
        self.killed: list[str] = []
        self.restarts = 0
        self.members: list[str] = []

    def kill(self, ticket: str) -> None:
        self.killed.append(ticket)

    def ready(self, ticket: str) -> None:
        self.members.append(ticket)

    def starting(self) -> list[dict[str, object]]:
        return []


class Head:
    """A coordinator and the means to make engines for it."""

    def __init__(self, coordinator: Coordinator, context: zmq.asyncio.Context, crew: FakeCrew) -> None:
        self.coordinator = coordinator
        self.crew = crew
        self._context = context
        self.engines: list[FakeEngine] = []

    def new(self, role: Role) -> FakeEngine:
        self.engines.append(FakeEngine(self._context, self.coordinator.control_address, role))
        return self.engines[-1]

    async def becomes(self, name: str, value: float) -> None:
        """Wait until a gauge of the coordinator has a value."""
        async with asyncio.timeout(WAIT_S):
            while self.coordinator.gauges().get(name, 0.0) != value:
                await asyncio.sleep(0.002)


@asynccontextmanager
async def head(store: Path, **settings: object) -> AsyncIterator[Head]:
    defaults: dict[str, object] = {"model": "models/tiny", "store": str(store), "topology": Topology(1, 1)}
    defaults["cluster_secret"] = SECRET
    config = ClusterConfig(**(defaults | settings))  # type: ignore[arg-type]
    crew = FakeCrew()
    coordinator = Coordinator(config, crew)
    coordinator.start()
    context = zmq.asyncio.Context()
    made = Head(coordinator, context, crew)
    try:
        yield made
        assert not coordinator.failure.done(), coordinator.failure
    finally:
        await coordinator.stop()
        for engine in made.engines:
            await engine.close()
        context.term()
