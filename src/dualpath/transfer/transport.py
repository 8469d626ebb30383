"""The transport protocol: what carries KV between engines, and what the rest of the system may expect of it.

Who calls what
--------------
An engine has one pool and serves it with `Transport.serve`. Its `Server.address` goes to the coordinator when the
engine joins and from there to every prefill engine: the control plane is the metadata exchange. An address is text that
only its transport reads; it may hold whatever peers need (host and port, process and memory address, NIXL's agent
metadata). A prefill engine opens one `Channel` to each decode engine with `Transport.connect`, on a thread of its own
since that may block, and posts from its loader and shipper threads. A decode engine posts nothing; it frees pages, and
asks `Server.quiesce` first where a peer may still touch them. The supervisor calls `Transport.sweep`.

Both classes, one policy
------------------------
A transport decides nothing about priority. It moves an operation in chunks of at most `Lane.chunk_bytes`, and before
each calls ``acquire(traffic_class, n_bytes, deadline_ns)`` of the lane that the bytes pass: the initiator's
``traffic.cnic.tx`` for a write, ``traffic.cnic.rx`` for a read, and, where the server's process takes part in the
transfer, the server's opposite lane too. That thread sleeps until core's arbiter lets the chunk through, or gets
`DeadlineExceeded`. On hardware that paces itself lanes have no rate and only count; tell it the class by its own means
(an InfiniBand service level, DSCP).

Memory safety
-------------
Pages and arrays are used again as soon as the protocol says that they may be, so a late byte corrupts a stranger's KV:

* When an operation's future has ended, the transport touches that operation's local arrays no more.
* A page is used again when its operations have ended well, or `Server.quiesce` has ended. After a *failed* write the
  remote ranges are in doubt; nothing but `quiesce` resolves that. Its caller bounds the wait, quarantines the pages
  when the bound is reached, and frees them when the future ends. A time-out, of the control plane or of a transport,
  never frees a page.
* A transport without proof leaves the future open. Pages then stay in quarantine, which a gauge shows.

Nothing here assumes a stream of bytes, a thread in the server, or copying by the CPU: memory may be registered in
`serve` (the pool) and at a first `read` or `write` (local arrays come from few, long-lived staging buffers), operations
may be posted to a NIC, and completions may come from one thread that polls.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from enum import Enum
from typing import Protocol

import msgspec
import numpy as np

from dualpath.core.vocabulary import TrafficClass
from dualpath.transfer.pool import BufferPool, Bytes
from dualpath.transfer.traffic import TrafficManager

MAX_RANGES = 65_536
"""Most ranges in one operation."""


class PageRange(msgspec.Struct, frozen=True, gc=False):
    """`n_bytes` (≥ 1) of one page of the server's pool, from `offset`, both in bytes."""

    page: int
    offset: int
    n_bytes: int


class TransferCause(Enum):
    """Why a transfer failed."""

    PEER_CLOSED = "peer_closed"
    """The channel has ended, on either side; nothing that was posted on it touches local memory any more."""
    DEADLINE = "deadline"
    BAD_DESCRIPTOR = "bad_descriptor"
    """A range outside the pool, or a local array that does not fit it. Nothing was moved."""
    PROTOCOL = "protocol"
    """The peer is no server of this transport, or a defect; the channel has ended."""


class TransferError(Exception):
    """A transfer, or a connection, that failed; `cause` is for programs, the text for people."""

    def __init__(self, cause: TransferCause, text: str) -> None:
        super().__init__(f"{cause.value}: {text}")
        self.cause = cause


class ChannelBusy(Exception):  # noqa: N818
    """As many operations are in flight as the channel allows; wait for one of them to end, then post again."""


class Channel(Protocol):
    """An initiator's connection to one server's pool in one traffic class. Any thread may call; only `close` blocks.

    A posted operation ends with the number of bytes moved or with TransferError, at `deadline_ns` (of
    `TrafficManager.clock`) at the latest, but for the chunk that is being moved: where that can't be stopped, memory
    safety comes before punctuality. A deadline ends an operation, not the channel; nobody can cancel one. Operations in
    flight together are in no order, nor are ranges of one: where two overlap, wait for one before posting the other.
    Futures' callbacks run on a thread of the channel; they are quick, and may post.

    `read` and `write` raise nothing but ChannelBusy, at once, when the bound on operations in flight is reached;
    everything else comes with the future. An operation counts until the transport is done with it, ended or not.
    """

    @property
    def is_open(self) -> bool:
        """False once operations can only fail; the owner then closes the channel and connects anew."""
        ...

    def read(self, remote: Sequence[PageRange], local: Sequence[Bytes], deadline_ns: int) -> "Future[int]":
        """Copy each remote range into the local array beside it: uint8, one dimension, contiguous, as long."""
        ...

    def write(self, remote: Sequence[PageRange], local: Sequence[Bytes], deadline_ns: int) -> "Future[int]":
        """Copy each local array into the remote range beside it. Ends well when the server's threads can see it all."""
        ...

    def close(self) -> None:
        """End every operation with PEER_CLOSED and the channel with it. May be called twice."""
        ...


class Server(Protocol):
    """What lets initiators at one pool, and knows when one of them is quiet. Any thread may call; `close` may block."""

    @property
    def address(self) -> str:
        """What `Transport.connect` of any peer takes."""
        ...

    def quiesce(self, peer_tag: str) -> "Future[None]":
        """Disconnect a peer; the future ends when nothing that it posted by then can touch the pool any more.

        Never blocks. The future ends by proof, however long that takes, or with TransferError when the server closes
        first. A peer of which nothing is known is quiet. It may connect again, also before the future ends.
        """
        ...

    def close(self) -> None:
        """Disconnect every peer, giving it a short time to become quiet, and leave nothing behind."""
        ...


class Transport(Protocol):
    """A way to connect engines; one cluster has one. An entry point names an object with these methods, not a class.

    The object may keep what its servers and channels in a process share, such as a NIXL agent made when first needed.
    Every method may be called from any thread.
    """

    def serve(self, pool: BufferPool, traffic: TrafficManager, *, host: str, name: str) -> Server:
        """Let peers read and write `pool` until `Server.close`, which comes before `pool.close`.

        `host` is where other hosts reach this one (--data-host); `name` is unique among this host's servers, and what
        is left behind by one that is killed should be recognisable by it or by its process. Raises ValueError for a
        host that makes no address, OSError where it cannot be served.
        """
        ...

    def connect(
        self,
        address: str,
        traffic: TrafficManager,
        *,
        traffic_class: TrafficClass,
        peer_tag: str,
        max_ops_in_flight: int = 64,
        timeout_s: float = 5.0,
    ) -> Channel:
        """Connect to a server; blocks for `timeout_s` at most. `traffic` is the caller's own.

        `peer_tag` is what the server is to call *us* (see `Server.quiesce`), for example our engine id. Raises
        ValueError for an address that is none of this transport or a bad bound, TransferError(PEER_CLOSED) when nobody
        answers in time, or refuses, and TransferError(PROTOCOL) when it is no server of this transport.
        """
        ...

    def sweep(self) -> list[str]:
        """Remove what killed servers of this host left behind; what was removed. Living ones are never touched.

        Called on the supervisor's event loop, at the start and whenever an engine process has ended: be quick.
        """
        ...


def check_operation(
    ranges: Sequence[PageRange], local: Sequence[Bytes], page_bytes: int, pages: int, writes_local: bool
) -> None:
    """Raises TransferError(BAD_DESCRIPTOR) naming what is wrong; `writes_local`: the operation is a read."""
    if len(ranges) != len(local) or len(local) > MAX_RANGES:
        text = f"{len(ranges)} ranges beside {len(local)} arrays; give as many, and at most {MAX_RANGES}"
        raise TransferError(TransferCause.BAD_DESCRIPTOR, text)
    check_ranges(ranges, page_bytes, pages)
    for index, (one, array) in enumerate(zip(ranges, local, strict=True)):
        fits = array.dtype == np.uint8 and array.shape == (one.n_bytes,) and array.flags.c_contiguous
        if not fits or (writes_local and not array.flags.writeable):
            raise TransferError(
                TransferCause.BAD_DESCRIPTOR,
                f"array {index} ({array.dtype}, shape {array.shape}, writeable {array.flags.writeable}) must be "
                f"{one.n_bytes} contiguous uint8 in one dimension, and writeable to read into",
            )


def check_ranges(ranges: Sequence[PageRange], page_bytes: int, pages: int) -> None:
    """Raises TransferError(BAD_DESCRIPTOR) naming the first range that is not inside a pool of that shape."""
    for index, one in enumerate(ranges):
        inside = one.offset >= 0 and one.n_bytes >= 1 and one.offset + one.n_bytes <= page_bytes
        if not (inside and 0 <= one.page < pages):
            raise TransferError(
                TransferCause.BAD_DESCRIPTOR,
                f"range {index} (page {one.page}, offset {one.offset}, {one.n_bytes} bytes) is not inside a pool of "
                f"{pages} pages of {page_bytes} bytes",
            )
