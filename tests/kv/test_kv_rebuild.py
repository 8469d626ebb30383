import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dualpath.kv import BlockFault, BlockKey, Namespace, PosixStore, PrefixIndex, StoreError, rebuild

PathOf = Callable[[BlockKey], Path]
WriteChain = Callable[..., list[BlockKey]]


def publish_as_it_was(
    index: PrefixIndex, store: PosixStore, space: Namespace, order: list[BlockKey], path_of: PathOf
) -> None:
    """Publish in `order`, and give the files the times at which that would have happened."""
    records = {record.key: record for record in store.scan()}
    for second, key in enumerate(order):
        assert index.publish(space.root, key, records[key].parent, records[key].physical_bytes)
        os.utime(path_of(key), (second, second))


def test_rebuild_equals_the_index_before(
    store: PosixStore, write_chain: WriteChain, path_of: PathOf, space: Namespace
) -> None:
    trunk = write_chain(3)
    one, other = write_chain(2, 1000, trunk[-1]), write_chain(4, 2000, trunk[1])
    before, after = PrefixIndex(), PrefixIndex()
    publish_as_it_was(before, store, space, [*trunk, other[0], *one, *other[1:]], path_of)
    report = rebuild(after, store)
    assert (report.published_blocks, report.published_bytes) == (9, before.stored_bytes)
    assert report.orphans == () and report.bad == ()
    after.audit()
    assert (after.blocks, after.stored_bytes) == (before.blocks, before.stored_bytes)
    for chain in (trunk + one, trunk[:2] + other):
        assert after.match(chain) == len(chain)
    fresh = PrefixIndex()
    rebuild(fresh, store)
    order = [block.key for block in fresh.evict(0)]
    assert [key for key in order if key in (one[-1], other[-1])] == [one[-1], other[-1]]
    assert order == [block.key for block in before.evict(0)]


def test_a_second_rebuild_changes_nothing(store: PosixStore, write_chain: WriteChain) -> None:
    write_chain(4)
    index = PrefixIndex()
    rebuild(index, store)
    again = rebuild(index, store)
    assert (again.published_blocks, again.orphans, index.blocks) == (0, (), 4)


def test_orphans_and_bad_blocks_are_reported_then_cleaned(
    store: PosixStore, write_chain: WriteChain, path_of: PathOf
) -> None:
    chain, damaged = write_chain(5), write_chain(3, 1000)
    path_of(chain[1]).unlink()
    path_of(damaged[1]).write_bytes(b"\0" * 4900)
    index = PrefixIndex()
    report = rebuild(index, store)
    assert set(report.orphans) == {*chain[2:], damaged[2]}
    assert [(file.key, file.cause) for file in report.bad] == [(damaged[1], BlockFault.HEADER)]
    assert index.match(chain) == 1 and index.match(damaged) == 1 and index.blocks == 2
    index.audit()

    assert rebuild(PrefixIndex(), store, clean=True) == report
    cleaned = rebuild(PrefixIndex(), store)
    assert (cleaned.published_blocks, cleaned.orphans, cleaned.bad) == (2, (), ())
    assert sorted(record.key for record in store.scan()) == sorted([chain[0], damaged[0]])


def test_an_unreadable_store_is_an_error(store: PosixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> object:
        raise OSError(errno.EIO, "the disk is worn")

    monkeypatch.setattr("pathlib.Path.iterdir", broken)
    with pytest.raises(StoreError, match="cannot be searched"):
        rebuild(PrefixIndex(), store)
