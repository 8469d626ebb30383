"""KV events as a router gets them: this subscriber knows only what vLLM documents of the format."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from dualpath.cli.cluster_options import kv_events
from dualpath.cluster.config import KVEventsConfig
from dualpath.cluster.coordinator import kv_events as published
from dualpath.cluster.coordinator.kv_events import MAX_EXPECTED_BLOCKS, KVEvents
from dualpath.cluster.coordinator.prefixes import Prefixes
from dualpath.cluster.messages import BlockFaultReport, StoredBlock
from dualpath.kv.keys import block_keys

from .fake_engine import LAYOUT

TOKENS = list(range(300, 500))


class Stored(msgspec.Struct, tag="BlockStored"):
    """The fields of vLLM that have no default, so a subscriber may count on them."""

    block_hashes: list[bytes | int]
    parent_block_hash: bytes | int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None


class Removed(msgspec.Struct, tag="BlockRemoved"):
    block_hashes: list[bytes | int]
    medium: str | None


class Cleared(msgspec.Struct, tag="AllBlocksCleared"):
    pass


class Batch(msgspec.Struct, array_like=True):
    ts: float
    events: list[Stored | Removed | Cleared]
    data_parallel_rank: int | None = None


batches = msgspec.msgpack.Decoder(Batch)


class Router:
    """A subscriber. `seen` is what it has got: sequence numbers and batches."""

    def __init__(self, config: KVEventsConfig) -> None:
        self._context = zmq.asyncio.Context()
        self.socket = self._context.socket(zmq.SUB)
        self.socket.subscribe(config.topic)
        self.socket.connect(config.endpoint)
        assert config.replay_endpoint is not None
        self._replays_at = config.replay_endpoint

    async def next(self) -> tuple[bytes, int, Batch]:
        async with asyncio.timeout(10):
            topic, number, payload = await self.socket.recv_multipart()
        return topic, int.from_bytes(number, "big"), batches.decode(payload)

    async def missed(self, first: int) -> list[tuple[int, Batch]]:
        """Asks for everything from a number on, and reads until the end is said."""
        dealer = self._context.socket(zmq.DEALER)
        dealer.connect(self._replays_at)
        await dealer.send_multipart([b"", first.to_bytes(8, "big")])
        got = []
        try:
            async with asyncio.timeout(10):
                while (answer := await dealer.recv_multipart())[1:] != [b"\xff" * 8, b""]:
                    got.append((int.from_bytes(answer[1], "big"), batches.decode(answer[2])))
        finally:
            dealer.close(0)
        return got

    def close(self) -> None:
        self.socket.close(0)
        self._context.term()


@contextlib.asynccontextmanager
async def announced(where: Path, **settings: Any) -> AsyncIterator[tuple[Prefixes, KVEvents, Router]]:
    config = KVEventsConfig(
        enable_kv_cache_events=True,
        endpoint=f"ipc://{where}/events",
        replay_endpoint=f"ipc://{where}/replay",
        topic="kv@here@tiny",
        **settings,
    )
    events = KVEvents(config)
    quota_bytes = 3000
    prefixes = Prefixes(str(where / "kv"), LAYOUT, "model", "", quota_bytes, events)
    await prefixes.load()
    router = Router(config)
    # A subscription takes a moment to arrive; the first batch that does shows that it has.
    while not await router.socket.poll(10):
        events.cleared()
    await asyncio.sleep(0.05)
    while await router.socket.poll(0):
        await router.next()
    try:
        yield prefixes, events, router
    finally:
        router.close()
        prefixes.close()
        await events.close()


async def store(prefixes: Prefixes, tokens: list[int], tenant: str = "", physical_bytes: int = 1000) -> list[int]:
    """What a request for `tokens` and a decode engine do. Returns the last 8 bytes of each block's key."""
    space = prefixes.namespace_of(tenant)
    keys = prefixes.keys(space, tokens)
    parents = [space.root, *keys]
    prefixes.publish(
        [
            StoredBlock(space.root, key, parent, physical_bytes, space.salted)
            for key, parent in zip(keys, parents, strict=False)
        ]
    )
    return [int.from_bytes(key[8:], "big") for key in keys]


def test_a_prompts_blocks_are_announced_with_their_tokens_and_parents(short_tmp_path: Path) -> None:
    async def run() -> None:
        async with announced(short_tmp_path) as (prefixes, _, router):
            first, second, third = await store(prefixes, TOKENS)
            topic, number, batch = await router.next()
            assert (topic, batch.data_parallel_rank) == (b"kv@here@tiny", 0)
            assert batch.events == [
                Stored([first], None, TOKENS[:64], 64, None, "STORAGE", None),
                Stored([second], first, TOKENS[64:128], 64, None, "STORAGE", None),
                Stored([third], second, TOKENS[128:192], 64, None, "STORAGE", None),
            ]
            await store(prefixes, TOKENS)  # nothing new
            await store(prefixes, TOKENS, tenant="their own", physical_bytes=0)
            other = await store(prefixes, [1] * 64, physical_bytes=0)
            _, then, batch = await router.next()
            assert then == number + 1
            assert [event.block_hashes for event in batch.events] == [other]

    asyncio.run(run())


def test_generated_blocks_bring_their_own_tokens(short_tmp_path: Path) -> None:
    async def run() -> None:
        async with announced(short_tmp_path) as (prefixes, _, router):
            (prompt,) = await store(prefixes, TOKENS[:64])
            await router.next()
            space = prefixes.namespace_of("")
            parent, key = block_keys(space.root, TOKENS[:128])
            prefixes.publish([StoredBlock(space.root, key, parent, 1000, False, TOKENS[64:128])])
            _, _, batch = await router.next()
            (event,) = batch.events
            assert isinstance(event, Stored)
            assert (event.parent_block_hash, event.token_ids) == (prompt, TOKENS[64:128])

    asyncio.run(run())


def test_what_leaves_storage_is_announced_too(short_tmp_path: Path) -> None:
    async def run() -> None:
        async with announced(short_tmp_path) as (prefixes, events, router):
            hashes = await store(prefixes, TOKENS)
            await router.next()
            newer = await store(prefixes, [1] * 64)  # one too many for the quota of 3000 bytes
            await router.next()
            _, _, evicted = await router.next()
            assert evicted.events == [Removed([hashes[2]], "STORAGE")]
            key = prefixes.keys(prefixes.namespace_of(""), TOKENS)[0]
            prefixes.report_faults([BlockFaultReport(key=key, fault="checksum")])
            _, _, dropped = await router.next()
            (event,) = dropped.events
            assert isinstance(event, Removed) and set(event.block_hashes) == set(hashes[:2])
            events.cleared()
            assert (await router.next())[2].events == [Cleared()]
            assert newer

    asyncio.run(run())


def test_kv_that_is_not_matched_any_more_is_cleared(short_tmp_path: Path) -> None:
    """The cache is reset, or other weights are served: the same prompt is stored again under another hash."""

    async def run() -> None:
        async with announced(short_tmp_path) as (prefixes, _, router):
            before = await store(prefixes, TOKENS[:64], physical_bytes=1)
            await router.next()
            for change in (prefixes.forget, lambda: prefixes.serve_weights("other")):
                change()
                assert (await router.next())[2].events == [Cleared()]
                after = await store(prefixes, TOKENS[:64], physical_bytes=1)
                (event,) = (await router.next())[2].events
                assert isinstance(event, Stored) and event.block_hashes == after != before
                before = after

    asyncio.run(run())


def test_a_subscriber_gets_again_what_it_has_missed(short_tmp_path: Path) -> None:
    async def run() -> None:
        async with announced(short_tmp_path, buffer_steps=3) as (prefixes, _, router):
            for token in range(4):
                await store(prefixes, [token] * 64, physical_bytes=1)
            live = [(await router.next())[1:] for _ in range(4)]
            assert await router.missed(live[2][0]) == live[2:]
            assert await router.missed(0) == live[1:]  # the first is beyond the bound
            assert await router.missed(live[3][0] + 1) == []

    asyncio.run(run())


def test_a_subscriber_that_never_reads_holds_up_nothing(short_tmp_path: Path) -> None:
    async def run() -> None:
        async with announced(short_tmp_path, hwm=1, buffer_steps=10) as (prefixes, events, router):
            for token in range(20_000):
                events.removed([token.to_bytes(16, "big")])
            assert events.published_events >= 20_000
            (again,) = await store(prefixes, TOKENS[:64])
            assert (await router.missed(0))[-1][1].events[0].block_hashes == [again]  # type: ignore[union-attr]

    asyncio.run(run())


def test_requests_for_a_replay_that_are_none_are_ignored(short_tmp_path: Path) -> None:
    async def run() -> None:
        async with announced(short_tmp_path) as (_, _, router):
            stray = router._context.socket(zmq.DEALER)
            stray.connect(f"ipc://{short_tmp_path}/replay")
            for frames in ([b"x"], [b"", b""], [b"", b"1" * 9], [b"", b"a", b"b"]):
                await stray.send_multipart(frames)
            stray.close(100)
            assert await router.missed(10**9) == []

    asyncio.run(run())


def test_tokens_that_wait_for_their_block_are_bounded() -> None:
    async def run() -> None:
        events = KVEvents(KVEventsConfig(enable_kv_cache_events=True, endpoint="inproc://bounded"))
        space = Prefixes("kv", LAYOUT, "model", "", None).namespace_of("")
        keys = [i.to_bytes(16, "big") for i in range(MAX_EXPECTED_BLOCKS + 5)]
        events.expect(space, keys, [], 0)
        assert len(events._expected) == MAX_EXPECTED_BLOCKS
        await events.close()

    asyncio.run(run())


def test_an_address_that_can_not_be_is_named() -> None:
    async def run() -> None:
        for settings in ({"endpoint": "nonsense"}, {"endpoint": "inproc://named", "replay_endpoint": "nonsense"}):
            with pytest.raises(OSError, match=r"--kv-events-config: can't use 'nonsense'.*try tcp://\*:5557"):
                KVEvents(KVEventsConfig(enable_kv_cache_events=True, **settings))

    asyncio.run(run())


def test_the_option_is_vllms() -> None:
    given = kv_events('{"enable_kv_cache_events": true, "publisher": "zmq", "topic": "kv-events", "hwm": 9}')
    assert given.enabled and (given.endpoint, given.topic, given.hwm) == (None, "kv-events", 9)
    assert not kv_events("{}").enabled
    assert not kv_events('{"enable_kv_cache_events": true, "publisher": "null"}').enabled
    for text in ("tcp://*:1", '{"endpont": "x"}', '{"buffer_steps": 0}', '{"publisher": "kafka"}'):
        with pytest.raises(Exception, match="give JSON such as"):
            kv_events(text)


def test_without_an_endpoint_only_this_host_can_subscribe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events have prompts' tokens, and nobody who subscribes shows a key."""
    assert published.LOOPBACK == "tcp://127.0.0.1:5557"
    monkeypatch.setattr(published, "LOOPBACK", "tcp://127.0.0.1:*")

    async def run() -> None:
        events = KVEvents(KVEventsConfig(enable_kv_cache_events=True))
        assert events._publisher.getsockopt(zmq.LAST_ENDPOINT).startswith(b"tcp://127.0.0.1:")
        await events.close()

    asyncio.run(run())
