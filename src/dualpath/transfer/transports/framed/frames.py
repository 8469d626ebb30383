"""Frames, and the socket that carries them. Both our transports speak them; over TCP a DATA frame's bytes follow it.

::

    initiator                         server
                             <──      CHALLENGE
    HELLO(tag, class)        ──>                       `handshake` has these three
                             <──      WELCOME(shape of the pool)
    READ(ranges)             ──>
                             <──      DATA × n          a chunk each, as the server's NIC lets it through
    DONE (shared memory)     ──>                        the pages are no longer being copied from
    WRITE(ranges) DATA × n    ──>
                             <──      DONE
    WRITE(ranges) DATA ABORT  ──>                        given up: the rest will not come
                             <──      ERROR(cause)      ends any operation; an ended write's DATA is discarded
    BUSY, IDLE               ──>                        `nixl` alone: whether operations are in flight

A header is 32 bytes, little-endian. The initiator numbers a connection's operations and never reuses a number.

The socket is non-blocking; a thread that cannot continue polls. One thread receives. Any thread may send, one whole
frame at a time: frames are never interleaved.
"""

import contextlib
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from dualpath.spec.loopback import is_loopback
from dualpath.transfer.transport import MAX_RANGES, PageRange, TransferCause
from dualpath.transfer.transports.framed.buffers import advance, zeros

if TYPE_CHECKING:
    from dualpath.transfer.transports.framed.sealed import Seal

HEADER_BYTES = 32
RANGE_BYTES = 24
MAX_CHUNK_BYTES = 1 << 20
MAX_TEXT_BYTES = 4_096

_IOV_MAX = 512
_LONGEST_POLL_MS = 3_600_000
_MAGIC = b"DP"
_HEADER = struct.Struct("<2sBBIQQQ")
CAUSES = tuple(TransferCause)
Payload = Sequence[bytes | memoryview]


class FrameKind(IntEnum):
    """The kind of a frame."""

    HELLO = 1
    WELCOME = 2
    READ = 3
    WRITE = 4
    DATA = 5
    DONE = 6
    ABORT = 7
    ERROR = 8
    CHALLENGE = 9
    BUSY = 10
    IDLE = 11


class ProtocolError(Exception):
    """The peer has violated the protocol; the connection must end."""


class StreamClosed(Exception):  # noqa: N818
    """The connection has ended, cleanly or not."""


class Frame(msgspec.Struct, frozen=True, gc=False):
    """A frame's header. `n_bytes` is the payload of the operation (READ, WRITE) or of this frame (other kinds)."""

    kind: FrameKind
    op: int = 0
    n_bytes: int = 0
    ranges: int = 0
    cause: int = 0
    timeout_ns: int = 0
    """Time left until the operation's deadline; a duration, because hosts share no clock."""

    def pack(self) -> bytes:
        return _HEADER.pack(_MAGIC, self.kind, self.cause, self.ranges, self.op, self.n_bytes, self.timeout_ns)


_LIMIT_BYTES = {
    FrameKind.CHALLENGE: MAX_TEXT_BYTES,
    FrameKind.HELLO: MAX_TEXT_BYTES,
    FrameKind.WELCOME: MAX_CHUNK_BYTES,
    FrameKind.ERROR: MAX_TEXT_BYTES,
    FrameKind.DATA: MAX_CHUNK_BYTES,
}


def unpack(header: bytes | bytearray) -> Frame:
    """Decode a header. Raises ProtocolError unless it is a known frame within its limits."""
    magic, kind, cause, ranges, op, n_bytes, timeout_ns = _HEADER.unpack(header)
    if magic != _MAGIC or kind not in FrameKind._value2member_map_:
        raise ProtocolError(f"not a frame: {bytes(header[:8])!r}…")
    frame = Frame(FrameKind(kind), op, n_bytes, ranges, cause, timeout_ns)
    if n_bytes > _LIMIT_BYTES.get(frame.kind, 1 << 62) or ranges > MAX_RANGES or cause >= len(CAUSES):
        raise ProtocolError(f"a frame beyond its limits: {frame}")
    if frame.kind is FrameKind.DATA and n_bytes == 0:
        raise ProtocolError(f"an empty chunk: {frame}")
    return frame


def pack_ranges(ranges: Sequence[PageRange]) -> bytes:
    """Returns 24 bytes per range. The ranges must have passed `check_ranges`."""
    return np.array([(one.page, one.offset, one.n_bytes) for one in ranges], "<u8").tobytes()


def unpack_ranges(packed: bytes | bytearray) -> list[PageRange]:
    return [PageRange(*triple) for triple in np.frombuffer(packed, "<u8").reshape(-1, 3).tolist()]


class Stream:
    """One socket. `clock` returns nanoseconds; deadlines are times of that clock."""

    def __init__(self, connected: socket.socket, clock: Callable[[], int]) -> None:
        connected.setblocking(False)
        self._socket = connected
        self._clock = clock
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._readable = select.poll()
        self._readable.register(connected, select.POLLIN)
        self._readable.register(self._wake, select.POLLIN)
        self._writable = select.poll()
        self._writable.register(connected, select.POLLOUT)
        self._send_lock = threading.Lock()
        self._close_lock = threading.Lock()
        self._closed = False
        self.seal: Seal | None = None
        """Frames that are sent and received from when it is set carry MACs."""

    @property
    def is_loopback(self) -> bool:
        """Whether the other end is a TCP port of this host."""
        return self._socket.family != socket.AF_UNIX and is_loopback(self._socket.getsockname()[0]) is True

    def send(
        self,
        frame: Frame,
        payload: Payload = (),
        deadline_ns: int | None = None,
        on_late: Callable[[], None] | None = None,
    ) -> None:
        """Send a frame; blocks as long as the peer does not read. Raises StreamClosed.

        When `deadline_ns` passes in the middle, zeros replace the rest of the payload: the caller gets its memory back,
        and the stream stays valid. `on_late` is called at that moment, on this thread.
        """
        with self._send_lock:
            rest = [memoryview(part) for part in payload]
            payload_bytes = sum(map(len, rest))
            seal, opening = self.seal, frame.pack()
            if seal is not None:
                opening = seal.opening(opening, payload_bytes)
            rest.insert(0, memoryview(opening))
            opening_bytes_left = len(opening)
            while rest:
                sent_bytes = self._send_some(rest, deadline_ns)
                if sent_bytes == 0:
                    head = rest[:1] if opening_bytes_left else []
                    rest = head + zeros(sum(map(len, rest)) - opening_bytes_left)
                    deadline_ns = None
                    if on_late is not None:
                        on_late()
                    continue
                of_opening = min(sent_bytes, opening_bytes_left)
                opening_bytes_left -= of_opening
                advance(rest, of_opening)
                if seal is not None:
                    seal.note_sent(rest, sent_bytes - of_opening)
                advance(rest, sent_bytes - of_opening)
            rest = [memoryview(seal.closing())] if seal is not None and payload_bytes else []
            while rest:
                advance(rest, self._send_some(rest, None))

    def receive(self, buffers: list[memoryview], deadline: Callable[[], int | None] | None = None) -> int:
        """Receive what is there into `buffers`. Returns the number of bytes; 0 to let the caller check time or `wake`.

        Calls `deadline` only when there is nothing to receive. Raises StreamClosed, with a seal ProtocolError too.
        """
        if self.seal is not None:
            return self.seal.receive(lambda some: self._receive(some, deadline), buffers)
        return self._receive(buffers, deadline)

    def _receive(self, buffers: list[memoryview], deadline: Callable[[], int | None] | None) -> int:
        while True:
            try:
                n_bytes = self._socket.recvmsg_into(buffers[:_IOV_MAX])[0]
            except BlockingIOError:
                if not self._wait_readable(deadline() if deadline else None):
                    return 0
                continue
            except OSError as error:
                raise StreamClosed(str(error)) from error
            if n_bytes == 0:
                raise StreamClosed("the peer closed the connection")
            return n_bytes

    def receive_all(self, buffers: list[memoryview], deadline_ns: int | None = None) -> None:
        """Fill `buffers`. Raises StreamClosed, also when the deadline passes first."""
        rest = list(buffers)
        while rest:
            n_bytes = self.receive(rest, lambda: deadline_ns)
            if n_bytes == 0 and deadline_ns is not None and self._clock() >= deadline_ns:
                raise StreamClosed("the peer did not answer in time")
            advance(rest, n_bytes)

    def receive_frame(self, deadline_ns: int | None = None) -> Frame:
        """The next frame's header. Raises StreamClosed, ProtocolError."""
        header = bytearray(HEADER_BYTES)
        self.receive_all([memoryview(header)], deadline_ns)
        return unpack(header)

    def receive_bytes(self, n_bytes: int, deadline_ns: int | None = None) -> bytes:
        """The next `n_bytes`. Raises StreamClosed."""
        buffer = bytearray(n_bytes)
        if n_bytes:
            self.receive_all([memoryview(buffer)], deadline_ns)
        return bytes(buffer)

    def discard(self, n_bytes: int) -> None:
        """Receive and forget. Raises StreamClosed."""
        scratch = memoryview(bytearray(min(n_bytes, 65_536)))
        while n_bytes:
            n_bytes -= self.receive([scratch[:n_bytes]])

    def wake(self) -> None:
        """Make a waiting `receive` return 0."""
        with self._close_lock:
            if not self._closed:
                os.eventfd_write(self._wake, 1)

    def shutdown(self, how: int = socket.SHUT_RDWR) -> None:
        """End the connection from any thread; threads that send or receive get StreamClosed."""
        with self._close_lock, contextlib.suppress(OSError):
            if not self._closed:
                self._socket.shutdown(how)

    def close(self) -> None:
        """Release the socket. Call it only when no thread is in a method other than `wake` and `shutdown`."""
        with self._close_lock:
            if not self._closed:
                self._closed = True
                self._socket.close()
                os.close(self._wake)

    def _send_some(self, rest: list[memoryview], deadline_ns: int | None) -> int:
        """Returns the number of bytes sent, at least 1; 0 when the deadline has passed."""
        while True:
            try:
                return self._socket.sendmsg(rest[:_IOV_MAX])
            except BlockingIOError:
                timeout_ms = self._timeout_ms(deadline_ns)
                if timeout_ms == 0:
                    return 0
                self._writable.poll(timeout_ms)
            except OSError as error:
                raise StreamClosed(str(error)) from error

    def _wait_readable(self, deadline_ns: int | None) -> bool:
        ready = dict(self._readable.poll(self._timeout_ms(deadline_ns)))
        if self._wake in ready:
            os.eventfd_read(self._wake)
            return False
        return bool(ready)

    def _timeout_ms(self, deadline_ns: int | None) -> int | None:
        if deadline_ns is None:
            return None
        return min(max(0, -(-(deadline_ns - self._clock()) // 1_000_000)), _LONGEST_POLL_MS)
