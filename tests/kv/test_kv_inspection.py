import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from dualpath.kv import (
    BlockFault,
    BlockKey,
    Namespace,
    PosixStore,
    StoreError,
    StoreLocationError,
    block_keys,
    namespace,
)
from dualpath.kv.stores.block_file import PAGE_BYTES
from dualpath.kv.stores.inspection import fsck, stat

PathOf = Callable[[BlockKey], Path]
WriteChain = Callable[..., list[BlockKey]]


def begin(store: PosixStore, space: Namespace) -> BlockKey:
    """Give a namespace its first block."""
    (key,) = block_keys(space.root, range(16), 16)
    store.write(space, key, space.root, bytes(space.layout.full_block_bytes))
    return key


def test_stat_describes_every_namespace(
    store: PosixStore, space: Namespace, tmp_path: Path, write_chain: WriteChain, path_of: PathOf
) -> None:
    trunk = write_chain(3)
    branch = write_chain(4, 1000, trunk[1])
    store.delete(space.root, branch[2])
    damage(path_of(trunk[2]), PAGE_BYTES)
    assert store.quarantine(space.root, trunk[2]) is BlockFault.CHECKSUM
    (damaged,) = write_chain(1, 5000)
    path_of(damaged).write_bytes(b"")
    sound = [*trunk[:2], *branch[:2], branch[3]]
    for second, key in enumerate(sound, start=10):
        os.utime(path_of(key), (second, second))
    other_space = namespace("model-b", "7", space.layout, "salt")
    other_key = begin(store, other_space)
    os.utime(path_of(other_key).parents[2] / other_space.hex / other_key.hex()[:2] / f"{other_key.hex()}.kv", (9, 9))

    found = stat(store)
    spaces = {one.namespace: one for one in found.namespaces}
    assert set(spaces) == {space.hex, other_space.hex}
    mine, other = spaces[space.hex], spaces[other_space.hex]
    assert (mine.blocks, mine.payload_bytes, mine.unreadable_files, mine.quarantined_files) == (5, 5 * 768, 1, 1)
    assert mine.physical_bytes == sum(one.physical_bytes for one in store.scan() if one.root == space.root)
    assert mine.deepest_chain_blocks == 4, "two of the trunk and two of the branch; the branch's last hangs in the air"
    assert (mine.oldest_mtime_ns, mine.newest_mtime_ns) == (10 * 10**9, 14 * 10**9)
    assert mine.description is not None and mine.description.layout == space.layout
    assert (other.blocks, other.oldest_mtime_ns, other.newest_mtime_ns) == (1, 9 * 10**9, 9 * 10**9)
    assert other.description is not None
    assert (other.description.model_fingerprint, other.description.salted) == ("model-b", True)
    assert found.blocks == 6 and found.physical_bytes == mine.physical_bytes + other.physical_bytes


def test_a_sound_store_is_clean(store: PosixStore, tmp_path: Path, write_chain: WriteChain) -> None:
    write_chain(4)
    report = fsck(store)
    assert report.is_clean and not report.repaired
    assert (report.namespaces, report.checked_blocks, report.sound_blocks) == (1, 4, 4)
    assert (report.checked_bytes, report.faults) == (4 * 768, {})
    assert msgspec.json.decode(msgspec.json.encode(report))["sound_blocks"] == 4


def damage(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(position)
        file.write(bytes([byte[0] ^ 1]))


def test_fsck_finds_and_repairs_each_fault(
    store: PosixStore, tmp_path: Path, write_chain: WriteChain, path_of: PathOf
) -> None:
    chains = [write_chain(2, 1000 * n) for n in range(7)]
    payload, header, truncated, swapped, missing, misnamed, sound = chains
    damage(path_of(payload[0]), PAGE_BYTES + 300)
    damage(path_of(header[1]), 100)
    os.truncate(path_of(truncated[1]), PAGE_BYTES + 1)
    path_of(swapped[0]).replace(path_of(swapped[1]))
    path_of(missing[0]).unlink()
    stray = path_of(misnamed[1]).with_name("stray.kv")
    path_of(misnamed[1]).replace(stray)
    leftover = path_of(sound[0]).with_name(".x.kv.00000000.1.abcd.tmp")
    leftover.touch()
    os.utime(leftover, (time.time() - 7200,) * 2)
    leftover.with_name(".y.kv.00000000.1.abcd.tmp").touch()

    def name(path: Path) -> str:
        return str(path.relative_to(tmp_path / "store"))

    report = fsck(store)
    assert {(file.path, file.cause) for file in report.bad_files} == {
        (name(path_of(payload[0])), BlockFault.CHECKSUM),
        (name(path_of(header[1])), BlockFault.HEADER),
        (name(path_of(truncated[1])), BlockFault.TRUNCATED),
        (name(path_of(swapped[1])), BlockFault.HEADER),
        (name(stray), BlockFault.HEADER),
    }
    assert report.faults == {"checksum": 1, "header": 3, "truncated": 1}
    assert set(report.orphans) == {name(path_of(payload[1])), name(path_of(missing[1]))}
    assert report.leftovers == (str(leftover),)
    assert (report.checked_blocks, report.sound_blocks, report.quarantined_files) == (12, 7, 0)
    assert not report.is_clean
    assert fsck(store) == report, "looking changes nothing"

    repaired = fsck(store, repair=True)
    assert repaired.repaired and repaired.quarantined_files == 5
    assert (repaired.bad_files, repaired.orphans) == (report.bad_files, report.orphans)
    after = fsck(store)
    assert after.is_clean and (after.checked_blocks, after.quarantined_files) == (5, 5)
    remaining = [header[0], truncated[0], misnamed[0], *sound]
    assert sorted(record.key for record in store.scan()) == sorted(remaining)
    assert [path.name for path in (tmp_path / "store").rglob("*.tmp")] == [".y.kv.00000000.1.abcd.tmp"]


def test_fsck_needs_no_description(
    store: PosixStore, tmp_path: Path, write_chain: WriteChain, path_of: PathOf, space: Namespace
) -> None:
    keys = write_chain(3)
    folder = tmp_path / "store" / space.hex
    (folder / "namespace.json").unlink()
    damage(path_of(keys[2]), PAGE_BYTES)
    report = fsck(store)
    assert (report.sound_blocks, report.faults, report.undescribed) == (2, {"checksum": 1}, (space.hex,))
    assert stat(store).namespaces[0].description is None


def test_a_description_of_another_namespace_does_not_count(store: PosixStore, tmp_path: Path, space: Namespace) -> None:
    other = namespace("model-b", "1", space.layout)
    for one in (space, other):
        begin(store, one)
    mine = tmp_path / "store" / space.hex / "namespace.json"
    mine.write_bytes((tmp_path / "store" / other.hex / "namespace.json").read_bytes())
    assert fsck(store).undescribed == (space.hex,)


def test_a_description_of_another_geometry_condemns_the_blocks(
    store: PosixStore, tmp_path: Path, write_chain: WriteChain, space: Namespace
) -> None:
    write_chain(1)
    path = tmp_path / "store" / space.hex / "namespace.json"
    path.write_text(path.read_text().replace('"layer_kinds": [', '"layer_kinds": [0, '))
    (file,) = fsck(store).bad_files
    assert "geometry" in file.detail


def test_a_parent_written_meanwhile_makes_no_orphan(
    store: PosixStore, tmp_path: Path, write_chain: WriteChain, path_of: PathOf
) -> None:
    """The parent's shard was listed before the parent came, its child's shard after."""
    path, aside = path_of(write_chain(64)[10]), tmp_path / "aside"
    path.replace(aside)

    def put_back(done: int, total: int) -> None:
        if done == total:
            aside.replace(path)

    assert fsck(store, repair=True, progress=put_back).is_clean
    assert len(list(store.scan())) == 64


def test_a_block_that_vanishes_meanwhile_is_passed_over(
    store: PosixStore, tmp_path: Path, write_chain: WriteChain, space: Namespace
) -> None:
    last = max(write_chain(1, 1000 * n)[0] for n in range(20))
    report = fsck(store, progress=lambda done, _total: store.delete(space.root, last) and None)
    assert report.is_clean and report.checked_blocks == 19


def test_every_namespace_is_described(store: PosixStore, tmp_path: Path, space: Namespace) -> None:
    wider = msgspec.structs.replace(space.layout, dtype="float32")
    salted, other = namespace("tiny-model", "1", space.layout, "a tenant"), namespace("tiny-model", "1", wider)
    for one in (space, salted, other):
        begin(store, one)
    (tmp_path / "store" / salted.hex / "namespace.json").write_bytes(b"\xff")
    found = store.descriptions()
    assert {root: one and one.layout for root, one in found.items()} == {
        space.root: space.layout,
        salted.root: None,
        other.root: wider,
    }


def test_a_block_written_anew_since_it_was_found_bad_is_left_alone(
    store: PosixStore, space: Namespace, write_chain: WriteChain, path_of: PathOf
) -> None:
    """A live server replaces a bad block between fsck's look and its repair."""
    keys = write_chain(3)
    damage(path_of(keys[0]), PAGE_BYTES)

    def replace(done: int, total: int) -> None:
        if done == total:
            write_chain(1)

    report = fsck(store, repair=True, progress=replace)
    assert report.faults == {"checksum": 1}
    assert sorted(record.key for record in store.scan()) == sorted(keys)
    assert fsck(store).is_clean


def test_a_store_that_offers_no_inspection_is_named() -> None:
    class Bare:
        location = "bare://place"

    for inspect in (stat, fsck):
        with pytest.raises(StoreError, match="the store at bare://place can't be inspected"):
            inspect(Bare())  # type: ignore[arg-type]


def test_what_is_no_store_is_an_error(tmp_path: Path) -> None:
    for inspect in (stat, fsck):
        with pytest.raises(StoreLocationError, match="nowhere is not a directory; give the directory of a store"):
            inspect(PosixStore(tmp_path / "nowhere"))
    assert stat(PosixStore(tmp_path)).namespaces == () and fsck(PosixStore(tmp_path)).is_clean
