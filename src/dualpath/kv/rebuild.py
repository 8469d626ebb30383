"""Rebuilds the prefix index after a restart, from the headers of all blocks in a store.

The store keeps no list of blocks that could disagree with its files. A scan reads one page per block. Parents are then
published first, otherwise the oldest block first, so that the oldest is the least recently used. Uses before the
restart are not remembered. Blocks of other models and layouts are published too: they can't be matched, but they take
space, so the quota must count and evict them.

Other processes may use the store meanwhile, and a scan is not a snapshot: it may see a child but miss its parent, which
was renamed into a folder that was already listed. So a block counts as an orphan only after `ancestors` has looked for
its parent again. Where that can't be told now, because the parent can't be read, the block is left alone: it is not
indexed, and found by a look once it can be.
"""

import logging
from collections.abc import Callable, Container, Iterable

import msgspec

from dualpath.kv.index import PrefixIndex
from dualpath.kv.keys import BlockKey
from dualpath.kv.stores.errors import BlockFault, BlockUnavailableError, StoreError
from dualpath.kv.stores.protocol import BadFile, BlockRecord, Inspectable, Store

logger = logging.getLogger(__name__)


class RebuildReport(msgspec.Struct, frozen=True):
    """What `rebuild` found. Orphans are sound blocks with a missing ancestor: nothing can ever match them."""

    published_blocks: int
    published_bytes: int
    orphans: tuple[BlockKey, ...]
    bad: tuple[BadFile, ...]
    unavailable: tuple[BadFile, ...]
    """What can't be read now; it and the blocks below it are left as they are."""
    not_cleaned: int
    """Orphans, bad blocks and leftovers that could not be cleaned; they stay, and never enter the index."""


def rebuild(
    index: PrefixIndex, store: Store, *, clean: bool = False, on_block: Callable[[], None] = lambda: None
) -> RebuildReport:
    """Publish every block of `store` that can be reached from its namespace's root.

    Blocks that `index` already has stay as they are. `on_block` is called for each one that is read. `clean` deletes
    orphans and what killed writers left, and quarantines bad blocks, whose space would otherwise not be counted; what
    can't be cleaned is noted. Raises StoreError if the store cannot be read.
    """
    found: list[BadFile] = []
    waiting: dict[BlockKey, BlockRecord] = {}
    for record in store.scan(found.append):
        waiting[record.key] = record
        on_block()
    bad = tuple(file for file in found if file.cause is not BlockFault.UNAVAILABLE)
    unavailable = tuple(file for file in found if file.cause is BlockFault.UNAVAILABLE)
    blocks_before, bytes_before = index.blocks, index.stored_bytes
    orphans = _publish_chains(index, store, waiting)
    not_cleaned = _clean(store, orphans, bad) if clean else 0
    if unavailable:
        logger.warning(
            "the store at %s has %d blocks or folders that can't be read now; one is %s: %s",
            store.location,
            len(unavailable),
            unavailable[0].path,
            unavailable[0].detail,
        )
    keys = tuple(record.key for record in orphans)
    published = index.blocks - blocks_before, index.stored_bytes - bytes_before
    return RebuildReport(*published, keys, bad, unavailable, not_cleaned)


def _publish_chains(index: PrefixIndex, store: Store, waiting: dict[BlockKey, BlockRecord]) -> list[BlockRecord]:
    """Publish the blocks of `waiting` that can be reached. Returns the orphans among the others, parents first."""
    orphans: dict[BlockKey, BlockRecord] = {}
    hidden: set[BlockKey] = set()
    for tip in sorted(waiting.values(), key=lambda record: (record.mtime_ns, record.key)):
        chain = _taken_chain(tip, waiting)
        if not chain or chain[0].parent in hidden:
            hidden.update(record.key for record in chain)
            continue
        try:
            above = None if chain[0].parent in orphans else ancestors(store, chain[0], index)
        except BlockUnavailableError:
            hidden.update(record.key for record in chain)
            continue
        if above is None:
            orphans |= {record.key: record for record in chain}
        else:
            publish_all(index, above + chain)
    return list(orphans.values())


def _clean(store: Store, orphans: Iterable[BlockRecord], bad: Iterable[BadFile]) -> int:
    """Clean what can be cleaned. Returns how much could not."""
    failed: list[StoreError] = []

    def attempt(clean: Callable[..., object], *arguments: object, **options: object) -> None:
        try:
            clean(*arguments, **options)
        except StoreError as error:
            failed.append(error)

    for record in orphans:
        attempt(delete_orphan, store, record.root, record.parent, record.key)
    for file in bad:
        if file.key is not None:
            attempt(store.quarantine, file.root, file.key)
    if isinstance(store, Inspectable):
        attempt(store.leftovers, remove=True)
    if failed:
        logger.warning(
            "%d bad or lost blocks stay in the store at %s; one says: %s", len(failed), store.location, failed[0]
        )
    return len(failed)


def publish_all(index: PrefixIndex, records: Iterable[BlockRecord]) -> None:
    """Publish blocks, each after its parent."""
    for record in records:
        index.publish(record.root, record.key, record.parent, record.physical_bytes)


def ancestors(store: Store, record: BlockRecord, known: Container[BlockKey]) -> list[BlockRecord] | None:
    """Look in `store` for the blocks between `record` and a root or `known` block. Returns them, parents first.

    Returns None when one of them is missing: `record` is an orphan. Raises StoreError; BlockUnavailableError when one
    can't be read now, so that nobody can say.
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
    """Delete a block unless its parent exists: another process may have written it meanwhile.

    Raises StoreError and deletes nothing when the parent can't be looked for now.
    """
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
