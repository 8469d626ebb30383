"""Workers of a vLLM server attach to their agent: all together, or none; and what the agent makes of what they say."""

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import pytest

from dualpath.cluster import attachment as a
from dualpath.cluster import vllm_attachment as v
from dualpath.cluster.agent.main import NodeAgent
from dualpath.cluster.agent.vllm_engine import VllmEngine
from dualpath.cluster.attachment_frames import Connection
from dualpath.core.vocabulary import Role
from dualpath.spec import metrics

from .fake_vllm import FakeVllm
from .test_node_agent import agent_at, member_named

OWNER = (3, 0)
_decoder = msgspec.msgpack.Decoder(v.ToWorker)


@pytest.fixture
def path() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as directory:  # tmp_path may be too long for a socket
        yield f"{directory}/agent.sock"


class Workers:
    """A decode server's workers, which say what the test says."""

    def __init__(self, path: str, stack: ExitStack) -> None:
        self.server = FakeVllm(path, Role.DECODE, "decode-0", workers=2)
        self._path, self._stack = path, stack
        stack.callback(self.server.close)

    def attach(self, rank: int, **changes: object) -> Connection:
        connection = Connection.to(self._path)
        self._stack.callback(connection.close)
        connection.send(self.server.attach_worker(rank, **changes))
        return connection


async def told(connection: Connection) -> msgspec.Struct:
    async with asyncio.timeout(10.0):
        message: msgspec.Struct = await asyncio.to_thread(connection.receive, _decoder)
    return message


async def refused(connection: Connection) -> str:
    message = await told(connection)
    assert isinstance(message, a.Leave) and message.refused
    with pytest.raises(ConnectionError):
        await told(connection)
    return message.reason


@contextmanager
def workers(path: str) -> Iterator[Workers]:
    with ExitStack() as stack:
        yield Workers(path, stack)


def on_agent(path: str, store: Path, work: Callable[[NodeAgent, Workers], Awaitable[None]]) -> None:
    async def run() -> None:
        async with agent_at(path, store, buffer_bytes=2**20) as agent:
            with workers(path) as here:
                await work(agent, here)

    asyncio.run(run())


async def engine(agent: NodeAgent, here: Workers) -> tuple[VllmEngine, list[Connection]]:
    connections = [here.attach(rank) for rank in (1, 0)][::-1]
    attached = (await member_named(agent, "decode-0")).host.attached
    assert isinstance(attached, VllmEngine)
    for connection in connections:
        assert isinstance(await told(connection), a.Attached)
    return attached, connections


def test_an_engine_is_there_when_all_its_workers_are(path: str, tmp_path: Path) -> None:
    async def work(agent: NodeAgent, here: Workers) -> None:
        first = here.attach(1)
        await asyncio.sleep(0.1)
        assert not agent.members
        second = here.attach(0)
        maps = [await told(one) for one in (first, second)]
        assert maps[0] == maps[1] and isinstance(maps[0], a.Attached)

    on_agent(path, tmp_path, work)


@pytest.mark.parametrize(
    ("rank", "changes", "why"),
    [
        (0, {}, "is here already"),
        (1, {"url": "http://127.0.0.1:9"}, "give engines different names"),
        (1, {"workers": 3}, "give engines different names"),
        (2, {}, "ranks begin with 0"),
    ],
)
def test_a_worker_that_does_not_belong_to_its_engine(
    path: str, tmp_path: Path, rank: int, changes: dict[str, object], why: str
) -> None:
    async def work(agent: NodeAgent, here: Workers) -> None:
        first = here.attach(0)
        await asyncio.sleep(0.05)
        assert why in await refused(here.attach(rank, **changes))
        here.attach(1)
        assert isinstance(await told(first), a.Attached)

    on_agent(path, tmp_path, work)


def test_workers_wait_only_so_long_for_each_other(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualpath.cluster.agent.gathering.GATHER_S", 0.1)

    async def work(agent: NodeAgent, here: Workers) -> None:
        assert "only 1 of 2 workers" in await refused(here.attach(0))
        await engine(agent, here)

    on_agent(path, tmp_path, work)


def test_a_worker_that_dies_while_others_are_awaited_may_come_again(path: str, tmp_path: Path) -> None:
    async def work(agent: NodeAgent, here: Workers) -> None:
        here.attach(0).close()
        await asyncio.sleep(0.05)
        await engine(agent, here)

    on_agent(path, tmp_path, work)


def test_a_call_is_answered_by_all_workers_with_the_first_error(path: str, tmp_path: Path) -> None:
    async def work(agent: NodeAgent, here: Workers) -> None:
        attached, (zero, one) = await engine(agent, here)
        for errors, expected in ((("", ""), ""), (("", "no room"), "no room"), (("a", "b"), "a")):
            replied = attached.call(lambda call: a.Release(call, 5))
            for connection, error in zip((zero, one), errors, strict=True):
                assert not replied.done()
                call = await told(connection)
                assert isinstance(call, a.Release)
                connection.send(a.Reply(call.call, error=error))
                await asyncio.sleep(0.05)
            assert (await replied).error == expected

    on_agent(path, tmp_path, work)


def test_each_drop_is_answered_by_a_quiet_of_its_own(path: str, tmp_path: Path) -> None:
    """Owners are numbered anew by the next coordinator: a late answer must not be taken for that to a later one."""

    async def work(agent: NodeAgent, here: Workers) -> None:
        attached, (zero, one) = await engine(agent, here)
        zero.send(v.Quiet(OWNER))  # nobody has asked
        await asyncio.sleep(0.05)
        first, second = attached.drop(OWNER), attached.drop(OWNER)
        for connection in (zero, zero, one):
            connection.send(v.Quiet(OWNER))
        await asyncio.wait_for(first, 10.0)
        await asyncio.sleep(0.05)
        assert not second.done() and attached.dropping
        one.send(v.Quiet(OWNER))
        await asyncio.wait_for(second, 10.0)
        assert not attached.dropping
        last = attached.drop(OWNER)
        one.close()
        with pytest.raises(asyncio.CancelledError):
            await last
        assert attached.drop(OWNER).cancelled()

    on_agent(path, tmp_path, work)


def test_words_about_what_is_not_are_dropped_and_counted(path: str, tmp_path: Path) -> None:
    async def work(agent: NodeAgent, here: Workers) -> None:
        _, (zero, _) = await engine(agent, here)
        host = (await member_named(agent, "decode-0")).host
        zero.send(v.Generated(99, [1, 2]))
        zero.send(v.LayerSaved(0, [v.Saved(OWNER, 0, 1)]))
        async with asyncio.timeout(10.0):
            while host.counters[metrics.ENGINE_STALE_MESSAGES()] < 2:
                await asyncio.sleep(0.005)

    on_agent(path, tmp_path, work)


def test_an_operators_orders_are_refused(path: str, tmp_path: Path) -> None:
    from dualpath.cluster import orders as o
    from dualpath.cluster.agent.vllm_engine import refuse

    assert "vLLM server" in refuse(o.ReadWeights(1, "/path")).error
    assert refuse(o.RestoreMemory(2, True, True, "")) == o.OrderDone(2)
