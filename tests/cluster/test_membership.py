"""Who belongs to a cluster: joining in any order, refusals, leases, losses. The test speaks for the engines."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from dualpath.cluster import messages as m
from dualpath.cluster.cluster_secret import ClusterSecret
from dualpath.cluster.coordinator.links import EngineLinks
from dualpath.cluster.coordinator.membership import Membership
from dualpath.core.vocabulary import Role
from dualpath.kv import StoreError
from dualpath.spec.topology import Topology

from .fake_engine import Head, head, join_message


def with_head(store: Path, work: Callable[[Head], Awaitable[None]], **settings: object) -> None:
    async def run() -> None:
        async with head(store, **settings) as cluster:
            await work(cluster)

    asyncio.run(run())


@pytest.mark.parametrize("order", [(Role.PREFILL, Role.DECODE), (Role.DECODE, Role.PREFILL)])
def test_engines_join_in_any_order(tmp_path: Path, order: tuple[Role, Role]) -> None:
    async def work(cluster: Head) -> None:
        assert cluster.coordinator.membership.status == "unavailable"
        for role in order:
            cluster.new(role).say(join_message(role))
        await cluster.coordinator.membership.complete(10.0)
        assert {engine["role"] for engine in cluster.coordinator.health()["engines"]} == {"prefill", "decode"}  # type: ignore[attr-defined]
        assert cluster.coordinator.membership.status == "ok"
        assert {(await engine.hears(m.Welcome)).engine for engine in cluster.engines} == {0, 1}

    with_head(tmp_path, work)


def test_a_decode_engine_that_waits_for_the_first_prefill_engine_is_kept_alive(tmp_path: Path) -> None:
    """Its heartbeats are answered, or it would leave for a coordinator that is silent; one that falls silent itself is
    not taken for a member later.
    """

    async def work(cluster: Head) -> None:
        early, dead = cluster.new(Role.DECODE), cluster.new(Role.DECODE)
        for engine in (early, dead):
            engine.say(join_message(Role.DECODE))
        beats = 0
        while not dead.all(m.NotMember):  # until its lease is over
            early.beat()
            await asyncio.sleep(0.02)
            beats += 1
            assert beats < 500
        assert len(early.all(m.HeartbeatAck)) > 0
        await cluster.new(Role.PREFILL).join()
        await early.hears(m.Welcome)
        assert not dead.all(m.Welcome)

    with_head(tmp_path, work, lease_ns=300_000_000, heartbeat_ns=20_000_000, topology=Topology(1, 2))


@pytest.mark.parametrize(
    ("role", "changes", "complaint"),
    [
        (Role.DECODE, {"model_fingerprint": "another"}, "is not the cluster's"),
        (Role.DECODE, {"hbm_blocks": 0}, "hold no Full Block"),
        (Role.DECODE, {"transport": "tcp"}, "moves KV by shm and the engine by tcp; start it with --transport shm"),
        (Role.DECODE, {"kernel": "of another host"}, "start `dualpath serve` and all engines with --transport tcp"),
        (Role.PREFILL, {"buffer_blocks": 0}, "hold no Full Block"),
        (Role.PREFILL, {"prefill_tokens_per_s": None}, "must tell its speed"),
        (Role.PREFILL, {"prefill_tokens_per_s": float("inf")}, "must tell its speed"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_reason(
    tmp_path: Path, role: Role, changes: dict[str, object], complaint: str
) -> None:
    async def work(cluster: Head) -> None:
        await cluster.new(Role.PREFILL).join(kernel="of this host")
        stranger = cluster.new(role)
        stranger.say(join_message(role, **changes))
        assert complaint in (await stranger.hears(m.Refusal)).reason
        assert len(cluster.coordinator.health()["engines"]) == 1  # type: ignore[arg-type]

    with_head(tmp_path, work)


def test_strange_messages_are_counted_and_do_no_harm(tmp_path: Path) -> None:
    async def work(cluster: Head) -> None:
        prefill = await cluster.new(Role.PREFILL).join()
        prefill.say(b"\xff not msgpack")
        cluster.new(Role.DECODE).say(m.Prepared(0, 0, [1]))  # never joined
        for message in (
            m.Prepared(7, 0, [1]),
            m.Loaded(7, 0, "pe"),  # type: ignore[arg-type]
            m.PrefillDone(7, 0, m.Draw(3)),
            m.Finished(7, 0, "stop"),
            m.Tokens([m.StepTokens(7, 0, m.Draw(3))]),
        ):
            prefill.say(message)
        prefill.say(m.Released(7, 0))
        prefill.say(m.BufferFreed(7, 0, 1))
        await cluster.becomes("dualpath_stale_messages_total", 5)
        await cluster.becomes('dualpath_scheduler_dropped_total{input="released"}', 1)
        await cluster.becomes('dualpath_scheduler_dropped_total{input="buffer_freed"}', 1)
        await cluster.becomes("dualpath_malformed_messages_total", 1)
        await cluster.becomes("dualpath_strange_messages_total", 1)

    with_head(tmp_path, work)


def test_each_prefill_engine_learns_of_each_decode_engine_whoever_joins_first(tmp_path: Path) -> None:
    async def work(cluster: Head) -> None:
        founder = await cluster.new(Role.PREFILL).join()
        left = await cluster.new(Role.DECODE).join(data_address="shm:/nowhere/left")
        stays = await cluster.new(Role.DECODE).join(data_address="shm:/nowhere/stays")
        left.say(m.Leave("terminated"))
        await founder.hears(m.PeerLost)
        late = await cluster.new(Role.PREFILL).join()
        await late.hears(m.PeerJoined)
        assert [peer.data_address for peer in founder.all(m.PeerJoined)] == ["shm:/nowhere/left", "shm:/nowhere/stays"]
        assert late.all(m.PeerJoined) == [m.PeerJoined(stays.engine, "shm:/nowhere/stays")]
        await stays.hears(m.PeerJoined, 2)
        assert [peer.engine for peer in stays.all(m.PeerJoined)] == [founder.engine, late.engine]

    with_head(tmp_path, work)


def test_a_silent_engine_is_killed_before_others_learn_that_it_is_lost(tmp_path: Path) -> None:
    async def work(cluster: Head) -> None:
        prefill = await cluster.new(Role.PREFILL).join(ticket="its own")
        decode = await cluster.new(Role.DECODE).join()
        while not decode.all(m.PeerLost):
            decode.beat()
            await asyncio.sleep(0.02)
        assert cluster.crew.killed == ["its own"]
        lost = decode.all(m.PeerLost)[0]
        assert (lost.engine, lost.data_address) == (prefill.engine, "shm:/nowhere/prefill")
        assert "no longer counted in" in (await prefill.hears(m.NotMember)).reason
        assert cluster.coordinator.membership.status == "unavailable"

    with_head(tmp_path, work, lease_ns=300_000_000, heartbeat_ns=20_000_000)


def test_an_engine_that_leaves_is_gone_at_once_and_not_killed(tmp_path: Path) -> None:
    async def work(cluster: Head) -> None:
        await cluster.new(Role.PREFILL).join()
        decode = await cluster.new(Role.DECODE).join()
        cluster.engines[0].say(m.Leave("terminated"))
        await decode.hears(m.PeerLost)
        assert cluster.crew.killed == []

    with_head(tmp_path, work, lease_ns=60_000_000_000)


def test_an_engine_that_can_not_start_ends_the_wait(tmp_path: Path) -> None:
    async def work(cluster: Head) -> None:
        await cluster.new(Role.PREFILL).join(ticket="its own")
        cluster.coordinator.membership.hopeless("decode-0 (pid 4711) ended")
        with pytest.raises(RuntimeError, match="not all engines are ready, and decode-0"):
            await cluster.coordinator.membership.complete(10.0)

    with_head(tmp_path, work)


def test_a_process_that_dies_is_no_member_any_more_and_the_wait_goes_on(tmp_path: Path) -> None:
    """Its supervisor starts another."""

    async def work(cluster: Head) -> None:
        membership = cluster.coordinator.membership
        await cluster.new(Role.PREFILL).join(ticket="first")
        membership.process_died("nobody's")
        assert membership.count(Role.PREFILL) == 1
        membership.process_died("first")
        assert membership.count(Role.PREFILL) == 0
        await cluster.new(Role.PREFILL).join(ticket="second")
        await cluster.new(Role.DECODE).join(ticket="third")
        await membership.complete(10.0)
        assert cluster.crew.members == ["first", "second", "third"]

    with_head(tmp_path, work)


def test_a_cluster_that_comes_back_is_content_with_an_engine_of_each_role(tmp_path: Path) -> None:
    async def work(cluster: Head) -> None:
        for role in Role:
            await cluster.new(role).join()
        await cluster.coordinator.membership.complete(10.0, enough_s=0.1)
        with pytest.raises(TimeoutError):
            await cluster.coordinator.membership.complete(0.1)

    with_head(tmp_path, work, topology=Topology(1, 2))


def test_that_nobody_is_left_to_serve_is_the_coordinators_end(tmp_path: Path) -> None:
    """While others serve, an engine that can't start is no reason to end."""

    async def run() -> None:
        with pytest.raises(AssertionError, match="nobody serves, and decode-0"):
            async with head(tmp_path) as cluster:
                for role in Role:
                    await cluster.new(role).join(ticket=role.value)
                coordinator = cluster.coordinator
                await coordinator.membership.complete(10.0)
                coordinator.membership.hopeless("decode-1 can't start")
                assert not coordinator.failure.done()
                coordinator.membership.process_died(Role.DECODE.value)
                coordinator.membership.hopeless("decode-0 can't start")

    asyncio.run(run())


def test_a_join_in_the_name_of_anothers_process_ends_nobody(tmp_path: Path) -> None:
    """A pid is anybody's to name, so it is only shown; what counts is the ticket that the supervisor has given."""

    async def work(cluster: Head) -> None:
        prefill = await cluster.new(Role.PREFILL).join(pid=1, ticket="forged")
        while not prefill.all(m.NotMember):
            await asyncio.sleep(0.02)
        assert cluster.crew.killed == ["forged"]

    with_head(tmp_path, work, lease_ns=300_000_000, heartbeat_ns=20_000_000)


def test_an_engine_is_retired_when_it_has_nothing_in_hand_and_is_not_counted_as_lost(tmp_path: Path) -> None:
    async def work(cluster: Head) -> None:
        coordinator = cluster.coordinator
        for role in Role:
            await cluster.new(role).join(ticket=role.value)
        assert "no member" in await coordinator.retire("nobody's")
        assert await coordinator.retire(Role.DECODE.value) == ""
        assert "another takes its place" in (await cluster.engines[1].hears(m.Shutdown)).reason
        coordinator.membership.process_died(Role.DECODE.value)
        assert coordinator.membership.lost_engines == 0

    with_head(tmp_path, work)


def test_who_is_missing_is_said(tmp_path: Path) -> None:
    async def work(cluster: Head) -> None:
        await cluster.new(Role.PREFILL).join()
        with pytest.raises(
            TimeoutError, match="1 prefill and 0 decode engines of 1P1D have joined; the logs of the others say"
        ):
            await cluster.coordinator.membership.complete(0.05)

    with_head(tmp_path, work)


def test_a_store_that_cannot_be_used_breaks_the_coordinator_at_once(tmp_path: Path) -> None:
    """Rather than leave whoever starts it waiting for engines."""
    (tmp_path / "file").write_text("no directory")

    async def run() -> None:
        with pytest.raises(AssertionError, match="cannot be opened"):
            async with head(tmp_path / "file") as cluster:
                cluster.new(Role.PREFILL).say(join_message(Role.PREFILL))
                await asyncio.wait([cluster.coordinator.failure], timeout=10.0)
                with pytest.raises(StoreError):
                    cluster.coordinator.failure.result()

    asyncio.run(run())


# ── leases ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Watched(Membership):
    """Membership on a clock of the test's: `late_s` is how long each turn of the watch is held up."""

    def __init__(self, links: EngineLinks, **settings: object) -> None:
        from dualpath.cluster.config import ClusterConfig

        config = ClusterConfig(model="m", store="s", lease_ns=1_000_000_000, heartbeat_ns=100_000_000)
        super().__init__(config, links, None, None)  # type: ignore[arg-type]
        self.lost_at: list[float] = []


def test_a_held_up_coordinator_gives_engines_the_time_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is silent while we don't listen; but being late all the time must not keep a dead engine in."""
    clock_ns = 10**9
    lost: list[float] = []

    async def run(late_s: list[float]) -> None:
        nonlocal clock_ns
        links = EngineLinks(ClusterSecret.random())
        link = links.expect(b"one", join_message(Role.DECODE))
        link.last_heard_ns = clock_ns
        watched = Watched(links)

        def lose(gone: object, why: str) -> None:
            lost.append(clock_ns / 1e9)
            links.forget(link)

        monkeypatch.setattr(watched, "lost", lose)

        async def sleep(seconds: float) -> None:
            nonlocal clock_ns
            if not late_s:
                raise asyncio.CancelledError
            clock_ns += round((seconds + late_s.pop(0)) * 1e9)

        monkeypatch.setattr("dualpath.cluster.coordinator.membership.asyncio.sleep", sleep)
        monkeypatch.setattr(time, "monotonic_ns", lambda: clock_ns)
        try:
            await watched.watch_leases()
        except asyncio.CancelledError:
            links.close()

    asyncio.run(run([30.0, *[0.0] * 8]))
    assert lost == []  # silent for 0.9 s, apart from the 30 s that we did not listen
    asyncio.run(run([30.0, *[0.0] * 12]))
    assert len(lost) == 1
    asyncio.run(run([0.3] * 12))
    assert len(lost) == 2  # always late, and yet it noticed
