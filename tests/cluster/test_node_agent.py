"""A node agent and what attaches to it: engines that come, go and lose it, and processes that are no engines."""

import asyncio
import contextlib
import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import msgspec
import pytest

from dualpath.cluster import attachment as a
from dualpath.cluster.agent.main import NodeAgent
from dualpath.cluster.agent.member import Member
from dualpath.cluster.attachment_frames import Connection, frame
from dualpath.cluster.cluster_secret import ClusterSecret
from dualpath.cluster.local import Cluster
from dualpath.core.vocabulary import Role, TrafficClass
from dualpath.transfer.pool import BufferPool

from .conftest import ask, cluster_config, gauge, in_cluster
from .fake_engine import LAYOUT
from .test_token_equality import Reference, converse

BLOCK_BYTES = LAYOUT.full_block_bytes
_decoder = msgspec.msgpack.Decoder(a.ToEngineProcess)


@pytest.fixture
def path() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as directory:  # tmp_path may be too long for a socket
        yield f"{directory}/agent.sock"


@asynccontextmanager
async def agent_at(path: str, store: Path, **settings: object) -> AsyncIterator[NodeAgent]:
    defaults = {"buffer_bytes": 8 * BLOCK_BYTES, "lease_ns": 10**15, "cluster_secret": ClusterSecret.random()}
    cluster = cluster_config(Path("model"), store, **(defaults | settings))
    config = a.AgentConfig(coordinator="tcp://127.0.0.1:9", cluster=cluster, name="node", socket=path)
    async with NodeAgent(config) as agent:
        yield agent


def attach(role: Role, name: str, **facts: object) -> a.Attach:
    said: dict[str, object] = {
        "role": role,
        "name": name,
        "pid": 1,
        "ticket": name,
        "layout": LAYOUT,
        "model_fingerprint": "model",
        "max_model_len_tokens": 4096,
        "vocab_size": 256,
        "eos_token_ids": (1,),
        "hbm_blocks": 8,
    }
    return a.Attach(**(said | facts))  # type: ignore[arg-type]


@contextmanager
def decode_engine(path: str, name: str = "decode-0") -> Iterator[Connection]:
    """A decode engine as far as its agent sees it."""
    connection = Connection.to(path)
    try:
        connection.send(attach(Role.DECODE, name))
        yield connection
    finally:
        connection.close()


async def member_named(agent: NodeAgent, name: str) -> Member:
    async with asyncio.timeout(10.0):
        while True:
            for member in agent.members:
                if member.host.attached.facts.name == name:
                    return member
            await asyncio.sleep(0.005)


async def alone(agent: NodeAgent) -> None:
    async with asyncio.timeout(10.0):
        while agent.members:
            await asyncio.sleep(0.005)


def on_agent(path: str, store: Path, work: Callable[[NodeAgent], Awaitable[None]], **settings: object) -> None:
    async def run() -> None:
        async with agent_at(path, store, **settings) as agent:
            await work(agent)

    asyncio.run(run())


def test_engines_of_a_node_share_its_snic_and_have_buffers_and_cnics_of_their_own(path: str, tmp_path: Path) -> None:
    async def work(agent: NodeAgent) -> None:
        with decode_engine(path, "decode-0") as first, decode_engine(path, "decode-1"):
            one, two = [(await member_named(agent, f"decode-{number}")).host for number in (0, 1)]
            assert one.traffic.snic is two.traffic.snic
            assert one.traffic.cnic is not two.traffic.cnic
            assert one.pool.path != two.pool.path
            assert (one.buffer_blocks, one.pool.pages) == (8, 12)  # beside the buffer there are staging pages
            told = await asyncio.to_thread(first.receive, _decoder)
            assert told.pool_path == str(one.pool.path)
            one.traffic.snic.rx.acquire(TrafficClass.LOW, 100)
            assert two.traffic.statistics().snic.rx.low_bytes == 100

    on_agent(path, tmp_path, work)


def test_when_an_engine_is_gone_its_buffer_is_and_it_may_come_back(path: str, tmp_path: Path) -> None:
    async def work(agent: NodeAgent) -> None:
        for _ in range(2):
            with decode_engine(path):
                pool = (await member_named(agent, "decode-0")).host.pool
                BufferPool.attach(pool.path)
            await alone(agent)
            with pytest.raises(FileNotFoundError):
                BufferPool.attach(pool.path)

    on_agent(path, tmp_path, work)


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff\xff\xff\xff",
        b"\x02\x00\x00\x00\xc1\xc1",
        frame(a.LayerThread("no such attachment", "load")),
        frame(attach(Role.PREFILL, "prefill-0", rows_path="/nowhere")),
        b"\x00\x00\x10\x00" + b"\x91" * 2**20,
    ],
    ids=["nothing", "http", "too long", "no record", "no attachment", "no rows", "deep"],
)
def test_what_is_no_engine_is_disconnected_and_others_are_served(
    path: str, tmp_path: Path, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dualpath.cluster.agent.main.FIRST_RECORD_S", 0.1)

    def talk() -> None:
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(path)
            stranger.settimeout(10.0)
            stranger.sendall(said)
            with contextlib.suppress(ConnectionResetError):
                while stranger.recv(4096):
                    pass

    async def work(agent: NodeAgent) -> None:
        await asyncio.to_thread(talk)
        with decode_engine(path):
            await member_named(agent, "decode-0")

    on_agent(path, tmp_path, work)


def test_an_engine_that_says_nonsense_is_gone(path: str, tmp_path: Path) -> None:
    async def work(agent: NodeAgent) -> None:
        with decode_engine(path) as engine:
            await member_named(agent, "decode-0")
            engine.send(attach(Role.DECODE, "twice"))
            await alone(agent)

    on_agent(path, tmp_path, work)


def test_a_buffer_that_holds_no_block_is_told_to_the_engine(path: str, tmp_path: Path) -> None:
    async def work(_agent: NodeAgent) -> None:
        with decode_engine(path) as engine:
            told = await asyncio.to_thread(engine.receive, _decoder)
            assert isinstance(told, a.Leave)
            assert told.failed
            assert "does not hold a Full Block" in told.reason

    on_agent(path, tmp_path, work, buffer_bytes=1)


@pytest.mark.slow
@pytest.mark.parametrize("role", Role)
def test_an_engine_outlives_its_agent(checkpoint: Callable[[str], Path], path: str, tmp_path: Path, role: Role) -> None:
    """It keeps its model, gives its sequences up, and attaches to the next agent at that address."""
    from dualpath.cluster.engines.main import Engine
    from dualpath.model import LoadedModel

    cluster = cluster_config(checkpoint("qwen3"), tmp_path, cluster_secret=ClusterSecret.random())
    model = LoadedModel.load(cluster.model, device="cpu", dtype="float32", threads=1)
    engine = Engine(a.EngineConfig(role=role, agent=path, cluster=cluster, name="engine"), model, lambda _: None)
    running = threading.Thread(target=engine.run, args=(lambda _: None,), daemon=True)
    first = a.AgentConfig(coordinator="tcp://127.0.0.1:9", cluster=cluster, name="node", socket=path)

    async def work() -> None:
        agent = NodeAgent(first)
        await agent.__aenter__()
        running.start()
        member = await member_named(agent, "engine")
        member.host.attached.close("as if the agent were killed")
        async with asyncio.timeout(10.0):
            await member.ended
        await member_named(agent, "engine")
        await agent.__aexit__()  # an agent that stops in good order ends its engines

    try:
        asyncio.run(work())
        running.join(10.0)
        assert not running.is_alive()
    finally:
        engine.close()


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "snics"), [("1P1Dx2", 10**8), ("2P1Dx2", 10**8), ("1Px2+1D", (10**8, 5 * 10**7))])
def test_nodes_of_several_engines_give_the_reference_tokens(
    checkpoint: Callable[[str], Path], reference: Reference, tmp_path: Path, topology: str, snics: object
) -> None:
    config = cluster_config(checkpoint("qwen3"), tmp_path, topology, system="dualpath-split", snic_bytes_per_s=snics)

    async def work(cluster: Cluster) -> None:
        await asyncio.gather(*(converse(cluster, "qwen3", reference, True, agent) for agent in range(4)))
        engines = cluster.coordinator.engines()
        nodes = {engine["node"] for engine in engines}
        assert (len(engines), len(nodes)) == (config.topology.engines, config.topology.nodes)
        facts = cluster.coordinator._driver._scheduler.engines()  # type: ignore[union-attr]
        assert len({one.node for one in facts}) == config.topology.nodes
        assert gauge(cluster, "dualpath_buffer_high_water_blocks") > 0

    in_cluster(config, work)


@pytest.mark.slow
def test_an_engine_that_is_killed_costs_nobody_else_of_its_node(
    checkpoint: Callable[[str], Path], reference: Reference, tmp_path: Path
) -> None:
    import os
    import signal

    async def work(cluster: Cluster) -> None:
        prompt = list(range(20, 220))
        expected = await asyncio.to_thread(reference, "qwen3", prompt, 8)
        assert (await ask(cluster, prompt, 8)).token_ids == expected
        for role in ("prefill", "decode"):
            pids = [engine["pid"] for engine in cluster.coordinator.engines() if engine["role"] == role]
            os.kill(int(str(pids[0])), signal.SIGKILL)
            async with asyncio.timeout(20.0):
                while len(cluster.coordinator.engines()) == 4 - (role == "decode"):
                    await asyncio.sleep(0.02)
            assert (await ask(cluster, prompt, 8)).token_ids == expected

    in_cluster(cluster_config(checkpoint("qwen3"), tmp_path, "1P1Dx2"), work)
