"""What the coordinator knows of storage: publishing, quota, faults, tenants, and disks that refuse."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from dualpath.cluster.coordinator.prefixes import ABSENT_S, MAX_ABSENT, MAX_LOOKS, Prefixes
from dualpath.cluster.messages import BlockFaultReport, StoredBlock
from dualpath.kv import BlockKey, BlockRecord, KVLayout, KVPart, PosixStore, StoreError, block_keys, namespace
from dualpath.kv.stores.block_file import PAGE_BYTES

LAYOUT = KVLayout(layers=2, parts=(KVPart("kv", 1, 4),), dtype="float32")


class Storage:
    """A store as engines see it beside `Prefixes`."""

    def __init__(self, where: Path, quota_bytes: int | None = None) -> None:
        self.prefixes = Prefixes(str(where), LAYOUT, "model", "", quota_bytes)
        self.where = where
        self.block_bytes = 0

    def store(self, token_ids: list[int], tenant: str = "") -> list[BlockKey]:
        """Write all blocks of a prompt as a decode engine does, and publish each."""
        space = self.prefixes.namespace_of(tenant)
        files = PosixStore(self.where, durable=False)
        keys = block_keys(space.root, token_ids)
        for parent, key in zip([space.root, *keys], keys, strict=False):
            self.block_bytes = files.write(space, key, parent, bytes(LAYOUT.full_block_bytes))
            self.prefixes.publish([StoredBlock(key, parent, self.block_bytes)])
        return keys

    def damage(self, key: BlockKey) -> None:
        (path,) = self.where.rglob(f"{key.hex()}.kv")
        with path.open("r+b") as file:
            file.seek(PAGE_BYTES)
            file.write(b"wrong")

    def files(self) -> set[str]:
        return {path.stem for path in self.where.rglob("*.kv")}

    def gauge(self, name: str) -> float:
        return self.prefixes.gauges()[f"dualpath_store_{name}"]


def with_storage(where: Path, work: Callable[[Storage], Awaitable[None]], quota_bytes: int | None = None) -> None:
    async def run() -> None:
        storage = Storage(where, quota_bytes)
        await storage.prefixes.load()
        await storage.prefixes.open("")
        try:
            await work(storage)
            await storage.prefixes.settle()
            assert storage.gauge("file_jobs_waiting") == 0
        finally:
            storage.prefixes.close()

    asyncio.run(run())


class Neighbour:
    """Another cluster's engines on the same store: they write, and tell this one nothing."""

    def __init__(self, storage: Storage) -> None:
        self.space = storage.prefixes.namespace_of("")
        self.files = PosixStore(storage.where, durable=False)

    def store(self, token_ids: list[int]) -> list[BlockKey]:
        keys = block_keys(self.space.root, token_ids)
        for parent, key in zip([self.space.root, *keys], keys, strict=False):
            self.files.write(self.space, key, parent, bytes(LAYOUT.full_block_bytes))
        return keys


def prompt(agent: int, blocks: int) -> list[int]:
    return [agent] * (64 * blocks)


def test_a_quota_smaller_than_one_chain(tmp_path: Path) -> None:
    """Every block leaves again as it comes, file and all, and nothing is left that nobody counts."""

    async def work(storage: Storage) -> None:
        storage.store(prompt(1, 5))
        await storage.prefixes.settle()
        assert storage.files() == set()
        assert storage.gauge("stored_bytes") == 0

    with_storage(tmp_path, work, quota_bytes=100)


def test_eviction_spares_what_a_request_is_about_to_read(tmp_path: Path) -> None:
    async def work(storage: Storage) -> None:
        pinned = storage.store(prompt(1, 3))
        assert storage.prefixes.match_and_pin(7, pinned, 2) == 2
        for agent in range(2, 8):
            storage.store(prompt(agent, 3))
        await storage.prefixes.settle()
        assert {key.hex() for key in pinned[:2]} <= storage.files()
        assert storage.gauge("stored_bytes") <= 4 * storage.block_bytes
        storage.prefixes.unpin(7)
        storage.store(prompt(9, 4))
        await storage.prefixes.settle()
        assert not {key.hex() for key in pinned} & storage.files()

    with_storage(tmp_path, work, quota_bytes=4 * 8192)


def test_the_quota_holds_for_what_a_restart_finds(tmp_path: Path) -> None:
    async def fill(storage: Storage) -> None:
        storage.store(prompt(1, 6))
        storage.store(prompt(2, 6), tenant="other")

    async def smaller(storage: Storage) -> None:
        await storage.prefixes.settle()
        assert 0 < len(storage.files()) <= 5
        assert storage.gauge("blocks") == len(storage.files())

    async def fill_two_tenants(storage: Storage) -> None:
        await storage.prefixes.open("other")
        await fill(storage)

    with_storage(tmp_path, fill_two_tenants)
    with_storage(tmp_path, smaller, quota_bytes=5 * 8192)


def test_a_block_whose_parent_has_gone_is_deleted(tmp_path: Path) -> None:
    async def work(storage: Storage) -> None:
        space = storage.prefixes.namespace_of("")
        keys = block_keys(space.root, prompt(1, 2))
        files = PosixStore(tmp_path, durable=False)
        n_bytes = files.write(space, keys[1], keys[0], bytes(LAYOUT.full_block_bytes))
        storage.prefixes.publish([StoredBlock(keys[1], keys[0], n_bytes)])
        await storage.prefixes.settle()
        assert storage.files() == set()

    with_storage(tmp_path, work)


def test_a_fault_reported_twice_sets_one_file_aside(tmp_path: Path) -> None:
    """Two requests may find it at once. What builds on it is deleted, what lies before it stays."""

    async def work(storage: Storage) -> None:
        keys = storage.store(prompt(1, 3))
        storage.damage(keys[1])
        for _ in range(2):
            storage.prefixes.report_faults([BlockFaultReport(keys[1], "checksum")])
        await storage.prefixes.settle()
        assert storage.files() == {keys[0].hex()}
        assert [path.name for path in tmp_path.rglob("bad/*")] == [f"{keys[1].hex()}.checksum"]
        assert storage.gauge('faults_total{cause="checksum"}') == 2
        assert storage.gauge("file_errors_total") == 0

    with_storage(tmp_path, work)


def test_a_block_stored_anew_survives_the_fault_before_it(tmp_path: Path) -> None:
    """File work lags behind: by its turn the block may have been recomputed, verified and published again."""

    async def work(storage: Storage) -> None:
        keys = storage.store(prompt(1, 2))
        storage.prefixes._files.submit(time.sleep, 0.1)  # the disk is busy
        storage.prefixes.report_faults([BlockFaultReport(keys[0], "checksum")])
        storage.store(prompt(1, 2))
        await storage.prefixes.settle()
        assert storage.files() == {key.hex() for key in keys}
        assert storage.prefixes.match_and_pin(1, keys, 9) == 2
        storage.prefixes.unpin(1)

    with_storage(tmp_path, work)


def test_file_work_that_fails_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> bool:
        raise StoreError("read-only file system")

    async def work(storage: Storage) -> None:
        keys = storage.store(prompt(1, 2))
        monkeypatch.setattr(PosixStore, "quarantine", refuse)
        storage.prefixes.report_faults([BlockFaultReport(keys[1], "io")])
        await storage.prefixes.settle()
        assert storage.gauge("file_errors_total") == 1
        assert "read-only file system" in caplog.text

    with_storage(tmp_path, work)


def test_a_tenant_whose_directory_cannot_be_opened_matches_nothing(tmp_path: Path) -> None:
    async def work(storage: Storage) -> None:
        space = storage.prefixes.namespace_of("unlucky")
        tmp_path.rename(tmp_path.with_name("elsewhere"))
        tmp_path.write_text("not a directory")
        opened = await asyncio.gather(*(storage.prefixes.open("unlucky") for _ in range(3)))
        assert opened == [space] * 3
        assert storage.prefixes.match_and_pin(1, storage.prefixes.keys(space, prompt(1, 2)), 2) == 0
        assert storage.gauge("file_errors_total") == 1  # they asked together
        storage.prefixes.unpin(1)

    with_storage(tmp_path, work)


def test_a_store_that_cannot_be_opened_is_an_error_at_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")

    async def unreachable(_: Storage) -> None:
        raise AssertionError("loaded")

    with pytest.raises(StoreError, match="cannot be opened"):
        with_storage(tmp_path / "file", unreachable)


def test_a_look_finds_what_a_neighbour_has_written(tmp_path: Path) -> None:
    async def work(storage: Storage) -> None:
        neighbour = Neighbour(storage)
        storage.store(prompt(1, 2))
        keys = neighbour.store(prompt(1, 5))
        await storage.prefixes.look_beyond(neighbour.space, keys)
        assert storage.prefixes.match_and_pin(1, keys, 9) == 5
        storage.prefixes.unpin(1)
        await storage.prefixes.look_beyond(neighbour.space, keys)
        assert (storage.gauge("looks_total"), storage.gauge("found_blocks_total")) == (1, 3)
        assert storage.gauge("blocks") == len(storage.files()) == 5

    with_storage(tmp_path, work)


def test_new_tokens_are_looked_for_once_in_a_while(tmp_path: Path) -> None:
    async def work(storage: Storage) -> None:
        now = 0.0
        storage.prefixes._clock = lambda: now
        neighbour = Neighbour(storage)
        keys = block_keys(neighbour.space.root, prompt(1, 3))
        for _ in range(3):
            await storage.prefixes.look_beyond(neighbour.space, keys)
        assert storage.gauge("looks_total") == 1
        neighbour.store(prompt(1, 2))
        now = ABSENT_S
        await storage.prefixes.look_beyond(neighbour.space, keys)
        assert storage.prefixes.match_and_pin(1, keys, 9) == 2
        storage.prefixes.unpin(1)
        await storage.prefixes.look_beyond(neighbour.space, keys)
        assert storage.gauge("looks_total") == 2, "that the third is not there was seen as well"
        for agent in range(2, MAX_ABSENT + 10):
            await storage.prefixes.look_beyond(neighbour.space, [agent.to_bytes(16, "big")])
        assert len(storage.prefixes._absent_until) == MAX_ABSENT

    with_storage(tmp_path, work)


def test_a_slow_store_keeps_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request goes on without, and what is found later is published then; all looks busy: it does not even ask."""
    monkeypatch.setattr("dualpath.cluster.coordinator.prefixes.LOOK_S", 0.0)
    answering = threading.Event()
    genuine = PosixStore.find

    def slow(*asked: object) -> list[BlockRecord]:
        assert answering.wait(60)
        return genuine(*asked)  # type: ignore[arg-type]

    async def work(storage: Storage) -> None:
        neighbour = Neighbour(storage)
        keys = neighbour.store(prompt(1, 2))
        monkeypatch.setattr(PosixStore, "find", slow)
        await storage.prefixes.look_beyond(neighbour.space, keys)
        assert storage.prefixes.match_and_pin(1, keys, 9) == 0
        for agent in range(2, 9):
            others = block_keys(neighbour.space.root, prompt(agent, 2))
            for _ in range(2):
                await storage.prefixes.look_beyond(neighbour.space, others)
        assert storage.gauge("looks_total") == MAX_LOOKS
        looks = list(storage.prefixes._looks.values())
        answering.set()
        await asyncio.wait(looks)
        assert storage.prefixes.match_and_pin(1, keys, 9) == 2
        storage.prefixes.unpin(1)

    with_storage(tmp_path, work)


def test_a_store_that_does_not_answer_is_left_alone_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(*_: object) -> list[BlockRecord]:
        raise StoreError("no route to host")

    async def work(storage: Storage) -> None:
        now = 0.0
        storage.prefixes._clock = lambda: now
        monkeypatch.setattr(PosixStore, "find", away)
        space = storage.prefixes.namespace_of("")
        for agent in range(5):
            await storage.prefixes.look_beyond(space, block_keys(space.root, prompt(agent, 1)))
        assert (storage.gauge("looks_total"), storage.gauge("file_errors_total")) == (1, 1)
        now = ABSENT_S
        await storage.prefixes.look_beyond(space, block_keys(space.root, prompt(1, 1)))
        assert storage.gauge("looks_total") == 2
        assert "no route to host" in caplog.text

    with_storage(tmp_path, work)


def test_what_hangs_from_a_block_that_a_neighbour_has_written_anew_stays(tmp_path: Path) -> None:
    async def work(storage: Storage) -> None:
        keys = storage.store(prompt(1, 3))
        storage.damage(keys[0])
        storage.prefixes._files.submit(time.sleep, 0.1)  # the disk is busy
        storage.prefixes.report_faults([BlockFaultReport(keys[0], "checksum")])
        neighbour = Neighbour(storage)
        neighbour.store(prompt(1, 1))
        await storage.prefixes.settle()
        assert storage.files() == {key.hex() for key in keys}
        await storage.prefixes.look_beyond(neighbour.space, keys)
        assert storage.prefixes.match_and_pin(1, keys, 9) == 3
        storage.prefixes.unpin(1)

    with_storage(tmp_path, work)


def test_the_quota_counts_blocks_of_other_models_and_evicts_them_first(tmp_path: Path) -> None:
    """As after a change of dtype: they can't be matched, and go before the store outgrows its quota."""
    other = namespace("model", "", msgspec.structs.replace(LAYOUT, dtype="bfloat16"))
    old = block_keys(other.root, prompt(1, 3))
    files = PosixStore(tmp_path, durable=False)
    for parent, key in zip([other.root, *old], old, strict=False):
        files.write(other, key, parent, bytes(other.layout.full_block_bytes))
    old_bytes = sum(record.physical_bytes for record in files.scan())

    async def work(storage: Storage) -> None:
        assert storage.gauge("stored_bytes") == old_bytes
        keys = storage.store(prompt(1, 2))
        await storage.prefixes.settle()
        assert storage.files() == {key.hex() for key in [*old[:1], *keys]}, "the oldest chain goes from its tip"
        storage.store(prompt(2, 1))
        await storage.prefixes.settle()
        assert not {key.hex() for key in old} & storage.files()
        assert storage.gauge("stored_bytes") == sum(record.physical_bytes for record in files.scan())

    with_storage(tmp_path, work, quota_bytes=3 * 8192)
