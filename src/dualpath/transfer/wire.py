"""Frames on a channel's stream. Both kinds of channel speak them; over TCP a DATA frame's bytes follow its header.

::

    initiator                         server
    HELLO(tag, class)        ──>
                             <──      WELCOME(shape of the pool)
    READ(spans)              ──>
                             <──      DATA × n          a chunk each, as the server's NIC lets it through
    DONE (shared memory)     ──>                        the pages are no longer being copied from
    WRITE(spans) DATA × n    ──>
                             <──      DONE
    WRITE(spans) DATA ABORT  ──>                        given up: the rest will not come
                             <──      ERROR(cause)      ends any operation; an ended write's DATA is discarded
    PING(bytes)              ──>
                             <──      PONG(bytes)

A header is 32 bytes, little-endian. Operations of one connection are numbered by the initiator and never reused.
"""

import struct
from collections.abc import Sequence
from enum import IntEnum

import msgspec
import numpy as np

from dualpath.transfer.channel import Span, TransferCause

VERSION = 1
HEADER_BYTES = 32
SPAN_BYTES = 24
MAX_SPANS = 65_536
MAX_CHUNK_BYTES = 1 << 20
MAX_PING_BYTES = 65_536
MAX_TEXT_BYTES = 4_096
NO_TIMEOUT_NS = (1 << 63) - 1

_MAGIC = b"DP"
_HEADER = struct.Struct("<2sBBIQQQ")
CAUSES = tuple(TransferCause)


class FrameKind(IntEnum):
    """What a frame says."""

    HELLO = 1
    WELCOME = 2
    READ = 3
    WRITE = 4
    DATA = 5
    DONE = 6
    ABORT = 7
    ERROR = 8
    PING = 9
    PONG = 10


class ProtocolError(Exception):
    """The peer sent what no peer of ours sends; the connection cannot go on."""


class Frame(msgspec.Struct, frozen=True, gc=False):
    """A frame's header. `n_bytes` counts what the operation (READ, WRITE) or this frame (the others) carries."""

    kind: FrameKind
    op: int = 0
    n_bytes: int = 0
    spans: int = 0
    cause: int = 0
    timeout_ns: int = 0
    """What is left until the operation's deadline: hosts share no clock."""

    def pack(self) -> bytes:
        return _HEADER.pack(_MAGIC, self.kind, self.cause, self.spans, self.op, self.n_bytes, self.timeout_ns)


_LIMIT_BYTES = {
    FrameKind.HELLO: MAX_TEXT_BYTES,
    FrameKind.WELCOME: MAX_TEXT_BYTES,
    FrameKind.ERROR: MAX_TEXT_BYTES,
    FrameKind.DATA: MAX_CHUNK_BYTES,
    FrameKind.PING: MAX_PING_BYTES,
    FrameKind.PONG: MAX_PING_BYTES,
}


def unpack(header: bytes | bytearray) -> Frame:
    """Raises ProtocolError for anything but the header of a known frame within its limits."""
    magic, kind, cause, spans, op, n_bytes, timeout_ns = _HEADER.unpack(header)
    if magic != _MAGIC or kind not in FrameKind._value2member_map_:
        raise ProtocolError(f"not a frame: {bytes(header[:8])!r}…")
    frame = Frame(FrameKind(kind), op, n_bytes, spans, cause, timeout_ns)
    if n_bytes > _LIMIT_BYTES.get(frame.kind, 1 << 62) or spans > MAX_SPANS or cause >= len(CAUSES):
        raise ProtocolError(f"a frame beyond its limits: {frame}")
    if frame.kind is FrameKind.DATA and n_bytes == 0:
        raise ProtocolError(f"an empty chunk: {frame}")
    return frame


def pack_spans(spans: Sequence[Span]) -> bytes:
    """24 bytes a span. The spans must have passed `check_spans`."""
    return np.array([(span.page, span.offset, span.n_bytes) for span in spans], "<u8").tobytes()


def unpack_spans(packed: bytes | bytearray) -> list[Span]:
    return [Span(*triple) for triple in np.frombuffer(packed, "<u8").reshape(-1, 3).tolist()]


class Hello(msgspec.Struct, frozen=True):
    """Who connects, and in which traffic class."""

    version: int
    tag: str
    traffic_class: int


class Welcome(msgspec.Struct, frozen=True):
    """The pool that the spans of this connection are in; `pool_path` only over shared memory."""

    version: int
    page_bytes: int
    pages: int
    pool_path: str = ""
