import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from dualpath.kv import BlockFault, BlockKey, PosixStore, StoreError, namespace, stored_namespaces
from dualpath.kv.block_file import PAGE_BYTES
from dualpath.kv.inspect import fsck, stat

PathOf = Callable[[BlockKey], Path]
WriteChain = Callable[..., list[BlockKey]]


def test_stat_describes_every_namespace(
    store: PosixStore, tmp_path: Path, write_chain: WriteChain, path_of: PathOf
) -> None:
    trunk = write_chain(3)
    branch = write_chain(4, 1000, trunk[1])
    store.delete(branch[2])
    store.quarantine(trunk[2], BlockFault.TRUNCATED)
    (damaged,) = write_chain(1, 5000)
    path_of(damaged).write_bytes(b"")
    sound = [*trunk[:2], *branch[:2], branch[3]]
    for second, key in enumerate(sound, start=10):
        os.utime(path_of(key), (second, second))
    other_space = namespace("model-b", "7", store.namespace.layout, "salt")
    PosixStore(tmp_path / "store", store.namespace.layout, other_space)

    calls: list[tuple[int, int]] = []
    found = stat(tmp_path / "store", progress=lambda done, total: calls.append((done, total)))
    assert calls == [(n, 6) for n in range(1, 7)]
    spaces = {space.namespace: space for space in found.namespaces}
    assert set(spaces) == {store.namespace.hex, other_space.hex}
    mine, other = spaces[store.namespace.hex], spaces[other_space.hex]
    assert (mine.blocks, mine.payload_bytes, mine.unreadable_files, mine.quarantined_files) == (5, 5 * 768, 1, 1)
    assert mine.physical_bytes == found.physical_bytes == sum(record.physical_bytes for record in store.scan())
    assert mine.deepest_chain_blocks == 4, "two of the trunk and two of the branch; the branch's last hangs in the air"
    assert (mine.oldest_mtime_ns, mine.newest_mtime_ns) == (10 * 10**9, 14 * 10**9)
    assert mine.description is not None and mine.description.layout == store.namespace.layout
    assert (other.blocks, other.oldest_mtime_ns, other.newest_mtime_ns) == (0, None, None)
    assert other.description is not None
    assert (other.description.model_fingerprint, other.description.salted) == ("model-b", True)
    assert found.blocks == 5


def test_a_sound_store_is_clean(store: PosixStore, tmp_path: Path, write_chain: WriteChain) -> None:
    write_chain(4)
    report = fsck(tmp_path / "store")
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

    report = fsck(tmp_path / "store")
    assert {(file.path, file.cause) for file in report.bad_files} == {
        (str(path_of(payload[0])), BlockFault.CHECKSUM),
        (str(path_of(header[1])), BlockFault.HEADER),
        (str(path_of(truncated[1])), BlockFault.TRUNCATED),
        (str(path_of(swapped[1])), BlockFault.HEADER),
        (str(stray), BlockFault.HEADER),
    }
    assert report.faults == {"checksum": 1, "header": 3, "truncated": 1}
    assert set(report.orphans) == {str(path_of(payload[1])), str(path_of(missing[1]))}
    assert report.leftovers == (str(leftover),)
    assert (report.checked_blocks, report.sound_blocks, report.quarantined_files) == (12, 7, 0)
    assert not report.is_clean
    assert fsck(tmp_path / "store") == report, "looking changes nothing"

    repaired = fsck(tmp_path / "store", repair=True)
    assert repaired.repaired and repaired.quarantined_files == 5
    assert (repaired.bad_files, repaired.orphans) == (report.bad_files, report.orphans)
    after = fsck(tmp_path / "store")
    assert after.is_clean and (after.checked_blocks, after.quarantined_files) == (5, 5)
    remaining = [header[0], truncated[0], misnamed[0], *sound]
    assert sorted(record.key for record in store.scan()) == sorted(remaining)
    assert [path.name for path in (tmp_path / "store").rglob("*.tmp")] == [".y.kv.00000000.1.abcd.tmp"]


def test_fsck_needs_no_description(store: PosixStore, tmp_path: Path, write_chain: WriteChain, path_of: PathOf) -> None:
    keys = write_chain(3)
    folder = tmp_path / "store" / store.namespace.hex
    (folder / "namespace.json").unlink()
    damage(path_of(keys[2]), PAGE_BYTES)
    report = fsck(tmp_path / "store")
    assert (report.sound_blocks, report.faults, report.undescribed) == (2, {"checksum": 1}, (str(folder),))
    assert stat(tmp_path / "store").namespaces[0].description is None


def test_a_description_of_another_namespace_does_not_count(store: PosixStore, tmp_path: Path) -> None:
    space = namespace("model-b", "1", store.namespace.layout)
    PosixStore(tmp_path / "store", store.namespace.layout, space)
    mine = tmp_path / "store" / store.namespace.hex / "namespace.json"
    mine.write_bytes((tmp_path / "store" / space.hex / "namespace.json").read_bytes())
    assert fsck(tmp_path / "store").undescribed == (str(mine.parent),)


def test_a_description_of_another_geometry_condemns_the_blocks(
    store: PosixStore, tmp_path: Path, write_chain: WriteChain
) -> None:
    write_chain(1)
    path = tmp_path / "store" / store.namespace.hex / "namespace.json"
    path.write_text(path.read_text().replace('"layers": 3', '"layers": 4'))
    (file,) = fsck(tmp_path / "store").bad_files
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

    assert fsck(tmp_path / "store", repair=True, progress=put_back).is_clean
    assert len(list(store.scan())) == 64


def test_a_block_that_vanishes_meanwhile_is_passed_over(
    store: PosixStore, tmp_path: Path, write_chain: WriteChain
) -> None:
    last = max(write_chain(1, 1000 * n)[0] for n in range(20))
    report = fsck(tmp_path / "store", progress=lambda done, _total: store.delete(last) and None)
    assert report.is_clean and report.checked_blocks == 19


def test_namespaces_are_found_again_after_a_restart(store: PosixStore, tmp_path: Path) -> None:
    layout = store.namespace.layout
    salted = namespace("tiny-model", "1", layout, "a tenant")
    wider = msgspec.structs.replace(layout, dtype="float32")
    PosixStore(tmp_path / "store", layout, salted)
    PosixStore(tmp_path / "store", wider, namespace("tiny-model", "1", wider))
    found = stored_namespaces(tmp_path / "store", layout)
    assert sorted(found, key=lambda space: space.hex) == sorted([store.namespace, salted], key=lambda space: space.hex)
    (tmp_path / "store" / salted.hex / "namespace.json").write_bytes(b"\xff")
    assert stored_namespaces(tmp_path / "store", layout) == [store.namespace]
    assert stored_namespaces(tmp_path / "nowhere", layout) == []


def test_what_is_no_store_is_an_error(tmp_path: Path) -> None:
    for inspect in (stat, fsck):
        with pytest.raises(StoreError, match=r"nowhere cannot be inspected: .*give a store's directory"):
            inspect(tmp_path / "nowhere")
    assert stat(tmp_path).namespaces == () and fsck(tmp_path).is_clean
