"""The file of one Full Block: a header of whole pages, then the payload at a page-aligned offset.

::

    0        fixed fields: magic, version, header bytes, layers, layer block bytes, namespace, key, parent key
    80       one xxh3_64 per layer, of that layer's byte range of the payload
    …        zeros
    H - 8    xxh3_64 of the header's first H - 8 bytes                      H = 4096, or more 4096s for > 501 layers
    H        payload: the Full Block, layer after layer, exactly layers × layer_block_bytes

The payload starts on a page, so that it can be read straight into a page-aligned buffer. The checksums find decay and
torn writes; they do not protect against forged files. A fault raises `BlockError`,
and a system error `BlockUnavailableError`: it says nothing of the block.
"""

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import xxhash

from dualpath.kv.keys import BlockKey, Namespace
from dualpath.kv.stores.entries import NotAFileError, open_file
from dualpath.kv.stores.errors import BlockError, BlockFault, BlockUnavailableError

PAGE_BYTES = 4096
CHUNK_BYTES = 1 << 20
"""Most bytes read, written or hashed at once: small enough to pace, large enough to amortise a system call."""

Pace = Callable[[int], None]
"""Called with a number of payload bytes before they move; blocks until they may move. Its exceptions are passed on."""

_MAGIC = b"DPKVBLK\n"
_VERSION = 1
_MAX_LAYERS = 1 << 16
_FIXED = struct.Struct("<8sIIIIQ16s16s16s")
_CHECKSUM = struct.Struct("<Q")


class BlockHeader(msgspec.Struct, frozen=True, gc=False):
    """The header of a block file."""

    namespace: BlockKey
    key: BlockKey
    parent: BlockKey
    layers: int
    layer_block_bytes: int
    checksums: tuple[int, ...]

    @classmethod
    def describing(cls, payload: memoryview, space: Namespace, key: BlockKey, parent: BlockKey) -> "BlockHeader":
        """Returns the header of a Full Block of `space`, with its checksums."""
        layout = space.layout
        checksums = payload_checksums(payload, layout.layer_block_bytes)
        return cls(space.root, key, parent, layout.layers, layout.layer_block_bytes, checksums)

    @property
    def header_bytes(self) -> int:
        needed = _FIXED.size + _CHECKSUM.size * (self.layers + 1)
        return -(-needed // PAGE_BYTES) * PAGE_BYTES

    @property
    def payload_bytes(self) -> int:
        return self.layers * self.layer_block_bytes

    def encode(self) -> bytes:
        """Returns the header as it is in the file, `header_bytes` long."""
        fixed = _FIXED.pack(
            _MAGIC,
            _VERSION,
            self.header_bytes,
            self.layers,
            0,
            self.layer_block_bytes,
            self.namespace,
            self.key,
            self.parent,
        )
        body = fixed + np.array(self.checksums, dtype="<u8").tobytes()
        body = body.ljust(self.header_bytes - _CHECKSUM.size, b"\0")
        return body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body))


def payload_checksums(payload: memoryview, layer_block_bytes: int) -> tuple[int, ...]:
    """xxh3_64 of each layer's range of a Full Block."""
    starts = range(0, len(payload), layer_block_bytes)
    return tuple(xxhash.xxh3_64_intdigest(payload[start : start + layer_block_bytes]) for start in starts)


@contextmanager
def io_faults(key: BlockKey) -> Iterator[None]:
    """Turn an OSError of the with-block into a BlockUnavailableError: no system error says what a block's bytes are."""
    try:
        yield
    except OSError as error:
        raise BlockUnavailableError(key, str(error)) from error


@contextmanager
def open_block(path: Path, key: BlockKey) -> Iterator[int]:
    """The file of `key`, open for reading while the context lasts. Raises BlockError: MISSING, HEADER."""
    try:
        fd = open_file(path)
    except FileNotFoundError as error:
        raise BlockError(key, BlockFault.MISSING, str(error)) from error
    except NotAFileError as error:
        raise BlockError(key, BlockFault.HEADER, str(error)) from error
    except OSError as error:
        raise BlockUnavailableError(key, str(error)) from error
    try:
        yield fd
    finally:
        os.close(fd)


def read_header(fd: int, key: BlockKey) -> BlockHeader:
    """`decode_header` of an open file that should hold `key`. Raises BlockError: TRUNCATED, HEADER."""
    with io_faults(key):
        n_bytes = os.fstat(fd).st_size

    def head(wanted_bytes: int) -> bytes:
        with io_faults(key):
            return os.pread(fd, wanted_bytes, 0)

    return decode_header(key, n_bytes, head)


def decode_header(key: BlockKey, n_bytes: int, head: Callable[[int], bytes]) -> BlockHeader:
    """Returns the header of a file or object of `n_bytes`, checked against its checksum, `key` and that size.

    `head` returns as many of the first bytes as requested, or all there are. Raises BlockError: TRUNCATED, HEADER.
    """
    header = _decode(key, head)
    if header.key != key:
        raise BlockError(key, BlockFault.HEADER, f"the file holds block {header.key.hex()}")
    expected_bytes = header.header_bytes + header.payload_bytes
    if n_bytes < expected_bytes:
        raise BlockError(key, BlockFault.TRUNCATED, f"{n_bytes} of {expected_bytes} bytes are there")
    if n_bytes > expected_bytes:
        raise BlockError(key, BlockFault.HEADER, f"{n_bytes - expected_bytes} bytes follow the payload")
    return header


def check_root(header: BlockHeader, root: BlockKey) -> BlockHeader:
    """Returns `header` if it is of a block below `root`. Raises BlockError: HEADER."""
    if header.namespace != root:
        raise BlockError(header.key, BlockFault.HEADER, f"the file is of namespace {header.namespace.hex()}")
    return header


def check_namespace(header: BlockHeader, space: Namespace) -> BlockHeader:
    """Returns `header` if it is of a block of `space` with its geometry. Raises BlockError: HEADER."""
    check_root(header, space.root)
    layout = space.layout
    if (header.layers, header.layer_block_bytes) != (layout.layers, layout.layer_block_bytes):
        raise BlockError(
            header.key,
            BlockFault.HEADER,
            f"{header.layers} layers of {header.layer_block_bytes} bytes instead of {layout.layers} of "
            f"{layout.layer_block_bytes}",
        )
    return header


def _decode(key: BlockKey, head: Callable[[int], bytes]) -> BlockHeader:
    def wrong(detail: str) -> BlockError:
        return BlockError(key, BlockFault.HEADER, detail)

    raw = _whole(key, head, PAGE_BYTES)
    magic, version, header_bytes, layers, _, layer_block_bytes, space, own_key, parent = _FIXED.unpack_from(raw)
    if magic != _MAGIC:
        raise wrong(f"starts with {magic!r} instead of {_MAGIC!r}")
    if version != _VERSION:
        raise wrong(f"format version {version}, this program reads version {_VERSION}")
    if not (0 < layers <= _MAX_LAYERS and layer_block_bytes > 0):
        raise wrong(f"{layers} layers of {layer_block_bytes} bytes make no block")
    header = BlockHeader(space, own_key, parent, layers, layer_block_bytes, ())
    if header_bytes != header.header_bytes:
        raise wrong(f"a header of {header_bytes} bytes does not fit {layers} layers")
    if header_bytes > PAGE_BYTES:
        raw = _whole(key, head, header_bytes)
    body, (checksum,) = raw[: header_bytes - _CHECKSUM.size], _CHECKSUM.unpack(raw[-_CHECKSUM.size :])
    if xxhash.xxh3_64_intdigest(body) != checksum:
        raise wrong("the header's checksum does not match")
    checksums = np.frombuffer(body, dtype="<u8", count=layers, offset=_FIXED.size)
    return msgspec.structs.replace(header, checksums=tuple(checksums.tolist()))


def _whole(key: BlockKey, head: Callable[[int], bytes], header_bytes: int) -> bytes:
    raw = head(header_bytes)
    if len(raw) < header_bytes:
        raise BlockError(key, BlockFault.TRUNCATED, f"{len(raw)} bytes, the header alone has {header_bytes}")
    return raw


def read_payload(fd: int, header: BlockHeader, into: memoryview, pace: Pace, *, verify: bool = True) -> None:
    """Read the payload into `into` (exactly `payload_bytes`, writable bytes), chunk by chunk; hash layers as they fill.

    Raises BlockError: TRUNCATED, CHECKSUM. After an error the content of `into` is undefined.
    """
    filled, layers = 0, LayerChecks(header, into)
    while filled < len(into):
        stop = min(filled + CHUNK_BYTES, len(into))
        pace(stop - filled)
        while filled < stop:
            with io_faults(header.key):
                got = os.preadv(fd, [into[filled:stop]], header.header_bytes + filled)
            if got == 0:
                raise BlockError(header.key, BlockFault.TRUNCATED, f"the file ended after {filled} payload bytes")
            filled += got
        if verify:
            layers.check(filled)


class LayerChecks:
    """Checks each layer of a payload against its checksum as soon as the layer is complete."""

    def __init__(self, header: BlockHeader, payload: memoryview) -> None:
        self._header = header
        self._payload = payload
        self._checked_layers = 0

    def check(self, filled_bytes: int) -> None:
        """Check the layers within the first `filled_bytes` that were not checked yet. Raises BlockError."""
        n_bytes = self._header.layer_block_bytes
        while (self._checked_layers + 1) * n_bytes <= filled_bytes:
            layer, start = self._checked_layers, self._checked_layers * n_bytes
            if xxhash.xxh3_64_intdigest(self._payload[start : start + n_bytes]) != self._header.checksums[layer]:
                raise BlockError(self._header.key, BlockFault.CHECKSUM, f"layer {layer} does not match its checksum")
            self._checked_layers += 1


def physical_bytes(status: os.stat_result) -> int:
    """Returns a file's bytes on disk: its blocks, or its length while the file system has not allocated them yet."""
    return max(status.st_blocks * 512, status.st_size)


def unpaced(_n_bytes: int) -> None:
    """A `Pace` that never waits."""
