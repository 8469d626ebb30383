"""What is in a store on disk and whether it is sound: `stat` reads headers, `fsck` every byte.

Both need only the directory: a block's header tells its geometry, ``namespace.json`` the rest. Both may run beside a
live store: a file that vanishes meanwhile is passed over, a draft that is being written is left alone, and an orphan is
only called one if its parent's file is still not there at the end.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from dualpath.kv.block_file import (
    BlockError,
    BlockFault,
    BlockHeader,
    read_header,
    read_payload,
    unpaced,
)
from dualpath.kv.directory import (
    BadFile,
    BlockRecord,
    NamespaceDescription,
    NamespaceDirectory,
    namespace_directories,
    scan_file,
)
from dualpath.kv.draft import is_leftover
from dualpath.kv.keys import BlockKey
from dualpath.kv.store import StoreError

Progress = Callable[[int, int], None]
"""Called with files done and files in all, after each file."""


class NamespaceStat(msgspec.Struct, frozen=True):
    """One namespace of a store. `description` is None where ``namespace.json`` is missing or damaged."""

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
    """Files whose header is not sound: `fsck` tells more."""
    quarantined_files: int


class StoreStat(msgspec.Struct, frozen=True):
    """What `stat` found."""

    directory: str
    namespaces: tuple[NamespaceStat, ...]

    @property
    def blocks(self) -> int:
        return sum(space.blocks for space in self.namespaces)

    @property
    def physical_bytes(self) -> int:
        return sum(space.physical_bytes for space in self.namespaces)


class FsckReport(msgspec.Struct, frozen=True):
    """What `fsck` found, and what it repaired. Paths are strings, to be printed or written as JSON."""

    directory: str
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
    """Temporary files that nobody writes any more."""
    undescribed: tuple[str, ...]
    """Namespaces without a sound ``namespace.json``; opening the store with their model writes it anew."""
    quarantined_files: int
    """Files set aside, those of this run included."""
    repaired: bool
    """Whether bad files were quarantined, orphans and leftovers deleted."""

    @property
    def is_clean(self) -> bool:
        """Nothing was found that needs repair."""
        return not (self.bad_files or self.orphans or self.leftovers or self.undescribed)


def stat(directory: Path | str, progress: Progress | None = None) -> StoreStat:
    """What is in the store at `directory`, from file headers alone. Raises StoreError if it cannot be read."""
    with _readable(directory):
        spaces = namespace_directories(Path(directory))
        ticker = _Ticker(spaces, progress)
        return StoreStat(str(directory), tuple(_stat_namespace(space, ticker) for space in spaces))


def fsck(directory: Path | str, *, repair: bool = False, progress: Progress | None = None) -> FsckReport:
    """Check every byte of the store at `directory`.

    `repair` quarantines bad files and deletes orphans and leftovers. Raises StoreError if the store cannot be read or
    repaired.
    """
    with _readable(directory):
        spaces = namespace_directories(Path(directory))
        ticker = _Ticker(spaces, progress)
        checks = [_NamespaceCheck(space, ticker) for space in spaces]
        if repair:
            for check in checks:
                check.repair()
        bad_files = tuple(file for check in checks for file in check.bad_files)
        return FsckReport(
            directory=str(directory),
            namespaces=len(spaces),
            checked_blocks=sum(len(check.parent_of) + len(check.bad_files) for check in checks),
            sound_blocks=sum(len(check.parent_of) for check in checks),
            checked_bytes=sum(check.checked_bytes for check in checks),
            faults={fault.value: n for fault in BlockFault if (n := sum(file.cause is fault for file in bad_files))},
            bad_files=bad_files,
            orphans=tuple(str(path) for check in checks for path in check.orphans),
            leftovers=tuple(str(path) for check in checks for path in check.leftovers),
            undescribed=tuple(str(check.space.path) for check in checks if check.description is None),
            quarantined_files=sum(len(space.quarantined()) for space in spaces),
            repaired=repair,
        )


class _NamespaceCheck:
    """One namespace checked, byte by byte; then, if asked, repaired."""

    def __init__(self, space: NamespaceDirectory, ticker: "_Ticker") -> None:
        self.space = space
        self.description = space.description()
        self.parent_of: dict[BlockKey, BlockKey] = {}
        self.bad_files: list[BadFile] = []
        self.checked_bytes = 0
        self._scratch = bytearray()
        for path in space.block_paths():
            self._check(path)
            ticker.tick()
        self.leftovers = [path for path in space.drafts() if is_leftover(path)]
        self.orphans = [space.block_path(key) for key in self._orphans()]

    def repair(self) -> None:
        """Quarantine bad files; delete orphans and leftovers."""
        for file in self.bad_files:
            self.space.set_aside(Path(file.path), file.cause)
        for path in self.orphans:
            path.unlink(missing_ok=True)
        self.space.remove_leftovers()

    def _check(self, path: Path) -> None:
        found = scan_file(path, self._verified_header)
        if isinstance(found, BadFile):
            self.bad_files.append(found)
        elif found is not None:
            self.parent_of[found.key] = found.parent
            self.checked_bytes += found.payload_bytes

    def _verified_header(self, fd: int, key: BlockKey) -> BlockHeader:
        header = _own_header(self.space, fd, key)
        layout = self.description.layout if self.description is not None else None
        if layout and (header.layers, header.layer_block_bytes) != (layout.layers, layout.layer_block_bytes):
            raise BlockError(key, BlockFault.HEADER, "the block's geometry is not that of namespace.json")
        if len(self._scratch) < header.payload_bytes:
            self._scratch = bytearray(header.payload_bytes)
        read_payload(fd, header, memoryview(self._scratch)[: header.payload_bytes], unpaced)
        return header

    def _orphans(self) -> Iterator[BlockKey]:
        """Sound blocks below a parent that is no root, not sound and not written meanwhile; and all below them."""
        children = _children_of(self.parent_of.items())
        bad_keys = {file.key for file in self.bad_files}
        for parent in children:
            if parent in self.parent_of or parent == _root_of(self.space):
                continue
            if parent in bad_keys or not self.space.block_path(parent).exists():
                for generation in _generations(children, parent):
                    yield from generation


class _Ticker:
    """Counts files for a `Progress`."""

    def __init__(self, spaces: list[NamespaceDirectory], progress: Progress | None) -> None:
        self._progress = progress
        self._done = 0
        self._total = sum(1 for space in spaces for _ in space.block_paths()) if progress is not None else 0

    def tick(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, max(self._done, self._total))


def _stat_namespace(space: NamespaceDirectory, ticker: _Ticker) -> NamespaceStat:
    records: list[BlockRecord] = []
    unreadable_files = 0
    for path in space.block_paths():
        found = scan_file(path, lambda fd, key: _own_header(space, fd, key))
        ticker.tick()
        if isinstance(found, BlockRecord):
            records.append(found)
        elif found is not None:
            unreadable_files += 1
    children = _children_of((record.key, record.parent) for record in records)
    return NamespaceStat(
        namespace=space.path.name,
        description=space.description(),
        blocks=len(records),
        payload_bytes=sum(record.payload_bytes for record in records),
        physical_bytes=sum(record.physical_bytes for record in records),
        deepest_chain_blocks=sum(1 for _ in _generations(children, _root_of(space))),
        oldest_mtime_ns=min((record.mtime_ns for record in records), default=None),
        newest_mtime_ns=max((record.mtime_ns for record in records), default=None),
        unreadable_files=unreadable_files,
        quarantined_files=len(space.quarantined()),
    )


def _own_header(space: NamespaceDirectory, fd: int, key: BlockKey) -> BlockHeader:
    header = read_header(fd, key)
    if header.namespace != _root_of(space):
        raise BlockError(key, BlockFault.HEADER, f"the file is of namespace {header.namespace.hex()}")
    return header


def _root_of(space: NamespaceDirectory) -> BlockKey:
    return bytes.fromhex(space.path.name)


def _children_of(links: Iterable[tuple[BlockKey, BlockKey]]) -> dict[BlockKey, list[BlockKey]]:
    children: dict[BlockKey, list[BlockKey]] = defaultdict(list)
    for key, parent in links:
        children[parent].append(key)
    return dict(children)


def _generations(children: dict[BlockKey, list[BlockKey]], top: BlockKey) -> Iterator[list[BlockKey]]:
    """The children of `top`, their children, and so on."""
    generation = children.get(top, [])
    while generation:
        yield generation
        generation = [child for key in generation for child in children.get(key, ())]


@contextmanager
def _readable(directory: Path | str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"the store at {directory} cannot be inspected: {error}; give a store's directory") from error
