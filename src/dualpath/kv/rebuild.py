"""Rebuilds the prefix index after a restart, from the headers of all blocks in a store.

The store keeps no list of blocks that could disagree with its files. A scan reads one page per block. Parents are then
published first, otherwise the oldest block first, so that the oldest is the least recently used. Uses before the
restart are not remembered. Blocks of other models and layouts are published too: they can't be matched, but they take
space, so the quota must count and evict them.

Other processes may use the store meanwhile, and a scan is not a snapshot: it may see a child but miss its parent, which
was renamed into a folder that was already listed. So a block counts as an orphan only after `ancestors` has looked for
its parent again.
"""

from collections.abc import Container, Iterable
from contextlib import suppress

import msgspec

from dualpath.kv.index import PrefixIndex
from dualpath.kv.keys import BlockKey
from dualpath.kv.stores.errors import StoreError
from dualpath.kv.stores.protocol import BadFile, BlockRecord, Store


class RebuildReport(msgspec.Struct, frozen=True):
    """What `rebuild` found. Orphans are sound blocks with a missing ancestor: nothing can ever match them."""

    published_blocks: int
    published_bytes: int
    orphans: tuple[BlockKey, ...]
    bad: tuple[BadFile, ...]


def rebuild(index: PrefixIndex, store: Store, *, clean: bool = False) -> RebuildReport:
    """Publish every block of `store` that can be reached from its namespace's root.

    Blocks that `index` already has stay as they are. `clean` deletes orphans and quarantines bad blocks, whose space
    would otherwise not be counted. Raises StoreError if the store cannot be read or cleaned.
    """
    bad: list[BadFile] = []
    waiting = {record.key: record for record in store.scan(bad.append)}
    oldest_first = sorted(waiting.values(), key=lambda record: (record.mtime_ns, record.key))
    blocks_before, bytes_before = index.blocks, index.stored_bytes
    orphans: dict[BlockKey, BlockRecord] = {}
    for tip in oldest_first:
        index.add_root(tip.root)
        chain = _taken_chain(tip, waiting)
        above = None if not chain or chain[0].parent in orphans else ancestors(store, chain[0], index)
        if above is None:
            orphans |= {record.key: record for record in chain}
        else:
            publish_all(index, above + chain)
    if clean:
        for record in orphans.values():
            delete_orphan(store, record.root, record.parent, record.key)
        for file in bad:
            if file.key is not None:
                with suppress(StoreError):  # it stays where it is, and never enters the index
                    store.quarantine(file.root, file.key)
    return RebuildReport(index.blocks - blocks_before, index.stored_bytes - bytes_before, tuple(orphans), tuple(bad))


def publish_all(index: PrefixIndex, records: Iterable[BlockRecord]) -> None:
    """Publish blocks, each after its parent."""
    for record in records:
        index.publish(record.key, record.parent, record.physical_bytes)


def ancestors(store: Store, record: BlockRecord, known: Container[BlockKey]) -> list[BlockRecord] | None:
    """Look in `store` for the blocks between `record` and a root or `known` block. Returns them, parents first.

    Returns None when one of them is missing: `record` is an orphan. Raises StoreError.
    """
    above: dict[BlockKey, BlockRecord] = {}
    while record.parent != record.root and record.parent not in known:
        found = store.find(record.root, [record.parent])
        if not found or record.parent in above:  # missing, or forged headers form a cycle
            return None
        record = found[0]
        above[record.key] = record
    return list(above.values())[::-1]


def delete_orphan(store: Store, root: BlockKey, parent: BlockKey, key: BlockKey) -> None:
    """Delete a block unless its parent exists: another process may have written it meanwhile. Raises StoreError."""
    if parent != root and not store.find(root, [parent]):
        store.delete(root, key)


def _taken_chain(tip: BlockRecord, waiting: dict[BlockKey, BlockRecord]) -> list[BlockRecord]:
    """Take `tip` and those of its ancestors still in `waiting` out of it. Returns them, ancestors first."""
    chain = []
    record = waiting.pop(tip.key, None)
    while record is not None:
        chain.append(record)
        record = waiting.pop(record.parent, None)
    return chain[::-1]
