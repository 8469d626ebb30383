"""`ObjectStore`: Full Blocks as objects of a bucket, one each, named and laid out like the files of `PosixStore`.

Theory of operation. ``<namespace hex>/ab/ab…cd.kv`` holds a header and the payload (see `block_file`). So if a server
keeps objects as files, ``dualpath store fsck`` can check its directory, too.

* A block is **written** in one PUT, which appears whole or not at all, then read back and checked; only then does
  `write` return, so nothing is published before it is checked. A crash in between leaves a block that is unknown until
  a look finds it; every read of it is checked like any other.
* It is **read** in one GET. Its pieces are copied to their place in the caller's memory as they arrive, and each layer
  is checked when it is complete.
* It is **found again** by listing. Headers are fetched `HEADER_REQUESTS` at a time, because a list has no parents.

A bad object raises `BlockError`, one that its server refuses `BlockUnavailableError`. A server that does not answer
raises `StoreError`, and no block is to blame.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial

from dualpath.kv.keys import BlockKey, Namespace
from dualpath.kv.stores.arriving import Arriving, receive_layers
from dualpath.kv.stores.block_file import (
    CHUNK_BYTES,
    BlockHeader,
    Pace,
    check_namespace,
    check_root,
    decode_header,
    unpaced,
)
from dualpath.kv.stores.bucket import Body, Bucket, ObjectError, ObjectRecord
from dualpath.kv.stores.errors import BlockError, BlockFault, BlockUnavailableError, StoreError, StoreWriteError
from dualpath.kv.stores.naming import (
    BAD,
    MAX_QUARANTINED_FILES,
    bad_name,
    block_name,
    described,
    key_of,
)
from dualpath.kv.stores.object_namespaces import ObjectNamespaces
from dualpath.kv.stores.protocol import (
    BadFile,
    BlockBuffer,
    BlockRecord,
    NamespaceDescription,
    bytes_of_block,
    check_keys,
    room_for_block,
)

MAX_QUARANTINED_BYTES = 1 << 28
"""A bad object of more bytes passes through no memory of ours: it is deleted."""
HEADER_REQUESTS = 16
"""Headers fetched at a time: a server answers them in the time of a few round trips."""


class ObjectStore:
    """A `Store` and `Inspectable` in a bucket; the module docstring says how it works.

    `verify_writes` reads back what was written, `verify_reads` checks every layer that is read (headers always are).
    """

    def __init__(self, bucket: Bucket, *, verify_writes: bool = True, verify_reads: bool = True) -> None:
        self.location = bucket.location
        self._bucket = bucket
        self._verify_writes = verify_writes
        self._verify_reads = verify_reads
        self._spaces = ObjectNamespaces(bucket)

    # ── what serving asks ───────────────────────────────────────────────────────────────────────────────────────────

    def prepare(self, space: Namespace) -> None:
        """See `Store.prepare`. Asks whether the server answers."""
        self._spaces.description(space.root)

    def write(
        self, space: Namespace, key: BlockKey, parent: BlockKey, payload: BlockBuffer, pace: Pace = unpaced
    ) -> int:
        """See `Store.write`. Only sending the payload is paced, not checking an existing block."""
        check_keys(key, parent)
        view = bytes_of_block(payload, space.layout)
        name = block_name(space.root, key)
        try:
            self._spaces.describe(space)
            present = self._valid_block(space, key)
        except StoreError as error:
            raise StoreWriteError(key, name, error) from error
        if present is not None:
            return present
        header = BlockHeader.describing(view, space, key, parent)
        for start in range(0, len(view), CHUNK_BYTES):
            pace(min(CHUNK_BYTES, len(view) - start))
        try:
            self._bucket.put(name, [header.encode(), view])
            if self._verify_writes and self._fetch(space, key, memoryview(bytearray(len(view)))) != header:
                raise BlockError(key, BlockFault.HEADER, "the header that was read back is another")
        except BlockError as error:
            with suppress(StoreError):  # it must not be found; if the server is out of reach, readers check it anyway
                self._bucket.delete(name)
            raise StoreWriteError(key, f"{self.location}/{name}", error) from error
        except StoreError as error:  # it may be there and sound, also since before: readers check it
            raise StoreWriteError(key, f"{self.location}/{name}", error) from error
        self._spaces.note_block(space.root, key)
        return header.header_bytes + header.payload_bytes

    def read(
        self,
        space: Namespace,
        key: BlockKey,
        into: BlockBuffer,
        pace: Pace = unpaced,
        layers: Collection[int] | None = None,
    ) -> None:
        """See `Store.read`. `pace` counts payload bytes as they are taken from the connection.

        Layers are ranges of their own; what lies between two of them is taken too where it is shorter than
        `arriving.WORTH_A_REQUEST_BYTES`.
        """
        room = room_for_block(into, space.layout)
        if layers is None:
            self._fetch(space, key, room, pace, verify=self._verify_reads)
        else:
            with _about(key):
                get = partial(self._get, space.root, key)
                receive_layers(get, space, key, room, pace, layers, verify=self._verify_reads)

    def find(self, root: BlockKey, keys: Sequence[BlockKey]) -> list[BlockRecord]:
        """See `Store.find`. A look is one HEAD; once the first block is found, more are sent together."""
        records: list[BlockRecord] = []
        try:
            with ThreadPoolExecutor(HEADER_REQUESTS, thread_name_prefix="store-find") as requests:
                for start, stop in _batches(len(keys)):
                    for found in requests.map(lambda key: self._look(root, key), keys[start:stop]):
                        if not isinstance(found, BlockRecord):
                            return records
                        records.append(found)
        except BlockUnavailableError:
            if not records:
                raise
        return records

    def delete(self, root: BlockKey, key: BlockKey) -> bool:
        """See `Store.delete`. The last block of a namespace takes its description and its bad blocks with it."""
        name = block_name(root, key)
        if self._bucket.record(name) is None:
            return False
        self._bucket.delete(name)
        with suppress(StoreError):  # the block is gone, and what stays is small
            self._spaces.note_deleted(root, key)
        return True

    def quarantine(self, root: BlockKey, key: BlockKey) -> BlockFault | None:
        """See `Store.quarantine`. A namespace keeps the newest `MAX_QUARANTINED_FILES` below ``bad``."""
        try:
            self.verify(root, key)
        except BlockError as error:
            there = error.cause is not BlockFault.MISSING and self._set_aside(block_name(root, key), error.cause)
            return error.cause if there else None
        return None

    def scan(self, on_bad: Callable[[BadFile], None] | None = None) -> Iterator[BlockRecord]:
        """See `Store.scan`. Fetches one header a block."""
        with ThreadPoolExecutor(HEADER_REQUESTS, thread_name_prefix="store-scan") as requests:
            for root in self._spaces.roots():
                for listed in self._spaces.listed(root):
                    found = [listed] if isinstance(listed, BadFile) else requests.map(partial(self._seen, root), listed)
                    for record in found:
                        if isinstance(record, BlockRecord):
                            self._spaces.note_block(root, record.key)
                            yield record
                        elif record is not None and on_bad is not None:
                            on_bad(record)

    # ── what `dualpath store` asks ──────────────────────────────────────────────────────────────────────────────────

    def descriptions(self) -> dict[BlockKey, NamespaceDescription | None]:
        """See `Inspectable.descriptions`."""
        return {root: described(self._spaces.description(root), root) for root in self._spaces.roots()}

    def verify(self, root: BlockKey, key: BlockKey) -> None:
        """See `Inspectable.verify`."""
        with _about(key):
            arriving = Arriving(self._get(root, key))
            header = check_root(decode_header(key, arriving.n_bytes, arriving.head), root)
            arriving.payload(header, memoryview(bytearray(header.payload_bytes)), unpaced, verify=True)

    def set_aside(self, file: BadFile) -> None:
        """See `Inspectable.set_aside`."""
        self._set_aside(file.path, file.cause)

    def quarantined(self, root: BlockKey) -> int:
        """See `Inspectable.quarantined`."""
        with suppress(ObjectError):
            return len(self._bucket.folder(f"{root.hex()}/{BAD}")[1])
        return 0

    def leftovers(self, *, remove: bool = False) -> list[str]:
        """See `Inspectable.leftovers`. A PUT is whole or not at all, so there are only namespaces without blocks."""
        abandoned = [root for root in self._spaces.roots() if self._spaces.is_abandoned(root)]
        for root in abandoned if remove else ():
            self._spaces.remove_if_empty(root)
        return [root.hex() for root in abandoned]

    # ── one object ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _look(self, root: BlockKey, key: BlockKey) -> BlockRecord | BadFile | None:
        with _about(key):
            found = self._bucket.record(block_name(root, key))
        return None if found is None else self._examine(root, found)

    def _seen(self, root: BlockKey, found: ObjectRecord) -> BlockRecord | BadFile | None:
        """`_examine`, for reports: an object that can't be read now is one, too. Raises StoreError."""
        try:
            return self._examine(root, found)
        except BlockUnavailableError as error:
            return BadFile(found.name, root, error.key, BlockFault.UNAVAILABLE, error.detail)

    def _examine(self, root: BlockKey, found: ObjectRecord) -> BlockRecord | BadFile | None:
        """Returns the record from an object's name and header; None if it has vanished.

        Raises StoreError, BlockUnavailableError.
        """
        key = key_of(found.name)
        if key is None:
            return BadFile(found.name, root, None, BlockFault.HEADER, "the object's name and place fit no key")

        def head(n_bytes: int) -> bytes:
            raw = self._bucket.head_bytes(found.name, n_bytes) if found.n_bytes else b""
            if raw is None:
                raise BlockError(key, BlockFault.MISSING, f"{found.name} has vanished")
            return raw

        try:
            with _about(key):
                header = check_root(decode_header(key, found.n_bytes, head), root)
        except BlockError as error:
            gone = error.cause is BlockFault.MISSING
            return None if gone else BadFile(found.name, root, key, error.cause, error.detail)
        return BlockRecord(root, key, header.parent, header.payload_bytes, found.n_bytes, found.mtime_ns)

    def _valid_block(self, space: Namespace, key: BlockKey) -> int | None:
        """Returns the size of an existing sound block; None if there is none to be had. Raises StoreError."""
        try:
            header = self._fetch(space, key, memoryview(bytearray(space.layout.full_block_bytes)))
        except (BlockError, BlockUnavailableError):
            return None
        return header.header_bytes + header.payload_bytes

    def _get(self, root: BlockKey, key: BlockKey, ends: tuple[int, int] | None = None) -> Body:
        body = self._bucket.get(block_name(root, key), ends)
        if body is None:
            raise BlockError(key, BlockFault.MISSING, f"{self.location}/{block_name(root, key)} is not there")
        return body

    def _fetch(
        self, space: Namespace, key: BlockKey, into: memoryview, pace: Pace = unpaced, *, verify: bool = True
    ) -> BlockHeader:
        """Read a block's payload into `into` and return its header. Raises BlockError, StoreError."""
        with _about(key):
            arriving = Arriving(self._get(space.root, key))
            header = check_namespace(decode_header(key, arriving.n_bytes, arriving.head), space)
            arriving.payload(header, into, pace, verify=verify)
        return header

    def _set_aside(self, name: str, cause: BlockFault) -> bool:
        """Move a bad object into quarantine. Returns False if it is gone already."""
        body = self._bucket.get(name)
        if body is None:
            return False
        if body.n_bytes <= MAX_QUARANTINED_BYTES:
            self._bucket.put(bad_name(name, cause), list(body.pieces))
        self._bucket.delete(name)
        folder = bad_name(name, cause).rpartition("/")[0]
        with suppress(ObjectError):  # it is done; what can't be deleted now is surplus next time
            oldest_first = sorted(self._bucket.folder(folder)[1], key=lambda record: record.mtime_ns)
            for surplus in oldest_first[:-MAX_QUARANTINED_FILES]:
                self._bucket.delete(surplus.name)
        return True


def _batches(n: int) -> Iterator[tuple[int, int]]:
    """The first alone, then `HEADER_REQUESTS` at a time."""
    yield 0, 1
    yield from ((start, start + HEADER_REQUESTS) for start in range(1, n, HEADER_REQUESTS))


@contextmanager
def _about(key: BlockKey) -> Iterator[None]:
    """Turn what is said of one object into what it says of the block of `key`."""
    try:
        yield
    except ObjectError as error:
        raise BlockUnavailableError(key, str(error)) from error
