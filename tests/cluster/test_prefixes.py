"""What the coordinator knows of storage: publishing, quota, faults, tenants, and disks that refuse."""

import asyncio
import gc
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from dualpath.cluster.coordinator import file_work, lookout, prefixes
from dualpath.cluster.coordinator.lookout import ABSENT_S, MAX_ABSENT, MAX_LOOKS
from dualpath.cluster.coordinator.prefixes import UNAVAILABLE_S, Prefixes
from dualpath.cluster.coordinator.recount import PAUSE_S
from dualpath.cluster.messages import BlockFaultReport, StoredBlock
from dualpath.cluster.store_standing import QUICK_S, REFUSED_AWAY_S
from dualpath.kv import (
    BlockKey,
    BlockRecord,
    GoneBlock,
    KVLayout,
    KVPart,
    PosixStore,
    StoreError,
    block_keys,
    namespace,
)
from dualpath.kv.stores.block_file import PAGE_BYTES

from .faulty_store import Faults, FaultyStore

LAYOUT = KVLayout.alike(layers=2, parts=(KVPart("kv", 1, 4),), dtype="float32")


TIMEOUT_S = 0.1
"""Of the store, by `Storage.now_s`; threads look at it every few milliseconds."""
WAIT_S = 20.0


class Storage:
    """A store as engines see it beside `Prefixes`."""

    def __init__(self, where: Path, quota_bytes: int | None = None, file_lanes: int = 1) -> None:
        self.now_s = 0.0
        self.faults: Faults = {}
        self.faulty = FaultyStore(PosixStore(where, durable=False), lambda: self.faults)
        self.prefixes = Prefixes(
            str(where),
            LAYOUT,
            "model",
            "",
            quota_bytes,
            clock=lambda: self.now_s,
            timeout_s=TIMEOUT_S,
            store=self.faulty,
            file_lanes=file_lanes,
        )
        self.where = where
        self.block_bytes = 0

    def store(self, token_ids: list[int], tenant: str = "") -> list[BlockKey]:
        """Write all blocks of a prompt as a decode engine does, and publish each."""
        space = self.prefixes.namespace_of(tenant)
        files = PosixStore(self.where, durable=False)
        keys = block_keys(space.root, token_ids)
        for parent, key in zip([space.root, *keys], keys, strict=False):
            self.block_bytes = files.write(space, key, parent, bytes(LAYOUT.full_block_bytes))
            self.prefixes.publish([StoredBlock(space.root, key, parent, self.block_bytes)])
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

    async def becomes(self, name: str, value: float) -> None:
        async with asyncio.timeout(WAIT_S):
            while self.gauge(name) != value:
                await asyncio.sleep(0.002)

    async def give_up(self, work: str, n: int) -> None:
        """Let the deadline pass for `n` more calls that hang."""
        late = self.gauge(f'io_late_total{{work="{work}"}}') + n
        await self.becomes(f'io_running{{work="{work}"}}', self.gauge(f'io_hung{{work="{work}"}}') + n)
        self.now_s += TIMEOUT_S
        await self.becomes(f'io_late_total{{work="{work}"}}', late)
        await asyncio.sleep(0.01)  # what follows from it


def with_storage(
    where: Path, work: Callable[[Storage], Awaitable[None]], quota_bytes: int | None = None, file_lanes: int = 1
) -> None:
    async def run() -> None:
        storage = Storage(where, quota_bytes, file_lanes)
        await storage.prefixes.load()
        try:
            await work(storage)
            await storage.prefixes.settle()
            assert storage.gauge("file_jobs_waiting") == 0
        finally:
            storage.faults = {}
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
        await fill(storage)

    with_storage(tmp_path, fill_two_tenants)
    with_storage(tmp_path, smaller, quota_bytes=5 * 8192)


def test_a_block_whose_parent_has_gone_is_deleted(tmp_path: Path) -> None:
    async def work(storage: Storage) -> None:
        space = storage.prefixes.namespace_of("")
        keys = block_keys(space.root, prompt(1, 2))
        files = PosixStore(tmp_path, durable=False)
        n_bytes = files.write(space, keys[1], keys[0], bytes(LAYOUT.full_block_bytes))
        storage.prefixes.publish([StoredBlock(space.root, keys[1], keys[0], n_bytes)])
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
        storage.prefixes._files.threads.submit(lambda _: time.sleep(0.1))  # the disk is busy
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
        monkeypatch.setattr(FaultyStore, "quarantine", refuse)
        storage.prefixes.report_faults([BlockFaultReport(keys[1], "checksum")])
        await storage.prefixes.settle()
        assert storage.gauge("file_errors_total") == 1
        assert "read-only file system" in caplog.text

    with_storage(tmp_path, work)


def refuse(*_: object) -> bool:
    raise StoreError("the server did not answer a moment ago")


def test_deletions_that_a_troubled_store_refuses_are_done_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(storage: Storage) -> None:
        with monkeypatch.context() as trouble:
            trouble.setattr(FaultyStore, "delete", refuse)
            for seed in range(6):
                storage.store(prompt(seed, 2))
            await storage.prefixes.settle()
            assert storage.gauge("blocks") == 4 and len(storage.files()) == 12
        storage.store(prompt(7, 2))
        await storage.prefixes.settle()
        assert storage.gauge("blocks") == len(storage.files()) == 4
        assert storage.gauge("file_errors_total") == 8 and storage.gauge("file_jobs_waiting") == 0

    with_storage(tmp_path, work, quota_bytes=4 * 8192)


def test_what_can_never_be_deleted_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    delete = FaultyStore.delete

    async def work(storage: Storage) -> None:
        bad, *_ = storage.store(prompt(1, 1))

        def refuse(self: FaultyStore, root: BlockKey, key: BlockKey) -> bool:
            if key == bad:
                raise StoreError("a folder is in its place")
            return delete(self, root, key)

        monkeypatch.setattr(FaultyStore, "delete", refuse)
        for seed in range(2, 20):
            storage.store(prompt(seed, 1))
            await storage.prefixes.settle()
        assert storage.gauge("file_errors_total") == file_work.TRIES and storage.gauge("file_jobs_waiting") == 0

    with_storage(tmp_path, work, quota_bytes=8192)


def test_deletions_do_not_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server may take long for each: several are under way at the same time."""
    together = threading.Barrier(file_work.LANES)
    delete = FaultyStore.delete

    def slow(self: FaultyStore, root: BlockKey, key: BlockKey) -> bool:
        together.wait(WAIT_S)
        return delete(self, root, key)

    async def work(storage: Storage) -> None:
        monkeypatch.setattr(FaultyStore, "delete", slow)
        gone = [GoneBlock(bytes(32), bytes([lane]) * 32, bytes(32)) for lane in range(file_work.LANES)]
        storage.prefixes._files.delete(gone)
        await storage.prefixes.settle()
        assert storage.gauge("file_errors_total") == 0

    with_storage(tmp_path, work, file_lanes=file_work.LANES)


def test_files_that_were_given_up_are_counted_again_and_leave_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trouble that outlasts every try leaves files that no quota counts; what is in use stays, they go."""

    async def work(storage: Storage) -> None:
        with monkeypatch.context() as trouble:
            trouble.setattr(FaultyStore, "delete", refuse)
            trouble.setattr(file_work, "TRIES", 1)
            for seed in range(6):
                storage.store(prompt(seed, 2))
            await storage.prefixes.settle()
        assert storage.gauge("blocks") == 4 and len(storage.files()) == 12
        storage.now_s += PAUSE_S
        kept = storage.store(prompt(6, 2))
        async with asyncio.timeout(WAIT_S):
            while len(storage.files()) > 4:
                await asyncio.sleep(0.002)
        assert storage.gauge("recounts_total") == 1 and storage.gauge("blocks") == 4
        assert {key.hex() for key in kept} <= storage.files()
        storage.store(prompt(7, 2))
        await storage.prefixes.settle()
        assert storage.gauge("recounts_total") == 1

    with_storage(tmp_path, work, quota_bytes=4 * 8192)


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
        neighbour = Neighbour(storage)
        keys = block_keys(neighbour.space.root, prompt(1, 3))
        for _ in range(3):
            await storage.prefixes.look_beyond(neighbour.space, keys)
        assert storage.gauge("looks_total") == 1
        neighbour.store(prompt(1, 2))
        storage.now_s = ABSENT_S
        await storage.prefixes.look_beyond(neighbour.space, keys)
        assert storage.prefixes.match_and_pin(1, keys, 9) == 2
        storage.prefixes.unpin(1)
        await storage.prefixes.look_beyond(neighbour.space, keys)
        assert storage.gauge("looks_total") == 2, "that the third is not there was seen as well"
        for agent in range(2, MAX_ABSENT + 10):
            await storage.prefixes.look_beyond(neighbour.space, [agent.to_bytes(16, "big")])
        assert len(storage.prefixes._lookout._absent) == MAX_ABSENT

    with_storage(tmp_path, work)


def test_a_slow_store_keeps_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request goes on without, and what is found later is published then; all looks busy: it does not even ask."""
    monkeypatch.setattr("dualpath.cluster.coordinator.lookout.LOOK_S", 0.0)
    answering = threading.Event()
    genuine = FaultyStore.find

    def slow(*asked: object) -> list[BlockRecord]:
        assert answering.wait(60)
        return genuine(*asked)  # type: ignore[arg-type]

    async def work(storage: Storage) -> None:
        neighbour = Neighbour(storage)
        keys = neighbour.store(prompt(1, 2))
        monkeypatch.setattr(FaultyStore, "find", slow)
        await storage.prefixes.look_beyond(neighbour.space, keys)
        assert storage.prefixes.match_and_pin(1, keys, 9) == 0
        for agent in range(2, 9):
            others = block_keys(neighbour.space.root, prompt(agent, 2))
            for _ in range(2):
                await storage.prefixes.look_beyond(neighbour.space, others)
        assert storage.gauge("looks_total") == MAX_LOOKS
        looks = [look.future for look in storage.prefixes._lookout._looks.values()]
        answering.set()
        await asyncio.wait(looks)
        assert storage.prefixes.match_and_pin(1, keys, 9) == 2
        storage.prefixes.unpin(1)

    with_storage(tmp_path, work)


def test_a_store_that_does_not_answer_is_left_alone_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(storage: Storage) -> None:
        def away(*_: object) -> list[BlockRecord]:
            storage.now_s += 2 * QUICK_S
            raise StoreError("no route to host")

        monkeypatch.setattr(FaultyStore, "find", away)
        monkeypatch.setattr(storage.prefixes._lookout.threads, "_deadline_s", WAIT_S)
        space = storage.prefixes.namespace_of("")
        for agent in range(5):
            await storage.prefixes.look_beyond(space, block_keys(space.root, prompt(agent, 1)))
        assert (storage.gauge("looks_total"), storage.gauge("file_errors_total")) == (1, 1)
        storage.now_s += REFUSED_AWAY_S
        await storage.prefixes.look_beyond(space, block_keys(space.root, prompt(1, 1)))
        assert storage.gauge("looks_total") == 2
        assert "no route to host" in caplog.text

    with_storage(tmp_path, work)


def test_what_hangs_from_a_block_that_a_neighbour_has_written_anew_stays(tmp_path: Path) -> None:
    async def work(storage: Storage) -> None:
        keys = storage.store(prompt(1, 3))
        storage.damage(keys[0])
        storage.prefixes._files.threads.submit(lambda _: time.sleep(0.1))  # the disk is busy
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


# ── a store that hangs, refuses or is read-only ─────────────────────────────────────────────────────────────────────


def test_looks_that_hang_are_given_up_and_looking_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookout, "LOOK_S", 0.0)

    async def work(storage: Storage) -> None:
        neighbour = Neighbour(storage)
        keys = neighbour.store(prompt(1, 2))
        storage.faults = {"find": "hang"}
        for agent in range(2, 2 + MAX_LOOKS):
            await storage.prefixes.look_beyond(neighbour.space, block_keys(neighbour.space.root, prompt(agent, 1)))
        await storage.give_up("look", MAX_LOOKS)
        storage.now_s += TIMEOUT_S / 4
        assert storage.prefixes.troubles_s()["slow"] > 0
        await storage.prefixes.look_beyond(neighbour.space, keys)
        assert storage.gauge("looks_total") == MAX_LOOKS, "the store is left alone"
        storage.now_s += TIMEOUT_S
        storage.faults = {}
        monkeypatch.setattr(lookout, "LOOK_S", WAIT_S)
        await storage.prefixes.look_beyond(neighbour.space, keys)
        assert storage.prefixes.match_and_pin(1, keys, 9) == 2
        storage.prefixes.unpin(1)
        await storage.becomes('io_hung{work="look"}', 0)
        assert not any(storage.prefixes.troubles_s().values())

    with_storage(tmp_path, work)


def test_one_block_that_can_not_be_looked_at_does_not_end_looking(tmp_path: Path) -> None:
    async def work(storage: Storage) -> None:
        neighbour = Neighbour(storage)
        keys, poisoned = neighbour.store(prompt(1, 2)), neighbour.store(prompt(2, 2))
        storage.faults = {f"find {poisoned[0].hex()}": "unavailable"}
        await storage.prefixes.look_beyond(neighbour.space, poisoned)
        await storage.prefixes.look_beyond(neighbour.space, keys)
        assert storage.prefixes.match_and_pin(1, keys, 9) == 2
        storage.prefixes.unpin(1)
        assert storage.gauge("file_errors_total") == 1

    with_storage(tmp_path, work)


def test_a_deletion_that_hangs_holds_up_no_other(tmp_path: Path) -> None:
    async def work(storage: Storage) -> None:
        first = storage.store(prompt(1, 1))
        storage.faults = {f"delete {first[0].hex()}": "hang"}
        storage.store(prompt(2, 1))
        last = storage.store(prompt(3, 1))
        await storage.give_up("file", 1)
        await storage.prefixes.settle()
        assert storage.files() == {first[0].hex(), last[0].hex()}
        assert storage.gauge("file_errors_total") == 1
        storage.faults = {}
        await storage.becomes('io_hung{work="file"}', 0)
        assert storage.files() == {last[0].hex()}

    with_storage(tmp_path, work, quota_bytes=8192)


def test_when_every_deletion_hangs_files_stay_and_work_goes_on_later(tmp_path: Path) -> None:
    async def work(storage: Storage) -> None:
        storage.faults = {"delete": "hang"}
        for agent in range(20):
            storage.store(prompt(agent, 1))
        for _ in range(1 + file_work.MAX_HUNG):
            await storage.give_up("file", 1)
        await storage.prefixes.settle()
        assert storage.gauge("file_errors_total") == 19
        storage.store(prompt(20, 1))
        await storage.prefixes.settle()
        assert storage.gauge("file_errors_total") == 20, "refused at once"
        storage.faults = {}
        await storage.becomes('io_hung{work="file"}', 0)
        last = storage.store(prompt(21, 1))
        await storage.prefixes.settle()
        before = storage.files()
        storage.store(prompt(22, 1))
        await storage.prefixes.settle()
        assert before - storage.files() == {last[0].hex()}

    with_storage(tmp_path, work, quota_bytes=8192)


def test_the_queue_of_file_work_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_work, "MAX_WAITING", 10)

    async def work(storage: Storage) -> None:
        storage.faults = {"delete": "hang"}
        for agent in range(50):
            storage.store(prompt(agent, 1))
        assert storage.gauge("file_jobs_waiting") <= 12
        assert storage.gauge("file_errors_total") >= 37
        storage.faults = {}
        await storage.prefixes.settle()
        assert len(storage.files()) == 1 + storage.gauge("file_errors_total")

    with_storage(tmp_path, work, quota_bytes=8192)


def test_a_store_that_can_not_be_written_at_the_start_is_served_from(tmp_path: Path) -> None:
    keys = []

    async def fill(storage: Storage) -> None:
        keys.extend(storage.store(prompt(1, 3)))

    async def read_only() -> None:
        storage = Storage(tmp_path)
        storage.faults = dict.fromkeys(("prepare", "write", "delete", "quarantine"), "refuse")
        await storage.prefixes.load()
        assert storage.prefixes.match_and_pin(1, keys, 9) == 3
        storage.prefixes.unpin(1)
        storage.now_s += 1
        assert storage.prefixes.troubles_s()["read-only"] == 1
        storage.prefixes.close()

    with_storage(tmp_path, fill)
    asyncio.run(read_only())


# ── blocks that can't be read just now ──────────────────────────────────────────────────────────────────────────────


def test_a_block_that_can_not_be_read_now_is_a_miss_for_a_while_and_nothing_else(tmp_path: Path) -> None:
    async def work(storage: Storage) -> None:
        keys, others = storage.store(prompt(1, 4)), storage.store(prompt(2, 2))
        storage.prefixes.report_faults([BlockFaultReport(keys[2], "unavailable")])

        def hits(blocks: list[BlockKey]) -> int:
            found = storage.prefixes.match_and_pin(1, blocks, 9)
            storage.prefixes.unpin(1)
            return found

        assert (hits(keys), hits(others)) == (2, 2)
        await storage.prefixes.settle()
        assert len(storage.files()) == storage.gauge("blocks") == 6, "nothing is dropped or set aside"
        assert storage.gauge('faults_total{cause="unavailable"}') == 1
        storage.now_s += UNAVAILABLE_S
        assert hits(keys) == 4
        storage.prefixes.report_faults([BlockFaultReport(keys[0], "a cause of tomorrow")])
        assert hits(keys) == 0

    with_storage(tmp_path, work)


@pytest.mark.parametrize(
    "block", [StoredBlock(b"r" * 16, b"short", b"r" * 16, 1), StoredBlock(b"", b"k" * 16, b"", 1),
              StoredBlock(b"r" * 16, b"k" * 16, b"r" * 16, -1)]
)  # fmt: skip
def test_a_report_that_makes_no_sense_is_counted(tmp_path: Path, block: StoredBlock) -> None:
    async def work(storage: Storage) -> None:
        storage.prefixes.publish([block])
        storage.prefixes.report_faults([BlockFaultReport(b"short", "checksum")])
        assert (storage.gauge("refused_blocks_total"), storage.gauge("blocks")) == (1, 0)

    with_storage(tmp_path, work)


# ── tenants ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def reached(start: object) -> int:
    """Returns how many objects hang from one: what it remembers."""
    seen = {id(start): start}
    waiting = [start]
    while waiting:
        for found in gc.get_referents(waiting.pop()):
            if id(found) not in seen and not isinstance(found, type | type(gc)) and not callable(found):
                seen[id(found)] = found
                waiting.append(found)
    return len(seen)


def test_fifty_thousand_tenants_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each asks, is looked for, is stored, hit, and evicted by those after it. Figures, files and memory stay."""
    monkeypatch.setattr(lookout, "MAX_ABSENT", 500)
    monkeypatch.setattr(prefixes, "MAX_UNAVAILABLE", 500)
    monkeypatch.setattr(FaultyStore, "find", lambda *_: [])
    monkeypatch.setattr(FaultyStore, "delete", lambda *_: True)

    async def work(storage: Storage) -> None:
        async def serve(first: int, end: int) -> tuple[int, int]:
            for n in range(first, end):
                space = storage.prefixes.namespace_of(f"tenant {n}")
                (key,) = storage.prefixes.keys(space, prompt(1, 1))
                storage.prefixes.report_faults([BlockFaultReport(key, "unavailable")] if n % 7 == 0 else [])
                if n % 10 == 0:
                    await storage.prefixes.look_beyond(space, [key])
                storage.prefixes.publish([StoredBlock(space.root, key, space.root, 4096)])
                assert storage.prefixes.match_and_pin(n, [key], 1) == (n % 7 > 0)
                storage.prefixes.unpin(n)
            await storage.prefixes.settle()
            return reached(storage.prefixes), len(storage.prefixes.gauges())

        objects, series = await serve(0, 10_000)
        assert storage.gauge("namespaces") == storage.gauge("blocks") == 100
        objects_then, series_then = await serve(10_000, 50_000)
        assert storage.gauge("namespaces") == storage.gauge("blocks") == 100
        assert series_then == series
        assert objects_then <= objects + 1000
        assert len(list(tmp_path.iterdir())) <= 1, "nothing is made for a tenant before its first block"

    with_storage(tmp_path, work, quota_bytes=100 * 4096)
