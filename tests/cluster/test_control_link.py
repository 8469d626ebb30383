"""A member and its coordinator: lost, silent, restarted, and found again. Real links, no torch."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from dualpath.cluster import messages as m
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

    def __init__(self, role: Role, address: str, grace_s: float = 60.0) -> None:
        self.link = ControlLink(SECRET, **FAST, grace_s=grace_s)
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
async def coordinating(store: Path, address: str = "tcp://127.0.0.1:0") -> AsyncIterator[Coordinator]:
    config = ClusterConfig(
        cluster_secret=SECRET,
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
