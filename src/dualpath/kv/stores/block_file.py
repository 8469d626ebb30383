"""The file of one Full Block: a header of whole pages, then the payload at a page-aligned offset.

::

    0        fixed fields: magic, version, header bytes, layers, layer block bytes, namespace, key, parent key
    80       one xxh3_64 per layer, of that layer's byte range of the payload
    …        only where layers differ in size (then "layer block bytes" is 0): the bytes of each layer, 8 bytes a layer
    …        zeros
    H - 8    xxh3_64 of the header's first H - 8 bytes                      H = 4096, or more 4096s for > 501 layers
    H        payload: the Full Block, layer after layer

The payload starts on a page, so that it can be read straight into a page-aligned buffer. Layers can be read apart,
because each has its checksum. The checksums find decay and
torn writes; they do not protect against forged files. A fault raises `BlockError`,
and a system error `BlockUnavailableError`: it says nothing of the block.
"""

import os
import struct
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path

import msgspec
import numpy as np
import xxhash

from dualpath.kv.keys import BlockKey, Namespace
from dualpath.kv.layout import extents
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
    layer_block_bytes: tuple[int, ...]
    """Of each layer."""
    checksums: tuple[int, ...]

    @classmethod
    def describing(cls, payload: memoryview, space: Namespace, key: BlockKey, parent: BlockKey) -> "BlockHeader":
        """Returns the header of a Full Block of `space`, with its checksums."""
        sizes = space.layout.layer_block_bytes
        return cls(space.root, key, parent, sizes, payload_checksums(payload, sizes))

    @property
    def layers(self) -> int:
        return len(self.layer_block_bytes)

    @property
    def alike(self) -> bool:
        """Whether all layers have one size."""
        return len(set(self.layer_block_bytes)) == 1

    @property
    def header_bytes(self) -> int:
        return header_bytes(self.layers, self.alike)

    @property
    def payload_bytes(self) -> int:
        return sum(self.layer_block_bytes)

    def encode(self) -> bytes:
        """Returns the header as it is in the file, `header_bytes` long."""
        fixed = _FIXED.pack(
            _MAGIC,
            _VERSION,
            self.header_bytes,
            self.layers,
            0,
            self.layer_block_bytes[0] if self.alike else 0,
            self.namespace,
            self.key,
            self.parent,
        )
        sizes = () if self.alike else self.layer_block_bytes
        body = fixed + np.array((*self.checksums, *sizes), dtype="<u8").tobytes()
        body = body.ljust(self.header_bytes - _CHECKSUM.size, b"\0")
        return body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body))


def header_bytes(layers: int, alike: bool) -> int:
    """Returns the size of the header of a block of `layers` layers, which all have one size or do not."""
    needed = _FIXED.size + _CHECKSUM.size * (layers * (1 if alike else 2) + 1)
    return -(-needed // PAGE_BYTES) * PAGE_BYTES


def payload_checksums(payload: memoryview, layer_block_bytes: Sequence[int]) -> tuple[int, ...]:
    """xxh3_64 of each layer's range of a Full Block."""
    ranges = pairwise(accumulate(layer_block_bytes, initial=0))
    return tuple(xxhash.xxh3_64_intdigest(payload[start:stop]) for start, stop in ranges)


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
    expected = space.layout.layer_block_bytes
    if header.layer_block_bytes != expected:
        detail = f"{_sizes(header.layer_block_bytes)} instead of {_sizes(expected)}"
        raise BlockError(header.key, BlockFault.HEADER, detail)
    return header


def _sizes(layer_block_bytes: tuple[int, ...]) -> str:
    distinct = sorted(set(layer_block_bytes))
    return f"{len(layer_block_bytes)} layers of {' and '.join(map(str, distinct))} bytes"


def _decode(key: BlockKey, head: Callable[[int], bytes]) -> BlockHeader:
    def wrong(detail: str) -> BlockError:
        return BlockError(key, BlockFault.HEADER, detail)

    raw = _whole(key, head, PAGE_BYTES)
    magic, version, n_bytes, layers, _, layer_block_bytes, space, own_key, parent = _FIXED.unpack_from(raw)
    if magic != _MAGIC:
        raise wrong(f"starts with {magic!r} instead of {_MAGIC!r}")
    if version != _VERSION:
        raise wrong(f"format version {version}, this program reads version {_VERSION}")
    if not 0 < layers <= _MAX_LAYERS:
        raise wrong(f"{layers} layers make no block")
    if n_bytes != header_bytes(layers, alike=layer_block_bytes > 0):
        raise wrong(f"a header of {n_bytes} bytes does not fit {layers} layers")
    if n_bytes > PAGE_BYTES:
        raw = _whole(key, head, n_bytes)
    body, (checksum,) = raw[: n_bytes - _CHECKSUM.size], _CHECKSUM.unpack(raw[-_CHECKSUM.size :])
    if xxhash.xxh3_64_intdigest(body) != checksum:
        raise wrong("the header's checksum does not match")
    numbers = np.frombuffer(body, dtype="<u8", count=layers * (1 if layer_block_bytes else 2), offset=_FIXED.size)
    checksums, sizes = numbers[:layers].tolist(), numbers[layers:].tolist() or [layer_block_bytes] * layers
    if not all(sizes):
        raise wrong("a layer of 0 bytes")
    return BlockHeader(space, own_key, parent, tuple(sizes), tuple(checksums))


def _whole(key: BlockKey, head: Callable[[int], bytes], n_bytes: int) -> bytes:
    raw = head(n_bytes)
    if len(raw) < n_bytes:
        raise BlockError(key, BlockFault.TRUNCATED, f"{len(raw)} bytes, the header alone has {n_bytes}")
    return raw


def read_payload(
    fd: int,
    header: BlockHeader,
    into: memoryview,
    pace: Pace,
    *,
    layers: Collection[int] | None = None,
    verify: bool = True,
) -> None:
    """Read the payload, or only the ranges of `layers`, to their places in `into` (exactly `payload_bytes`, writable).

    It is read chunk by chunk, and layers are checked as they fill. Raises BlockError: TRUNCATED, CHECKSUM. After an
    error what was read is undefined.
    """
    checks = LayerChecks(header, into, layers)
    for filled, end in extents(header.layer_block_bytes, layers):
        while filled < end:
            stop = min(filled + CHUNK_BYTES, end)
            pace(stop - filled)
            while filled < stop:
                with io_faults(header.key):
                    got = os.preadv(fd, [into[filled:stop]], header.header_bytes + filled)
                if got == 0:
                    raise BlockError(header.key, BlockFault.TRUNCATED, f"the file ended after {filled} payload bytes")
                filled += got
            if verify:
                checks.check(filled)


class LayerChecks:
    """Checks each layer of a payload, or of `layers` of it, against its checksum as soon as the layer is complete."""

    def __init__(self, header: BlockHeader, payload: memoryview, layers: Collection[int] | None = None) -> None:
        self._header = header
        self._payload = payload
        ranges = enumerate(pairwise(accumulate(header.layer_block_bytes, initial=0)))
        self._left = deque((layer, *ends) for layer, ends in ranges if layers is None or layer in layers)

    def check(self, filled_bytes: int) -> None:
        """Check the layers that end within the first `filled_bytes` and were not checked yet. Raises BlockError."""
        while self._left and self._left[0][2] <= filled_bytes:
            layer, start, stop = self._left.popleft()
            if xxhash.xxh3_64_intdigest(self._payload[start:stop]) != self._header.checksums[layer]:
                raise BlockError(self._header.key, BlockFault.CHECKSUM, f"layer {layer} does not match its checksum")


def physical_bytes(status: os.stat_result) -> int:
    """Returns a file's bytes on disk: its blocks, or its length while the file system has not allocated them yet."""
    return max(status.st_blocks * 512, status.st_size)


def unpaced(_n_bytes: int) -> None:
    """A `Pace` that never waits."""
