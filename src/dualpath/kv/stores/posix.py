"""`PosixStore`: Full Blocks on any mounted file system.

Theory of operation. There is one file per Full Block (see `block_file`), in a folder per namespace (see `naming`). A
block is written under a temporary name, flushed, read back and checked, and renamed into place: it is visible only when
it is whole, checked and durable. A crash leaves a temporary file, which `prepare` removes. Concurrent writers of one
key each rename a valid file. If a folder was removed, the next write makes it again; a namespace has one only while it
has blocks (see `posix_namespaces`).
"""

import logging
import os
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from dualpath.kv.keys import BlockKey, Namespace
from dualpath.kv.stores.block_file import (
    CHUNK_BYTES,
    BlockHeader,
    Pace,
    check_namespace,
    check_root,
    open_block,
    physical_bytes,
    read_header,
    read_payload,
    unpaced,
)
from dualpath.kv.stores.entries import NOT_THERE, remove_all
from dualpath.kv.stores.errors import BlockError, BlockFault, BlockUnavailableError, StoreError, StoreWriteError
from dualpath.kv.stores.naming import describe, described
from dualpath.kv.stores.posix_directory import StoreDirectory, store_errors
from dualpath.kv.stores.posix_namespaces import NamespaceFolders
from dualpath.kv.stores.protocol import (
    BadFile,
    BlockBuffer,
    BlockRecord,
    NamespaceDescription,
    bytes_of_block,
    check_keys,
    room_for_block,
)
from dualpath.spec.whole_file import Draft, fsync_directory

logger = logging.getLogger(__name__)


class PosixStore:
    """A `Store` and `Inspectable` in a directory. The module docstring says how it works. Making one touches no file.

    `durable` flushes to the disk, `verify_writes` reads back what was written, `verify_reads` checks every layer that
    is read (headers always are). Turn them off only to measure what they cost.
    """

    def __init__(
        self, directory: Path | str, *, durable: bool = True, verify_writes: bool = True, verify_reads: bool = True
    ) -> None:
        self.location = str(directory)
        self._files = StoreDirectory(Path(directory))
        self._folders = NamespaceFolders(self._files, durable=durable)
        self._durable = durable
        self._verify_writes = verify_writes
        self._verify_reads = verify_reads
        self._thread = threading.local()

    # ── what serving asks ───────────────────────────────────────────────────────────────────────────────────────────

    def prepare(self, space: Namespace) -> None:
        """See `Store.prepare`. Also removes what killed writers have left in the namespace, where it may."""
        with store_errors(f"the store at {self.location} cannot be opened"):
            self._files.make_store()
        try:
            remove_all(self._files.leftovers(space.root))
            if self._files.description(space.root) != describe(space) and self._files.shards(space.root):
                self._folders.describe(space.root, describe(space))
        except OSError as error:  # a store that can't be written to can be read
            logger.warning("the store at %s cannot be tidied: %s", self.location, error)

    def write(
        self, space: Namespace, key: BlockKey, parent: BlockKey, payload: BlockBuffer, pace: Pace = unpaced
    ) -> int:
        """See `Store.write`. Only writing the payload is paced, not checking an existing block."""
        check_keys(key, parent)
        view = bytes_of_block(payload, space.layout)
        try:
            return self._write(space, key, parent, view, pace)
        except StoreWriteError as error:
            if not isinstance(error.__cause__, OSError) or error.__cause__.errno not in NOT_THERE:
                raise
        return self._write(space, key, parent, view, pace)  # its folder was removed meanwhile, with the draft in it

    def read(
        self,
        space: Namespace,
        key: BlockKey,
        into: BlockBuffer,
        pace: Pace = unpaced,
        layers: Collection[int] | None = None,
    ) -> None:
        """See `Store.read`. `pace` counts payload bytes, without the header."""
        view = room_for_block(into, space.layout)
        try:
            with open_block(self._files.block_path(space.root, key), key) as fd:
                header = check_namespace(read_header(fd, key), space)
                read_payload(fd, header, view, pace, layers=layers, verify=self._verify_reads)
        except (BlockError, BlockUnavailableError) as error:
            bad = isinstance(error, BlockError) and error.cause is not BlockFault.MISSING
            if not bad and not self._files.is_there():
                raise StoreError(f"{self.location} cannot be opened: there is no such directory") from error
            raise

    def find(self, root: BlockKey, keys: Sequence[BlockKey]) -> list[BlockRecord]:
        """See `Store.find`. A look is one failed open; a find reads one page."""
        records: list[BlockRecord] = []
        try:
            for key in keys:
                found = self._files.examine(root, self._files.block_path(root, key))
                if not isinstance(found, BlockRecord):
                    break
                records.append(found)
        except BlockUnavailableError:
            if not records:
                raise
        return records

    def delete(self, root: BlockKey, key: BlockKey) -> bool:
        """See `Store.delete`. The last block of a namespace takes its folder with it."""
        path = self._files.block_path(root, key)
        with store_errors(f"block {key.hex()} cannot be deleted"):
            try:
                path.unlink()
            except IsADirectoryError:
                return self._files.set_aside(path, BlockFault.HEADER, folder=True)
            except OSError as error:
                if error.errno in NOT_THERE:
                    return False
                raise
        self._folders.remove_if_empty(root)
        return True

    def quarantine(self, root: BlockKey, key: BlockKey) -> BlockFault | None:
        """See `Store.quarantine`. A namespace keeps the newest `MAX_QUARANTINED_FILES` in its ``bad`` folder."""
        try:
            self.verify(root, key)
        except BlockError as error:
            if error.cause is BlockFault.MISSING:
                return None
            with store_errors(f"block {key.hex()} cannot be quarantined"):
                path = self._files.block_path(root, key)
                moved = self._files.set_aside(path, error.cause, unless=lambda at: self._is_sound(at, root, key))
            return error.cause if moved else None
        return None

    def scan(self, on_bad: Callable[[BadFile], None] | None = None) -> Iterator[BlockRecord]:
        """See `Store.scan`. Reads one page per block."""
        with store_errors(f"the store at {self.location} cannot be searched"):
            for found in self._files.everything():
                if isinstance(found, BlockRecord):
                    yield found
                elif on_bad is not None:
                    on_bad(found)

    # ── what `dualpath store` asks ──────────────────────────────────────────────────────────────────────────────────

    def descriptions(self) -> dict[BlockKey, NamespaceDescription | None]:
        """See `Inspectable.descriptions`."""
        with store_errors(f"the store at {self.location} cannot be searched"):
            return {root: described(self._files.description(root), root) for root in self._files.roots()}

    def verify(self, root: BlockKey, key: BlockKey) -> None:
        """See `Inspectable.verify`."""
        self._verify(self._files.block_path(root, key), root, key)

    def _verify(self, path: Path, root: BlockKey, key: BlockKey) -> None:
        with open_block(path, key) as fd:
            header = check_root(read_header(fd, key), root)
            read_payload(fd, header, self._scratch(header.payload_bytes), unpaced)

    def _is_sound(self, path: Path, root: BlockKey, key: BlockKey) -> bool:
        with suppress(BlockError, BlockUnavailableError):
            self._verify(path, root, key)
            return True
        return False

    def set_aside(self, file: BadFile) -> None:
        """See `Inspectable.set_aside`."""
        with store_errors(f"{file.path} cannot be quarantined"):
            self._files.set_aside(self._files.path / file.path, file.cause)

    def quarantined(self, root: BlockKey) -> int:
        """See `Inspectable.quarantined`."""
        with store_errors(f"the store at {self.location} cannot be searched"):
            return len(self._files.quarantined(root))

    def leftovers(self, *, remove: bool = False) -> list[str]:
        """See `Inspectable.leftovers`."""
        with store_errors(f"the store at {self.location} cannot be cleaned"):
            found = [path for root in self._files.roots() for path in self._files.leftovers(root)]
            if remove:
                remove_all(found)
            empty = [root for root in self._files.roots() if self._folders.is_abandoned(root)]
            for root in empty if remove else ():
                self._folders.remove_if_empty(root)
            return [str(path) for path in (*found, *map(self._files.namespace, empty))]

    # ── writing ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _write(self, space: Namespace, key: BlockKey, parent: BlockKey, view: memoryview, pace: Pace) -> int:
        """Try once. Raises StoreWriteError, caused by FileNotFoundError when a folder was removed meanwhile."""
        path = self._files.block_path(space.root, key)
        present = self._valid_block(space, key)
        with _write_errors(key, path):
            if present is not None:
                self._folders.settle(space, path.parent)
                if self._durable:  # the writer that renamed it into place may not have flushed the name yet
                    fsync_directory(path.parent)
                return present
            draft = self._folders.begin(space, path)
        try:
            header = BlockHeader.describing(view, space, key, parent)
            with _write_errors(key, path):
                draft.append(header.encode())
            for start in range(0, len(view), CHUNK_BYTES):
                chunk = view[start : start + CHUNK_BYTES]
                pace(len(chunk))
                with _write_errors(key, path):
                    draft.append(chunk)
            with _write_errors(key, path):
                return self._commit(draft, header, space)
        finally:
            draft.discard()

    def _valid_block(self, space: Namespace, key: BlockKey) -> int | None:
        try:
            with open_block(self._files.block_path(space.root, key), key) as fd:
                header = check_namespace(read_header(fd, key), space)
                read_payload(fd, header, self._scratch(header.payload_bytes), unpaced)
                return physical_bytes(os.fstat(fd))
        except (BlockError, BlockUnavailableError):
            return None

    def _commit(self, draft: Draft, header: BlockHeader, space: Namespace) -> int:
        """Flush, read back, rename. It drops the cached pages before reading back, so that the check reads the disk."""
        fd = draft.fd
        if self._durable:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if self._verify_writes:
            found = check_namespace(read_header(fd, header.key), space)
            if found != header:
                raise BlockError(header.key, BlockFault.HEADER, "the header that was read back is another")
            read_payload(fd, found, self._scratch(found.payload_bytes), unpaced)
        n_bytes = physical_bytes(os.fstat(fd))
        try:
            draft.commit(durable=self._durable)
        except IsADirectoryError:
            self._files.set_aside(self._files.block_path(space.root, header.key), BlockFault.HEADER, folder=True)
            draft.commit(durable=self._durable)
        return n_bytes

    def _scratch(self, n_bytes: int) -> memoryview:
        """Returns memory for one Full Block; each thread that checks keeps its own."""
        scratch: bytearray = getattr(self._thread, "scratch", bytearray())
        if len(scratch) < n_bytes:
            scratch = self._thread.scratch = bytearray(n_bytes)
        return memoryview(scratch)[:n_bytes]


@contextmanager
def _write_errors(key: BlockKey, path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, BlockError, BlockUnavailableError) as error:
        raise StoreWriteError(key, path, error) from error
