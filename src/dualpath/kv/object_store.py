"""`ObjectStore`: Full Blocks as objects of a bucket, one each, named and laid out like the files of `PosixStore`.

Theory of operation. ``<namespace hex>/ab/ab…cd.kv`` holds a header and the payload (see `block_file`); so the directory
behind a server that keeps objects as files is a store that ``dualpath store fsck`` can check.

* **Written** in one PUT, which appears whole or not at all, then read back against its checksums; only then is the
  caller told, so that nothing is published before it is checked. A crash in between leaves a block that nobody knows of
  before the next scan, and whose every read is checked like any other's.
* **Read** in one GET. Its pieces are copied to their place in the caller's memory while the rest is under way, and each
  layer is checked when it is whole.
* **Found again** by listing: the headers of a shard are fetched `SCAN_REQUESTS` at a time, since a list tells no
  parents.

An object that is wrong is a `BlockError`. A server that does not answer is a `StoreError`, and no block is to blame.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from dualpath.kv.block_file import (
    CHUNK_BYTES,
    BlockError,
    BlockFault,
    BlockHeader,
    LayerChecks,
    Pace,
    check_namespace,
    decode_header,
    unpaced,
)
from dualpath.kv.bucket import Body, Bucket, ObjectRecord
from dualpath.kv.directory import (
    BAD,
    BLOCK_SUFFIX,
    DESCRIPTION,
    MAX_QUARANTINED_FILES,
    BadFile,
    BlockRecord,
    block_name,
    describe,
    is_shard_name,
    key_of,
)
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

SCAN_REQUESTS = 16
"""Headers fetched at a time: a server answers them in the time of a few round trips."""


class ObjectStore:
    """A namespace in a bucket; the module's docstring tells how it works.

    `verify_writes` reads back what was written, `verify_reads` checks every layer that is read (headers always are).
    Opening describes the namespace in the bucket. Raises StoreError; ValueError if `namespace` was made for another
    layout than `layout`.
    """

    def __init__(
        self,
        bucket: Bucket,
        layout: KVLayout,
        namespace: Namespace,
        *,
        verify_writes: bool = True,
        verify_reads: bool = True,
    ) -> None:
        check_layout(namespace, layout)
        self._bucket = bucket
        self._layout = layout
        self._namespace = namespace
        self._verify_writes = verify_writes
        self._verify_reads = verify_reads
        self._header_bytes = BlockHeader(b"", b"", b"", layout.layers, layout.layer_block_bytes, ()).header_bytes
        name, text = f"{namespace.hex}/{DESCRIPTION}", describe(namespace)
        if bucket.head_bytes(name, len(text) + 1) != text:
            bucket.put(name, [text])

    @property
    def namespace(self) -> Namespace:
        return self._namespace

    def write(self, key: BlockKey, parent: BlockKey, payload: BlockBuffer, pace: Pace = unpaced) -> int:
        """See `Store.write`. Only the payload's way out is paced, not checking what is there."""
        check_keys(key, parent)
        view = bytes_of_block(payload, self._layout)
        name = self._name(key)
        try:
            present = self._valid_block(key)
        except StoreError as error:
            raise StoreWriteError(key, name, error) from error
        if present is not None:
            return present
        header = BlockHeader.describing(view, self._namespace, key, parent)
        for start in range(0, len(view), CHUNK_BYTES):
            pace(min(CHUNK_BYTES, len(view) - start))
        try:
            self._bucket.put(name, [header.encode(), view])
            if self._verify_writes and self._fetch(key, bytearray(len(view)), unpaced, verify=True) != header:
                raise BlockError(key, BlockFault.HEADER, "the header that was read back is another")
        except (StoreError, BlockError) as error:
            self._withdraw(name)
            raise StoreWriteError(key, f"{self._bucket.location}/{name}", error) from error
        return header.header_bytes + header.payload_bytes

    def read(self, key: BlockKey, into: BlockBuffer, pace: Pace = unpaced) -> None:
        """See `Store.read`. `pace` counts payload bytes as they are taken from the connection."""
        self._fetch(key, room_for_block(into, self._layout), pace, verify=self._verify_reads)

    def quarantine(self, key: BlockKey, cause: BlockFault) -> bool:
        """See `Store.quarantine`. A namespace keeps the newest `MAX_QUARANTINED_FILES` below ``bad``."""
        body = self._bucket.get(self._name(key))
        if body is None:
            return False
        bad = f"{self._namespace.hex}/{BAD}"
        self._bucket.put(f"{bad}/{key.hex()}.{cause.value}", list(body.pieces))
        self._bucket.delete(self._name(key))
        oldest_first = sorted(self._bucket.folder(bad)[1], key=lambda record: record.mtime_ns)
        for surplus in oldest_first[:-MAX_QUARANTINED_FILES]:
            self._bucket.delete(surplus.name)
        return True

    def delete(self, key: BlockKey) -> bool:
        """See `Store.delete`."""
        if self._bucket.record(self._name(key)) is None:
            return False
        self._bucket.delete(self._name(key))
        return True

    def scan(self, on_bad: Callable[[BadFile], None] | None = None) -> Iterator[BlockRecord]:
        """See `Store.scan`. Fetches one header a block. Blocks written or deleted meanwhile may or may not be seen."""
        shards = [name for name in self._bucket.folder(self._namespace.hex)[0] if is_shard_name(name)]
        with ThreadPoolExecutor(SCAN_REQUESTS, thread_name_prefix="store-scan") as requests:
            for shard in shards:
                objects = self._bucket.folder(f"{self._namespace.hex}/{shard}")[1]
                blocks = [found for found in objects if found.name.endswith(BLOCK_SUFFIX)]
                for record in requests.map(self._scan_object, blocks):
                    if isinstance(record, BlockRecord):
                        yield record
                    elif record is not None and on_bad is not None:
                        on_bad(record)

    def _scan_object(self, found: ObjectRecord) -> BlockRecord | BadFile | None:
        """What an object's name and header tell; None if it has vanished. Raises StoreError."""
        where = f"{self._bucket.location}/{found.name}"
        key = key_of(Path(found.name))
        if key is None:
            return BadFile(where, None, BlockFault.HEADER, "the object's name and place fit no key")
        raw = self._bucket.head_bytes(found.name, self._header_bytes) if found.n_bytes else b""
        if raw is None:
            return None
        try:
            header = self._header(key, found.n_bytes, raw)
        except BlockError as error:
            return BadFile(where, key, error.cause, error.detail)
        return BlockRecord(key, header.parent, header.payload_bytes, found.n_bytes, found.mtime_ns)

    def _name(self, key: BlockKey) -> str:
        return f"{self._namespace.hex}/{block_name(key)}"

    def _header(self, key: BlockKey, n_bytes: int, raw: bytes) -> BlockHeader:
        return check_namespace(decode_header(key, n_bytes, lambda wanted: raw[:wanted]), self._namespace)

    def _valid_block(self, key: BlockKey) -> int | None:
        """The bytes of the block that is there already, if it is sound. Raises StoreError."""
        try:
            header = self._fetch(key, bytearray(self._layout.full_block_bytes), unpaced, verify=True)
        except BlockError:
            return None
        return header.header_bytes + header.payload_bytes

    def _fetch(self, key: BlockKey, into: memoryview | bytearray, pace: Pace, *, verify: bool) -> BlockHeader:
        """Header and payload of a block, the latter into `into`. Raises BlockError, StoreError."""
        body = self._bucket.get(self._name(key))
        if body is None:
            raise BlockError(key, BlockFault.MISSING, f"{self._bucket.location}/{self._name(key)} is not there")
        raw, rest = _split(body, self._header_bytes)
        header = self._header(key, body.n_bytes, raw)
        _copy_payload(rest, header, memoryview(into), pace, verify)
        return header

    def _withdraw(self, name: str) -> None:
        """After a failed write: a later scan shall not find it. Where the server is out of reach, readers check it."""
        with suppress(StoreError):
            self._bucket.delete(name)


def _split(body: Body, header_bytes: int) -> tuple[bytes, Iterator[memoryview]]:
    """The first `header_bytes` of an object, fewer if it ends before, and the pieces that follow."""
    raw = b""
    for piece in body.pieces:
        missing = header_bytes - len(raw)
        raw += piece[:missing]
        if len(piece) > missing:
            return raw, _chain(piece[missing:], body.pieces)
    return raw, iter(())


def _chain(first: memoryview, rest: Iterator[memoryview]) -> Iterator[memoryview]:
    yield first
    yield from rest


def _copy_payload(
    pieces: Iterator[memoryview], header: BlockHeader, into: memoryview, pace: Pace, verify: bool
) -> None:
    """Put a payload in its place, holding each layer against its checksum. Raises BlockError, StoreError."""
    filled, layers = 0, LayerChecks(header, into)
    for piece in pieces:
        while piece:
            chunk = piece[: min(CHUNK_BYTES, len(into) - filled)]
            if not chunk:
                raise BlockError(header.key, BlockFault.HEADER, "more bytes came than the server had announced")
            pace(len(chunk))
            into[filled : filled + len(chunk)] = chunk
            filled, piece = filled + len(chunk), piece[len(chunk) :]
            if verify:
                layers.check(filled)
    if filled < len(into):
        raise BlockError(header.key, BlockFault.TRUNCATED, f"the object ended after {filled} payload bytes")
