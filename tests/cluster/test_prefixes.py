"""What the coordinator knows of storage: publishing, quota, faults, tenants, and disks that refuse."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from dualpath.cluster.coordinator.prefixes import Prefixes
from dualpath.cluster.messages import BlockFaultReport, StoredBlock
from dualpath.kv import BlockKey, KVLayout, KVPart, PosixStore, StoreError, block_keys
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> bool:
        raise StoreError("read-only file system")

    async def work(storage: Storage) -> None:
        keys = storage.store(prompt(1, 2))
        monkeypatch.setattr(PosixStore, "quarantine", refuse)
        storage.prefixes.report_faults([BlockFaultReport(keys[1], "io")])
        await storage.prefixes.settle()
        assert storage.gauge("file_errors_total") == 1
        assert "read-only file system" in capsys.readouterr().err

    with_storage(tmp_path, work)


def test_a_tenant_whose_directory_cannot_be_opened_matches_nothing(tmp_path: Path) -> None:
    async def work(storage: Storage) -> None:
        space = storage.prefixes.namespace_of("unlucky")
        (tmp_path / space.hex).write_text("not a directory")
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
