"""A member and its coordinator: lost, silent, restarted, and found again. Real links, no torch."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from dualpath.cluster import control_link, curve
from dualpath.cluster import messages as m
from dualpath.cluster.cluster_secret import ClusterSecret
from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.control_link import ABANDONED, ControlLink
from dualpath.cluster.coordinator.coordinator import Coordinator
from dualpath.cluster.coordinator.links import EngineLinks
from dualpath.core.vocabulary import Role
from dualpath.kv.keys import KEY_BYTES
from dualpath.spec.topology import Topology

from .fake_engine import SECRET, WAIT_S, join_message

FAST = {"heartbeat_ns": 20_000_000, "lease_ns": 300_000_000}


class Member:
    """A link with a task that runs it; it notes each time that it let go of everything."""

    def __init__(self, role: Role, address: str, grace_s: float = 60.0, secret: ClusterSecret = SECRET) -> None:
        self.link = ControlLink(secret, **FAST, grace_s=grace_s)
        self.heard: list[m.ToEngine] = []
        self.let_go = 0
        self.may_return = asyncio.Event()
        self.may_return.set()
        self.join = join_message(role, ticket=role.value)
        self.link.connect(address)
        self.running = asyncio.create_task(self.link.run(self.join, self.heard.append, self._come_back))

    async def _come_back(self) -> m.Join:
        self.let_go += 1
        await self.may_return.wait()
        return self.join

    async def joined(self, other_than: int = 0) -> None:
        """Wait until it is a member of an epoch that is not `other_than`."""
        async with asyncio.timeout(WAIT_S):
            while self.link.engine is None or self.link.epoch == other_than:
                await asyncio.sleep(0.005)

    async def close(self) -> None:
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)
        self.link.close()


@asynccontextmanager
async def members(address: str, **options: float) -> AsyncIterator[list[Member]]:
    """Both members of a 1P1D in this one process, as a node's agent has several."""
    made = [Member(role, address, **options) for role in (Role.PREFILL, Role.DECODE)]
    try:
        yield made
    finally:
        for member in made:
            await member.close()


@asynccontextmanager
async def coordinating(
    store: Path, address: str = "tcp://127.0.0.1:0", secret: ClusterSecret = SECRET
) -> AsyncIterator[Coordinator]:
    config = ClusterConfig(
        cluster_secret=secret,
        model="models/tiny",
        store=str(store),
        topology=Topology(1, 1),
        control_address=address,
        **FAST,
    )
    coordinator = Coordinator(config)
    coordinator.start()
    try:
        yield coordinator
        assert not coordinator.failure.done(), coordinator.failure
    finally:
        coordinator._links.by_engine.clear()  # it ends as by kill -9: nobody is told
        coordinator._links._by_identity.clear()
        await coordinator.stop()


def test_members_return_to_a_coordinator_that_has_restarted(tmp_path: Path) -> None:
    async def run() -> None:
        async with coordinating(tmp_path) as first:
            address = first.control_address
            running = members(address)
            made = await running.__aenter__()
            await first.membership.complete(WAIT_S)
            for member in made:
                await member.joined()
        epoch = made[0].link.epoch
        async with coordinating(tmp_path, address) as second:
            await second.membership.complete(WAIT_S)
            for member in made:
                await member.joined(other_than=epoch)
                assert member.let_go == 1
            assert second.membership.status == "ok"
            assert made[0].link.tag(0) != f"{epoch:x}.0"
            await running.__aexit__(None, None, None)

    asyncio.run(run())


def test_nothing_reaches_the_next_coordinator_that_was_said_to_the_last(tmp_path: Path) -> None:
    """Neither what was queued while nobody listened, nor what is said while the member lets go."""

    async def run() -> None:
        async with coordinating(tmp_path) as first:
            address = first.control_address
            running = members(address)
            made = await running.__aenter__()
            await first.membership.complete(WAIT_S)
            for member in made:
                await member.joined()
        prefill = made[0]
        prefill.may_return.clear()
        prefill.link.send(m.PrefillDone(0, 0, m.Draw(1)))
        while not prefill.let_go:
            await asyncio.sleep(0.005)
        prefill.link.send(m.Released(0, 0))
        async with coordinating(tmp_path, address) as second:
            await asyncio.sleep(0.1)
            assert prefill.link.engine is None, "a member has joined that has not let go"
            prefill.may_return.set()
            await second.membership.complete(WAIT_S)
            gauges = second.gauges()
            assert gauges["dualpath_strange_messages_total"] == 0
            assert gauges["dualpath_stale_messages_total"] == 0
            assert gauges['dualpath_scheduler_dropped_total{input="released"}'] == 0
            await running.__aexit__(None, None, None)

    asyncio.run(run())


def test_a_block_written_meanwhile_is_told_to_the_next_coordinator(tmp_path: Path) -> None:
    """Nobody heard of it, and the restarted coordinator may have looked into the store before it was there."""

    async def run() -> None:
        async with coordinating(tmp_path) as first:
            running = members(first.control_address)
            made = await running.__aenter__()
            await first.membership.complete(WAIT_S)
            for member in made:
                await member.joined()
            address, epoch = first.control_address, made[1].link.epoch
        keys = [bytes([number]) * KEY_BYTES for number in range(3)]
        for key, parent in zip(keys[1:], keys, strict=False):
            made[1].link.send(m.Stored([m.StoredBlock(keys[0], key, parent, 4096)]))
        async with coordinating(tmp_path, address) as second:
            await second.membership.complete(WAIT_S)
            await made[1].joined(other_than=epoch)
            async with asyncio.timeout(WAIT_S):
                while second.gauges()["dualpath_store_blocks"] != 2:
                    await asyncio.sleep(0.005)
            await running.__aexit__(None, None, None)

    asyncio.run(run())


def test_who_comes_back_takes_the_place_of_what_it_was(tmp_path: Path) -> None:
    """The coordinator only stood still: for it the member is still there. One engine then, not two."""

    async def run() -> None:
        async with coordinating(tmp_path) as coordinator, members(coordinator.control_address) as made:
            await coordinator.membership.complete(WAIT_S)
            for member in made:
                await member.joined()
                member.link._lose("it seemed silent", member.heard.append)
            async with asyncio.timeout(WAIT_S):
                while coordinator.membership.returned_engines < 2:
                    await asyncio.sleep(0.005)
            for member in made:
                await member.joined()
            assert sorted(str(engine["role"]) for engine in coordinator.engines()) == ["decode", "prefill"]
            assert coordinator.membership.status == "ok"
            assert coordinator.membership.lost_engines == 0

    asyncio.run(run())


def test_an_engine_that_was_counted_out_may_come_back(tmp_path: Path) -> None:
    """As after a partition: its lease ran out, then it is heard again."""

    async def run() -> None:
        async with coordinating(tmp_path) as coordinator, members(coordinator.control_address) as made:
            await coordinator.membership.complete(WAIT_S)
            link = next(iter(coordinator._links.by_engine.values()))
            coordinator.membership.lost(link, "silent for 5.0 s")
            async with asyncio.timeout(WAIT_S):
                while coordinator.membership.status != "ok":
                    await asyncio.sleep(0.005)
            assert sum(member.let_go for member in made) == 1

    asyncio.run(run())


@pytest.mark.parametrize("ever_joined", [True, False])
def test_without_a_coordinator_a_member_leaves_when_its_grace_is_over(tmp_path: Path, ever_joined: bool) -> None:
    async def run() -> None:
        address = "tcp://127.0.0.1:9"
        async with coordinating(tmp_path) as coordinator:
            if ever_joined:
                address = coordinator.control_address
            running = members(address, grace_s=1.0)
            made = await running.__aenter__()
            if ever_joined:
                await coordinator.membership.complete(WAIT_S)
        for member in made:
            assert (await asyncio.wait_for(member.running, WAIT_S)).startswith(ABANDONED)
            assert member.let_go == ever_joined
        await running.__aexit__(None, None, None)

    asyncio.run(run())


def alone(work: Callable[[EngineLinks, Member], Awaitable[None]]) -> None:
    """Run `work` with a member and a coordinator's bare end, whose every word is the test's."""

    async def run() -> None:
        links = EngineLinks(SECRET)
        member = Member(Role.PREFILL, links.bind("tcp://127.0.0.1:0"))
        try:
            await work(links, member)
        finally:
            await member.close()
            links.close()

    asyncio.run(run())


def test_another_epoch_is_another_coordinator() -> None:
    async def work(links: EngineLinks, member: Member) -> None:
        messages = links.messages()
        identity, join = await anext(messages)
        assert isinstance(join, m.Join)
        links.send_to(identity, m.Welcome(3, epoch=1))
        await member.joined()
        links.send_to(identity, m.HeartbeatAck(epoch=1))
        await asyncio.sleep(0.05)
        assert member.let_go == 0
        links.send_to(identity, m.HeartbeatAck(epoch=2))
        async with asyncio.timeout(WAIT_S):
            while not isinstance((again := await anext(messages))[1], m.Join):
                pass  # heartbeats from before
        assert again[0] != identity
        assert member.let_go == 1

    alone(work)


def test_what_a_member_is_told_for_good_ends_it() -> None:
    async def work(links: EngineLinks, member: Member) -> None:
        identity, _ = await anext(links.messages())
        links.send_to(identity, m.Welcome(3, epoch=1))
        await member.joined()
        links.send_to(identity, m.Shutdown("other weights"))
        assert await asyncio.wait_for(member.running, WAIT_S) == "other weights"
        assert member.let_go == 0

    alone(work)


def test_a_member_may_leave_rather_than_come_back() -> None:
    """As an engine does whose memory sleeps: nobody but the lost coordinator can wake it."""

    async def work(links: EngineLinks, member: Member) -> None:
        messages = links.messages()
        identity, _ = await anext(messages)
        links.send_to(identity, m.Welcome(3, epoch=1))
        await member.joined()
        member.may_return.clear()
        links.send_to(identity, m.NotMember("restarted"))
        async with asyncio.timeout(WAIT_S):
            while not member.let_go:
                await asyncio.sleep(0.005)
        member.link.leave(f"{ABANDONED}: it sleeps")
        assert await asyncio.wait_for(member.running, WAIT_S) == f"{ABANDONED}: it sleeps"

    alone(work)


# ── A coordinator that refuses the handshake ─────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def answering(said: bytes, address: str = "tcp://127.0.0.1:0") -> AsyncIterator[tuple[str, list[int]]]:
    """Listens, says this to whoever connects, and cuts him off. Yields the address and a list of those who came."""
    came: list[int] = []

    async def cut_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.append(1)
        with contextlib.closing(writer), contextlib.suppress(ConnectionError):
            writer.write(said)
            while said and await reader.read(1024):
                pass

    host, _, port = address.removeprefix("tcp://").rpartition(":")
    server = await asyncio.start_server(cut_off, host, int(port))
    async with server:
        yield f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}", came


async def refusal(member: Member) -> str:
    async with asyncio.timeout(WAIT_S):
        with pytest.raises(ConnectionRefusedError) as refused:
            await member.running
    await member.close()
    return str(refused.value)


def test_a_member_with_another_secret_is_told_so_and_ends(tmp_path: Path) -> None:
    async def run() -> None:
        async with coordinating(tmp_path) as coordinator:
            stranger = Member(Role.PREFILL, coordinator.control_address, secret=ClusterSecret.random())
            why = await refusal(stranger)
            assert coordinator.control_address in why and "another cluster secret" in why
            assert "--cluster-secret-file" in why
            assert coordinator.membership.status == "unavailable"

    asyncio.run(run())


def test_a_member_is_told_that_there_is_something_else_at_the_address() -> None:
    async def run() -> None:
        async with answering(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 10) as (address, _):
            assert "is no coordinator" in await refusal(Member(Role.PREFILL, address))

    asyncio.run(run())


def test_handshakes_that_are_cut_off_now_and_then_are_no_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator that starts, dies and starts again: the member waits for the one that stays."""
    monkeypatch.setattr(curve, "_REFUSED_S", 0.0)

    async def run() -> None:
        member: Member | None = None
        async with answering(b"") as (address, came):
            member = Member(Role.PREFILL, address)
            async with asyncio.timeout(WAIT_S):
                while len(came) < curve._REFUSALS - 2:
                    await asyncio.sleep(0.005)
        async with coordinating(tmp_path, address):
            await member.joined()
            await member.close()

    asyncio.run(run())


def test_a_member_that_loses_its_coordinator_to_another_clusters_goes_on_trying(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(curve, "_REFUSED_S", 0.1)
    monkeypatch.setattr(control_link, "_TRY_AGAIN_S", 0.1)

    async def told(words: str) -> None:
        async with asyncio.timeout(WAIT_S):
            while words not in caplog.text:
                await asyncio.sleep(0.01)
        caplog.clear()

    async def run() -> None:
        async with coordinating(tmp_path) as first:
            address = first.control_address
            member = Member(Role.PREFILL, address)
            await member.joined()
            epoch = member.link.epoch
        async with coordinating(tmp_path, address, ClusterSecret.random()):
            await told("another cluster secret")
        async with answering(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 10, address):
            await told("what listens there is no coordinator")
        async with coordinating(tmp_path, address):
            await member.joined(other_than=epoch)
            await member.close()

    asyncio.run(run())
