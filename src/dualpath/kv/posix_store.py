"""`PosixStore`: Full Blocks on any mounted file system.

Theory of operation. One file per Full Block (see `block_file`), in a directory per namespace (see `directory`). A block
is written under a temporary name, flushed, read back against its checksums, and renamed into place: nobody sees it
before it is whole, checked and durable. A crash leaves a temporary file, which the next open removes. Writers of one
key each rename a valid file.

A store may be used from many threads and processes at once; reading and hashing run without the GIL.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dualpath.kv.block_file import (
    CHUNK_BYTES,
    BlockError,
    BlockFault,
    BlockHeader,
    Pace,
    check_namespace,
    open_block,
    physical_bytes,
    read_header,
    read_payload,
    unpaced,
)
from dualpath.kv.directory import BadFile, BlockRecord, NamespaceDirectory, scan_file
from dualpath.kv.draft import Draft, fsync_directory
from dualpath.kv.keys import BlockKey, Namespace
from dualpath.kv.layout import KVLayout
from dualpath.kv.store import (
    BlockBuffer,
    StoreError,
    StoreWriteError,
    bytes_of_block,
    check_keys,
    check_layout,
    room_for_block,
)


class PosixStore:
    """A namespace in a directory of any mounted file system; the module's docstring tells how it works.

    `durable` flushes to the disk, `verify_writes` reads back what was written, `verify_reads` checks every layer that
    is read (headers always are). Turn them off only to measure what they cost. Opening makes the directory, describes
    the namespace in it and removes leftovers of killed processes. Raises StoreError; ValueError if `namespace` was made
    for another layout than `layout`.
    """

    def __init__(
        self,
        directory: Path | str,
        layout: KVLayout,
        namespace: Namespace,
        *,
        durable: bool = True,
        verify_writes: bool = True,
        verify_reads: bool = True,
    ) -> None:
        check_layout(namespace, layout)
        self._namespace = namespace
        self._layout = layout
        self._durable = durable
        self._verify_writes = verify_writes
        self._verify_reads = verify_reads
        self._directory = NamespaceDirectory(Path(directory) / namespace.hex)
        self._durable_shards: set[str] = set()
        self._thread = threading.local()
        with _store_errors(f"the store at {directory} cannot be opened"):
            self._directory.path.mkdir(parents=True, exist_ok=True)
            self._directory.describe(namespace)
            self._directory.remove_leftovers()

    @property
    def namespace(self) -> Namespace:
        return self._namespace

    def write(self, key: BlockKey, parent: BlockKey, payload: BlockBuffer, pace: Pace = unpaced) -> int:
        """See `Store.write`. Only the payload's own way to the disk is paced, not checking what is there."""
        check_keys(key, parent)
        view = bytes_of_block(payload, self._layout)
        path = self._directory.block_path(key)
        present = self._valid_block(key)
        if present is not None:
            with _write_errors(key, path):
                self._make_name_durable(path)
            return present
        header = BlockHeader.describing(view, self._namespace, key, parent)
        with _write_errors(key, path):
            self._make_shard(path.parent)
            draft = Draft(path)
        try:
            with _write_errors(key, path):
                draft.append(header.encode())
            for start in range(0, len(view), CHUNK_BYTES):
                chunk = view[start : start + CHUNK_BYTES]
                pace(len(chunk))
                with _write_errors(key, path):
                    draft.append(chunk)
            with _write_errors(key, path):
                return self._commit(draft, header)
        finally:
            draft.discard()

    def read(self, key: BlockKey, into: BlockBuffer, pace: Pace = unpaced) -> None:
        """See `Store.read`. `pace` counts payload bytes; the header comes on top."""
        view = room_for_block(into, self._layout)
        with open_block(self._directory.block_path(key), key) as fd:
            read_payload(fd, self._header(fd, key), view, pace, verify=self._verify_reads)

    def quarantine(self, key: BlockKey, cause: BlockFault) -> bool:
        """See `Store.quarantine`. A namespace keeps the newest `MAX_QUARANTINED_FILES` in its ``bad`` directory."""
        with _store_errors(f"block {key.hex()} cannot be quarantined"):
            return self._directory.set_aside(self._directory.block_path(key), cause)

    def delete(self, key: BlockKey) -> bool:
        """See `Store.delete`."""
        with _store_errors(f"block {key.hex()} cannot be deleted"):
            try:
                self._directory.block_path(key).unlink()
            except FileNotFoundError:
                return False
            return True

    def scan(self, on_bad: Callable[[BadFile], None] | None = None) -> Iterator[BlockRecord]:
        """See `Store.scan`. Reads one page a block. Blocks written or deleted meanwhile may or may not be seen."""
        with _store_errors(f"the store at {self._directory.path} cannot be searched"):
            paths = self._directory.block_paths()
            for path in paths:
                found = scan_file(path, self._header)
                if isinstance(found, BlockRecord):
                    yield found
                elif found is not None and on_bad is not None:
                    on_bad(found)

    def _header(self, fd: int, key: BlockKey) -> BlockHeader:
        return check_namespace(read_header(fd, key), self._namespace)

    def _valid_block(self, key: BlockKey) -> int | None:
        try:
            with open_block(self._directory.block_path(key), key) as fd:
                read_payload(fd, self._header(fd, key), self._scratch(), unpaced)
                return physical_bytes(os.fstat(fd))
        except BlockError:
            return None

    def _commit(self, draft: Draft, header: BlockHeader) -> int:
        """Flush, read back, rename. The pages are dropped in between, so that what is checked comes from the disk."""
        fd = draft.fd
        if self._durable:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if self._verify_writes:
            found = self._header(fd, header.key)
            if found != header:
                raise BlockError(header.key, BlockFault.HEADER, "the header that was read back is another")
            read_payload(fd, found, self._scratch(), unpaced)
        n_bytes = physical_bytes(os.fstat(fd))
        draft.commit(durable=self._durable)
        return n_bytes

    def _make_name_durable(self, path: Path) -> None:
        """For a block that another writer has renamed into place, perhaps without having flushed the name yet."""
        self._make_shard(path.parent)
        if self._durable:
            fsync_directory(path.parent)

    def _make_shard(self, shard: Path) -> None:
        """Every thread flushes the shard's name itself, unless one has done: a block must not outlive its directory."""
        if shard.name not in self._durable_shards:
            shard.mkdir(exist_ok=True)
            if self._durable:
                fsync_directory(self._directory.path)
            self._durable_shards.add(shard.name)

    def _scratch(self) -> memoryview:
        """Room for one Full Block, kept by each thread that writes."""
        if not hasattr(self._thread, "scratch"):
            self._thread.scratch = memoryview(bytearray(self._layout.full_block_bytes))
        scratch: memoryview = self._thread.scratch
        return scratch


@contextmanager
def _store_errors(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"{what}: {error}; check that the path exists and may be written") from error


@contextmanager
def _write_errors(key: BlockKey, path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, BlockError) as error:
        raise StoreWriteError(key, path, error) from error
