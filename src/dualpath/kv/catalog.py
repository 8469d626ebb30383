"""After a restart: fill the prefix index from the headers of the blocks in a store.

The store keeps no list of its own that could disagree with its files. A scan reads one page a block; blocks are then
published parents first, and among themselves by the time they were written, so that the oldest is the least recently
used. How often a block was read before the restart is not remembered.
"""

import msgspec

from dualpath.kv.directory import BadFile, BlockRecord
from dualpath.kv.index import PrefixIndex
from dualpath.kv.keys import BlockKey
from dualpath.kv.store import Store


class RebuildReport(msgspec.Struct, frozen=True):
    """What `rebuild` found. Orphans are sound blocks whose ancestors are not all there: nothing can ever match them."""

    published_blocks: int
    published_bytes: int
    orphans: tuple[BlockKey, ...]
    bad: tuple[BadFile, ...]


def rebuild(index: PrefixIndex, store: Store, *, clean: bool = False) -> RebuildReport:
    """Publish every block of `store` that can be reached from its namespace's root.

    Blocks that `index` has already stay as they are. `clean` deletes orphans and quarantines bad blocks, whose space
    would otherwise be taken without being counted. Raises StoreError if the store cannot be read or cleaned.
    """
    bad: list[BadFile] = []
    waiting = {record.key: record for record in store.scan(bad.append)}
    oldest_first = sorted(waiting.values(), key=lambda record: (record.mtime_ns, record.key))
    index.add_root(store.namespace.root)
    published_blocks = published_bytes = 0
    for tip in oldest_first:
        for record in _unpublished_chain(tip, waiting):
            if index.publish(record.key, record.parent, record.physical_bytes):
                published_blocks += 1
                published_bytes += record.physical_bytes
    orphans = tuple(record.key for record in oldest_first if record.key not in index)
    if clean:
        for key in orphans:
            store.delete(key)
        for file in bad:
            if file.key is not None:
                store.quarantine(file.key, file.cause)
    return RebuildReport(published_blocks, published_bytes, orphans, tuple(bad))


def _unpublished_chain(tip: BlockRecord, waiting: dict[BlockKey, BlockRecord]) -> list[BlockRecord]:
    """Take `tip` and its ancestors out of `waiting`, as far as they still are in it; ancestors first."""
    chain = []
    record = waiting.pop(tip.key, None)
    while record is not None:
        chain.append(record)
        record = waiting.pop(record.parent, None)
    return chain[::-1]
