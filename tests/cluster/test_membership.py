"""Who belongs to a cluster: joining in any order, refusals, leases, losses. The test speaks for the engines."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from dualpath.cluster import messages as m
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
        while not dead.all(m.Shutdown):  # until its lease is over
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
        (Role.PREFILL, {"buffer_blocks": 0}, "hold no Full Block"),
        (Role.PREFILL, {"prefill_tokens_per_s": None}, "must tell its speed"),
        (Role.PREFILL, {"prefill_tokens_per_s": float("inf")}, "must tell its speed"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_reason(
    tmp_path: Path, role: Role, changes: dict[str, object], complaint: str
) -> None:
    async def work(cluster: Head) -> None:
        await cluster.new(Role.PREFILL).join()
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
        assert not stays.all(m.PeerJoined)

    with_head(tmp_path, work)


def test_a_silent_engine_is_killed_before_others_learn_that_it_is_lost(tmp_path: Path) -> None:
    async def work(cluster: Head) -> None:
        prefill = await cluster.new(Role.PREFILL).join(pid=4711)
        decode = await cluster.new(Role.DECODE).join()
        while not decode.all(m.PeerLost):
            decode.beat()
            await asyncio.sleep(0.02)
        assert cluster.killed == [4711]
        lost = decode.all(m.PeerLost)[0]
        assert (lost.engine, lost.data_address) == (prefill.engine, "shm:/nowhere/prefill")
        assert "no longer counted in" in (await prefill.hears(m.Shutdown)).reason
        assert cluster.coordinator.membership.status == "unavailable"

    with_head(tmp_path, work, lease_ns=300_000_000, heartbeat_ns=20_000_000)


def test_an_engine_that_leaves_is_gone_at_once_and_not_killed(tmp_path: Path) -> None:
    async def work(cluster: Head) -> None:
        await cluster.new(Role.PREFILL).join()
        decode = await cluster.new(Role.DECODE).join()
        cluster.engines[0].say(m.Leave("terminated"))
        await decode.hears(m.PeerLost)
        assert cluster.killed == []

    with_head(tmp_path, work, lease_ns=60_000_000_000)


def test_a_process_that_dies_before_the_cluster_is_complete_ends_the_wait(tmp_path: Path) -> None:
    async def work(cluster: Head) -> None:
        await cluster.new(Role.PREFILL).join(pid=4711)
        cluster.coordinator.membership.process_died(4711, "prefill-0 (pid 4711) ended")
        with pytest.raises(RuntimeError, match="prefill-0"):
            await cluster.coordinator.membership.complete(10.0)

    with_head(tmp_path, work)


def test_who_is_missing_is_said(tmp_path: Path) -> None:
    async def work(cluster: Head) -> None:
        await cluster.new(Role.PREFILL).join()
        with pytest.raises(TimeoutError, match="1 prefill and 0 decode engines of 1P1D"):
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
        links = EngineLinks()
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
