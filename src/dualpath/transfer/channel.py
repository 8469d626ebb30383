"""What every channel promises: one-sided reads and writes against a peer's buffer pool, in two traffic classes.

The verbs have the shape of RDMA's (and NIXL's): the remote side is a list of descriptors (`Span`), the local side a
list of the caller's own arrays, posting returns at once and a future ends when the bytes have moved. Futures are
`concurrent.futures.Future`; their callbacks run on a channel's thread and must be quick.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from enum import Enum
from typing import Protocol
from urllib.parse import urlsplit

import msgspec

from dualpath.core.vocabulary import TrafficClass
from dualpath.transfer.pool import Bytes


class Span(msgspec.Struct, frozen=True, gc=False):
    """`n_bytes` (≥ 1) of one page of the peer's pool, from `offset`, both in bytes."""

    page: int
    offset: int
    n_bytes: int


class TransferCause(Enum):
    """Why a transfer failed."""

    PEER_CLOSED = "peer_closed"
    DEADLINE = "deadline"
    BAD_DESCRIPTOR = "bad_descriptor"
    PROTOCOL = "protocol"


class TransferError(Exception):
    """A transfer, or a connection, that failed; `cause` is for programs, the text for people."""

    def __init__(self, cause: TransferCause, text: str) -> None:
        super().__init__(f"{cause.value}: {text}")
        self.cause = cause


class ChannelBusy(Exception):  # noqa: N818
    """As many operations are in flight as the channel allows; wait for one of them to end, then post again."""


class Channel(Protocol):
    """A connection to one peer's pool in one traffic class. Thread-safe; no method but `close` blocks.

    A posted operation ends with the number of bytes moved or with TransferError, at `deadline_ns` (of
    `TrafficManager.clock`) at the latest, but for a copy of one chunk. When a read's future has ended nothing writes
    into `local` any more; when a write's has, nothing reads `local`. After a *failed* write the remote range is in
    doubt until the peer's `ChannelServer.quiesce` says otherwise. A posted operation cannot be cancelled.

    Raises ChannelBusy, at once, when the bound on operations in flight is reached.
    """

    @property
    def is_open(self) -> bool: ...

    @property
    def traffic_class(self) -> TrafficClass: ...

    @property
    def ops_in_flight(self) -> int:
        """Operations posted whose last word from the peer is still to come, ended at their deadline or not."""
        ...

    def read(self, remote: Sequence[Span], local: Sequence[Bytes], deadline_ns: int) -> "Future[int]":
        """Copy each remote span into the local array beside it (uint8, one dimension, contiguous, as long)."""
        ...

    def write(self, remote: Sequence[Span], local: Sequence[Bytes], deadline_ns: int) -> "Future[int]":
        """Copy each local array into the remote span beside it. Ends when the peer has all of it in its pool."""
        ...

    def ping(self, payload: bytes, deadline_ns: int) -> "Future[bytes]":
        """Send up to 64 KiB to the peer and back."""
        ...

    def close(self) -> None:
        """End every operation with PEER_CLOSED and the connection with it. May be called twice."""
        ...


class Address(msgspec.Struct, frozen=True):
    """Where a server listens: ``shm:<path of a Unix socket>`` or ``tcp://host:port``."""

    path: str = ""
    host: str = ""
    port: int = 0

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Raises ValueError with an example of what was expected."""
        if text.startswith("shm:") and len(text) > len("shm:"):
            path = text.removeprefix("shm:")
            if len(path.encode()) > 107:
                raise ValueError(f"{text!r}: a Unix socket's path has at most 107 bytes; use a shorter directory")
            return cls(path=path)
        try:
            parts = urlsplit(text)
            if parts.scheme == "tcp" and parts.hostname and parts.port is not None and not parts.path:
                return cls(host=parts.hostname, port=parts.port)
        except ValueError:  # a port that is no number
            pass
        raise ValueError(f"{text!r} is no channel address; write shm:/run/dualpath/pe0.sock or tcp://10.0.0.1:7000")

    def __str__(self) -> str:
        if self.path:
            return f"shm:{self.path}"
        return f"tcp://[{self.host}]:{self.port}" if ":" in self.host else f"tcp://{self.host}:{self.port}"


def check_spans(spans: Sequence[Span], page_bytes: int, pages: int) -> None:
    """Raises TransferError(BAD_DESCRIPTOR) naming the first span that is not inside a pool of that shape."""
    for index, span in enumerate(spans):
        inside = span.offset >= 0 and span.n_bytes >= 1 and span.offset + span.n_bytes <= page_bytes
        if not (inside and 0 <= span.page < pages):
            raise TransferError(
                TransferCause.BAD_DESCRIPTOR,
                f"span {index} (page {span.page}, offset {span.offset}, {span.n_bytes} bytes) is not inside a pool of "
                f"{pages} pages of {page_bytes} bytes",
            )
