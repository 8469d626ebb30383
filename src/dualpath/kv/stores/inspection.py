"""Inspects any `Inspectable` store: `stat` reads headers, `fsck` checks every byte.

Both may run while the store is in use. A file that vanishes meanwhile is skipped; a draft that is being written is left
alone. A block counts as an orphan only when a second look still does not find its parent, and is deleted only when a
look right before the deletion does not find it either. What can't be read now is reported and left alone, and so is
what builds on it.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

import msgspec

from dualpath.kv.keys import BlockKey
from dualpath.kv.rebuild import ancestors, delete_orphan
from dualpath.kv.stores.errors import BlockError, BlockFault, BlockUnavailableError, StoreError
from dualpath.kv.stores.naming import block_name
from dualpath.kv.stores.protocol import (
    BadFile,
    BlockRecord,
    Inspectable,
    NamespaceDescription,
    Store,
)

Progress = Callable[[int, int], None]
"""Called after each block with the number of blocks checked and the total."""


class NamespaceStat(msgspec.Struct, frozen=True):
    """One namespace of a store. `description` is None when ``namespace.json`` is missing or damaged."""

    namespace: str
    description: NamespaceDescription | None
    blocks: int
    payload_bytes: int
    physical_bytes: int
    deepest_chain_blocks: int
    """Blocks of the longest prefix that can be matched."""
    oldest_mtime_ns: int | None
    newest_mtime_ns: int | None
    unreadable_files: int
    """Files with a bad header; `fsck` says more."""
    quarantined_files: int


class StoreStat(msgspec.Struct, frozen=True):
    """What `stat` found."""

    location: str
    namespaces: tuple[NamespaceStat, ...]

    @property
    def blocks(self) -> int:
        return sum(space.blocks for space in self.namespaces)

    @property
    def physical_bytes(self) -> int:
        return sum(space.physical_bytes for space in self.namespaces)


class FsckReport(msgspec.Struct, frozen=True):
    """What `fsck` found, and what it repaired. Paths are below the store."""

    location: str
    namespaces: int
    checked_blocks: int
    sound_blocks: int
    checked_bytes: int
    faults: dict[str, int]
    """Bad files by `BlockFault` value."""
    bad_files: tuple[BadFile, ...]
    orphans: tuple[str, ...]
    """Sound blocks that no prefix leads to."""
    leftovers: tuple[str, ...]
    """Abandoned temporary files."""
    undescribed: tuple[str, ...]
    """Namespaces without a sound ``namespace.json``; the next block of theirs writes it again."""
    unavailable: tuple[BadFile, ...]
    """What can't be read now, whatever is in it: mend the disk or the permissions, or remove it by hand."""
    not_repaired: tuple[str, ...]
    """What could not be repaired, and why."""
    quarantined_files: int
    """Files in quarantine, those of this run included."""
    repaired: bool
    """Whether bad files were quarantined, orphans and leftovers deleted."""

    @property
    def is_clean(self) -> bool:
        """Nothing was found that needs repair."""
        return not (self.bad_files or self.orphans or self.leftovers or self.undescribed or self.unavailable)

    @property
    def is_repaired(self) -> bool:
        """Everything that was found has been repaired."""
        return self.repaired and not self.not_repaired and not self.unavailable


def inspectable(store: Store) -> Inspectable:
    """Returns `store` if it can be inspected. Raises StoreError when it can't."""
    if not isinstance(store, Inspectable):
        raise StoreError(
            f"the store at {store.location} can't be inspected: its package offers no `Inspectable` methods"
        )
    return store


def stat(store: Store) -> StoreStat:
    """What is in a store, from headers alone. Raises StoreError if it can't be read or can't be inspected."""
    store = inspectable(store)
    descriptions = store.descriptions()
    records, bad = _scanned(store)
    return StoreStat(
        store.location,
        tuple(
            _stat_namespace(root, description, records[root], len(bad[root]), store.quarantined(root))
            for root, description in sorted(descriptions.items())
            if description is not None or records[root] or bad[root] or store.quarantined(root)
        ),
    )


def fsck(store: Store, *, repair: bool = False, progress: Progress | None = None) -> FsckReport:
    """Check every byte of a store. `repair` quarantines bad files, deletes orphans and leftovers, and says what failed.

    Raises StoreError if the store can't be read or inspected.
    """
    store = inspectable(store)
    descriptions = store.descriptions()
    scanned, faulty = _scanned(store)
    sound: dict[BlockKey, BlockRecord] = {}
    faults = [file for files in faulty.values() for file in files]
    records = [record for of_root in scanned.values() for record in of_root]
    for done, record in enumerate(records, 1):
        fault = _fault(store, record, descriptions.get(record.root))
        if fault is None:
            sound[record.key] = record
        elif fault.cause is not BlockFault.MISSING:
            faults.append(fault)
        if progress is not None:
            progress(done, len(records))
    bad_files = tuple(file for file in faults if file.cause is not BlockFault.UNAVAILABLE)
    unavailable = tuple(file for file in faults if file.cause is BlockFault.UNAVAILABLE)
    orphans = _orphans(store, sound, {file.key for file in bad_files}, {file.key for file in unavailable})
    leftovers = tuple(map(_printable_text, store.leftovers()))
    return FsckReport(
        location=store.location,
        namespaces=len(descriptions),
        checked_blocks=len(sound) + len(bad_files),
        sound_blocks=len(sound),
        checked_bytes=sum(record.payload_bytes for record in sound.values()),
        faults={fault.value: n for fault in BlockFault if (n := sum(file.cause is fault for file in bad_files))},
        bad_files=tuple(map(_printable, bad_files)),
        orphans=tuple(block_name(record.root, record.key) for record in orphans),
        leftovers=leftovers,
        undescribed=_undescribed(descriptions, {*scanned, *faulty}),
        unavailable=tuple(map(_printable, unavailable)),
        not_repaired=_repair(store, bad_files, orphans) if repair else (),
        quarantined_files=sum(map(store.quarantined, descriptions)),
        repaired=repair,
    )


def _printable(file: BadFile) -> BadFile:
    return msgspec.structs.replace(file, path=_printable_text(file.path), detail=_printable_text(file.detail))


def _printable_text(text: str) -> str:
    """Returns `text` with escapes for what a terminal or JSON can't take: names of files may have any bytes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _undescribed(descriptions: dict[BlockKey, NamespaceDescription | None], used: set[BlockKey]) -> tuple[str, ...]:
    return tuple(root.hex() for root, found in descriptions.items() if found is None and root in used)


def _scanned(store: Inspectable) -> tuple[dict[BlockKey, list[BlockRecord]], dict[BlockKey, list[BadFile]]]:
    """Returns the blocks with a sound header, and the other files, by namespace."""
    records: dict[BlockKey, list[BlockRecord]] = defaultdict(list)
    bad: dict[BlockKey, list[BadFile]] = defaultdict(list)
    for record in store.scan(lambda file: bad[file.root].append(file)):
        records[record.root].append(record)
    return records, bad


def _fault(store: Inspectable, record: BlockRecord, description: NamespaceDescription | None) -> BadFile | None:
    """Returns what is wrong with a block; None if it is sound."""
    detail = "the block's geometry is not that of its namespace's description"
    cause = BlockFault.HEADER
    if description is None or record.payload_bytes == description.layout.full_block_bytes:
        try:
            store.verify(record.root, record.key)
        except BlockError as error:
            cause, detail = error.cause, error.detail
        except BlockUnavailableError as error:
            cause, detail = BlockFault.UNAVAILABLE, error.detail
        else:
            return None
    return BadFile(block_name(record.root, record.key), record.root, record.key, cause, detail)


def _orphans(
    store: Store, sound: dict[BlockKey, BlockRecord], bad: set[BlockKey | None], unavailable: set[BlockKey | None]
) -> list[BlockRecord]:
    """Returns sound blocks whose parent is neither a root nor sound nor written meanwhile, with their descendants.

    Nobody can say it of a block whose parent can't be read now.
    """
    children = _children_of(sound.values())
    orphans = []
    for parent, below in children.items():
        if parent in sound or parent == below[0].root or parent in unavailable:
            continue
        try:
            lost = parent in bad or ancestors(store, below[0], sound) is None
        except BlockUnavailableError:
            continue
        if lost:
            orphans += [record for generation in _generations(children, parent) for record in generation]
    return orphans


def _repair(store: Inspectable, bad_files: Iterable[BadFile], orphans: list[BlockRecord]) -> tuple[str, ...]:
    """Quarantine what is still bad, delete orphans whose parent is still missing, parents first, and leftovers.

    Returns what could not be done: one file's failure holds up no other's repair.
    """
    failed = []

    def attempt(repair: Callable[..., object], *arguments: object, **options: object) -> None:
        try:
            repair(*arguments, **options)
        except StoreError as error:
            failed.append(str(error))

    for file in bad_files:
        if file.key is None:
            attempt(store.set_aside, file)
        else:
            attempt(store.quarantine, file.root, file.key)
    for record in orphans:
        attempt(delete_orphan, store, record.root, record.parent, record.key)
    attempt(store.leftovers, remove=True)
    return tuple(failed)


def _stat_namespace(
    root: BlockKey,
    description: NamespaceDescription | None,
    records: list[BlockRecord],
    unreadable_files: int,
    quarantined_files: int,
) -> NamespaceStat:
    return NamespaceStat(
        namespace=root.hex(),
        description=description,
        blocks=len(records),
        payload_bytes=sum(record.payload_bytes for record in records),
        physical_bytes=sum(record.physical_bytes for record in records),
        deepest_chain_blocks=sum(1 for _ in _generations(_children_of(records), root)),
        oldest_mtime_ns=min((record.mtime_ns for record in records), default=None),
        newest_mtime_ns=max((record.mtime_ns for record in records), default=None),
        unreadable_files=unreadable_files,
        quarantined_files=quarantined_files,
    )


def _children_of(records: Iterable[BlockRecord]) -> dict[BlockKey, list[BlockRecord]]:
    children: dict[BlockKey, list[BlockRecord]] = defaultdict(list)
    for record in records:
        children[record.parent].append(record)
    return dict(children)


def _generations(children: dict[BlockKey, list[BlockRecord]], top: BlockKey) -> Iterator[list[BlockRecord]]:
    """The children of `top`, their children, and so on."""
    generation = children.get(top, [])
    while generation:
        yield generation
        generation = [child for record in generation for child in children.get(record.key, ())]
