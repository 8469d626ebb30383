"""Several processes on one store that know nothing of each other: nobody's blocks are lost, everybody's are found."""

import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from dualpath.kv import (
    BadFile,
    BlockKey,
    BlockRecord,
    KVLayout,
    KVPart,
    Namespace,
    PosixStore,
    PrefixIndex,
    block_keys,
    namespace,
    rebuild,
)
from dualpath.kv.stores.inspection import fsck

pytestmark = pytest.mark.slow

PayloadOf = Callable[[BlockKey], np.ndarray]
PathOf = Callable[[BlockKey], Path]
WriteChain = Callable[..., list[BlockKey]]

LAYOUT = KVLayout.alike(2, (KVPart("kv", 1, 4),), "float32", block_tokens=16)
SPACE = namespace("shared", "1", LAYOUT)
CHAINS, BLOCKS, SCANS = 40, 8, 20


def chain_of(writer: int, number: int) -> list[BlockKey]:
    first = (writer * CHAINS + number) * 1000
    return block_keys(SPACE.root, range(first, first + BLOCKS * 16), 16)


def write_chains(directory: Path, writer: int) -> None:
    store = PosixStore(directory, durable=False, verify_writes=False)
    for number in range(CHAINS):
        keys = chain_of(writer, number)
        for parent, key in zip([SPACE.root, *keys], keys, strict=False):
            store.write(SPACE, key, parent, bytes(LAYOUT.full_block_bytes))


def test_cleaning_beside_three_writers_loses_no_block(tmp_path: Path) -> None:
    """Starts of other clusters, and repairs, while three processes write: all that was written is there."""
    store = PosixStore(tmp_path, durable=False)
    store.prepare(SPACE)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_chains, args=(tmp_path, writer)) for writer in range(3)]
    for writer in writers:
        writer.start()
    beside = 0
    while beside < SCANS or any(writer.is_alive() for writer in writers):
        rebuild(PrefixIndex(), store, clean=True)
        fsck(store, repair=True)
        beside += 1
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    written = {key for writer in range(3) for number in range(CHAINS) for key in chain_of(writer, number)}
    assert {record.key for record in store.scan()} == written
    assert store.leftovers() == [] and fsck(store).is_clean


class Interrupted(PosixStore):
    """`meanwhile` happens between what a scan has seen and what comes of it."""

    meanwhile: Callable[[], None]

    def scan(self, on_bad: Callable[[BadFile], None] | None = None) -> Iterator[BlockRecord]:
        yield from list(super().scan(on_bad))
        self.meanwhile()


def test_a_parent_renamed_into_place_after_the_listing_makes_no_orphan(
    tmp_path: Path, space: Namespace, write_chain: WriteChain, path_of: PathOf
) -> None:
    keys = write_chain(4)
    aside = [(path_of(key), tmp_path / key.hex()) for key in keys[:2]]
    for path, away in aside:
        path.replace(away)
    store = Interrupted(tmp_path / "store")
    store.meanwhile = lambda: [away.replace(path) for path, away in aside] and None
    index = PrefixIndex()
    report = rebuild(index, store, clean=True)
    assert (report.published_blocks, report.orphans) == (4, ())
    assert index.match(keys) == 4
    index.audit()


def test_a_bad_block_replaced_after_the_listing_is_left_alone(
    tmp_path: Path, write_chain: WriteChain, path_of: PathOf
) -> None:
    (key,) = write_chain(1)
    path_of(key).write_bytes(b"half")
    store = Interrupted(tmp_path / "store")
    store.meanwhile = lambda: write_chain(1) and None
    assert len(rebuild(PrefixIndex(), store, clean=True).bad) == 1
    assert [record.key for record in PosixStore(tmp_path / "store").scan()] == [key]


def test_headers_that_lead_in_a_circle_are_orphans(store: PosixStore, space: Namespace, payload_of: PayloadOf) -> None:
    one, other = block_keys(space.root, range(32), 16)
    store.write(space, one, other, payload_of(one))
    store.write(space, other, one, payload_of(other))
    assert rebuild(PrefixIndex(), store).published_blocks == 0


@pytest.mark.parametrize("removed", ["shards", "namespace", "store"])
def test_what_was_removed_under_a_live_store_is_made_again(
    store: PosixStore, tmp_path: Path, space: Namespace, write_chain: WriteChain, path_of: PathOf, removed: str
) -> None:
    keys = write_chain(3)
    home = tmp_path / "store"
    gone = {"shards": list((home / space.hex).glob("??")), "namespace": [home / space.hex], "store": [home]}
    for path in gone[removed]:
        shutil.rmtree(path)
    assert store.find(space.root, keys) == []
    assert not store.delete(space.root, keys[0]) and store.quarantine(space.root, keys[0]) is None
    assert write_chain(3) == keys
    assert [record.key for record in store.find(space.root, keys)] == keys
    assert fsck(store).is_clean, "the description is there again, too"
    path_of(keys[2]).write_bytes(b"half a block")
    shutil.rmtree(home / space.hex / "bad", ignore_errors=True)
    assert store.quarantine(space.root, keys[2]) is not None


def test_a_shard_removed_while_a_block_is_written(
    store: PosixStore, tmp_path: Path, space: Namespace, payload_of: PayloadOf
) -> None:
    (key,) = block_keys(space.root, range(16), 16)
    removed: list[int] = []

    def remove(n_bytes: int) -> None:
        if not removed:
            shutil.rmtree(tmp_path / "store")
        removed.append(n_bytes)

    store.write(space, key, space.root, payload_of(key), pace=remove)
    assert len(removed) == 2, "written again from the start"
    store.read(space, key, bytearray(768))


def test_blocks_of_other_layouts_are_counted_and_go_first(
    store: PosixStore, space: Namespace, payload_of: PayloadOf, write_chain: WriteChain, path_of: PathOf
) -> None:
    """After a change of dtype the old blocks can't be matched, but they take space."""
    layout = msgspec.structs.replace(space.layout, dtype="float32")
    older = namespace("tiny-model", "1", layout)
    old = block_keys(older.root, range(48), 16)
    for second, (key, parent) in enumerate(zip(old, [older.root, *old], strict=False)):
        store.write(older, key, parent, bytes(layout.full_block_bytes))
        os.utime(path_of(key).parents[2] / older.hex / key.hex()[:2] / f"{key.hex()}.kv", (second, second))
    keys = write_chain(2)
    index = PrefixIndex()
    rebuild(index, store)
    assert index.stored_bytes == sum(record.physical_bytes for record in store.scan())
    own_bytes = sum(record.physical_bytes for record in store.find(space.root, keys))
    evicted = index.evict(own_bytes)
    assert [(block.root, block.key) for block in evicted] == [(older.root, key) for key in reversed(old)]
    assert all(store.delete(block.root, block.key) for block in evicted)
    assert [record.root for record in store.scan()] == [space.root] * 2
