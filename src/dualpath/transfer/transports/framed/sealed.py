"""Frames that carry a MAC: who stands between two engines can cut their connection, not change a byte.

A record is ``length ‖ bytes ‖ tag``; a header is one, so no header is obeyed that the peer did not send, and a frame's
payload is another. The tag is HMAC-SHA256, cut to 16 bytes, over the record's number, its length and its bytes: of what
Python brings it is the fastest, as CPUs have instructions for it. The last byte of a record is given on only when its
tag is right, so an operation succeeds only with the peer's bytes. Nothing is encrypted.
"""

import hmac
import struct
from collections.abc import Callable, Iterator

from dualpath.transfer.transport import MAX_RANGES
from dualpath.transfer.transports.framed.frames import (
    MAX_CHUNK_BYTES,
    RANGE_BYTES,
    ProtocolError,
    StreamClosed,
)

TAG_BYTES = 16
_LENGTH = struct.Struct("<I")
_NUMBERED = struct.Struct("<QI")
_NOTHING = hmac.new(b"nothing", digestmod="sha256")
Receive = Callable[[list[memoryview]], int]
_MAX_RECORD_BYTES = max(MAX_CHUNK_BYTES, MAX_RANGES * RANGE_BYTES)


class _Macs:
    """The MACs of one direction's records, in order."""

    def __init__(self, key: bytes) -> None:
        self._keyed = hmac.new(key, digestmod="sha256")
        self._records = 0

    def begin(self, n_bytes: int) -> "hmac.HMAC":
        mac = self._keyed.copy()
        mac.update(_NUMBERED.pack(self._records, n_bytes))
        self._records += 1
        return mac


class Seal:
    """The MACs of one end of a connection: of what it sends and of what it receives. One thread each."""

    def __init__(self, sent_key: bytes, received_key: bytes) -> None:
        self._sent = _Macs(sent_key)
        self._received = _Macs(received_key)
        self._sending = self._receiving = _NOTHING
        self._left_bytes = 0
        """Of the record that is being received."""
        self._owed_bytes = 0
        """Its last ones, received already; their tag is awaited."""
        self._small = bytearray()
        self._wrong = False

    # ── Sending ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def opening(self, header: bytes, payload_bytes: int) -> bytes:
        """Returns what goes before a frame's payload: the header's record, and the beginning of the payload's."""
        mac = self._sent.begin(len(header))
        mac.update(header)
        opening = _LENGTH.pack(len(header)) + header + mac.digest()[:TAG_BYTES]
        if not payload_bytes:
            return opening
        self._sending = self._sent.begin(payload_bytes)
        return opening + _LENGTH.pack(payload_bytes)

    def note_sent(self, payload: list[memoryview], n_bytes: int) -> None:
        """The first `n_bytes` of `payload` have been sent."""
        for piece in first(payload, n_bytes):
            self._sending.update(piece)

    def closing(self) -> bytes:
        """Returns what goes after a payload."""
        return self._sending.digest()[:TAG_BYTES]

    # ── Receiving ────────────────────────────────────────────────────────────────────────────────────────────────────

    def receive(self, receive: Receive, buffers: list[memoryview]) -> int:
        """As `Stream.receive`, by means of `receive`. Raises ProtocolError at a wrong tag, then StreamClosed."""
        if self._wrong:
            raise StreamClosed("a frame's tag was wrong")
        if self._receiving is _NOTHING and not self._begin(receive):
            return 0
        if self._left_bytes:
            n_bytes = receive(list(first(buffers, self._left_bytes)))
            for piece in first(buffers, n_bytes):
                self._receiving.update(piece)
            self._left_bytes -= n_bytes
            if self._left_bytes:
                return n_bytes
            self._owed_bytes = n_bytes
        tag = self._collect(receive, TAG_BYTES)
        if tag is None:
            return 0
        if not hmac.compare_digest(tag, self._receiving.digest()[:TAG_BYTES]):
            self._fail("a frame whose tag is wrong: it is not the peer's, or was changed on the way")
        self._receiving = _NOTHING
        return self._owed_bytes

    def _begin(self, receive: Receive) -> bool:
        length = self._collect(receive, _LENGTH.size)
        if length is None:
            return False
        (self._left_bytes,) = _LENGTH.unpack(length)
        if not 1 <= self._left_bytes <= _MAX_RECORD_BYTES:
            self._fail(f"a record of {self._left_bytes} bytes")
        self._receiving = self._received.begin(self._left_bytes)
        return True

    def _collect(self, receive: Receive, n_bytes: int) -> bytes | None:
        """Returns the next `n_bytes`; None to let the caller check time or `wake`, and to be called again."""
        while len(self._small) < n_bytes:
            piece = bytearray(n_bytes - len(self._small))
            got_bytes = receive([memoryview(piece)])
            if got_bytes == 0:
                return None
            self._small += piece[:got_bytes]
        collected, self._small = bytes(self._small), bytearray()
        return collected

    def _fail(self, what: str) -> None:
        self._wrong = True
        raise ProtocolError(what)


def first(buffers: list[memoryview], n_bytes: int) -> Iterator[memoryview]:
    """Yields the first `n_bytes` of `buffers`."""
    for buffer in buffers:
        if n_bytes <= 0:
            return
        yield buffer[:n_bytes]
        n_bytes -= len(buffer)
