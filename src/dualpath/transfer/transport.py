"""The transport protocol: carries KV between engines, with the guarantees that the rest of the system relies on.

Who calls what
--------------
An engine has one pool and serves it with `Transport.serve`. Its `Server.address` goes to the coordinator when the
engine joins, and from there to every prefill engine: the control plane is the metadata exchange. Only the transport
reads an address; it is text that may hold whatever peers need (host and port, process and memory address, NIXL's agent
metadata). A prefill engine opens one `Channel` to each decode engine with `Transport.connect`, which may block and
therefore runs on a separate thread, and posts from its loader and shipper threads. A decode engine posts nothing; it
frees pages, and calls `Server.quiesce` first if a peer may still touch them. The supervisor calls `Transport.sweep`.

Both classes, one policy
------------------------
A transport decides nothing about priority. It moves an operation in chunks of at most `Lane.chunk_bytes`. Before each
chunk it calls ``acquire(traffic_class, n_bytes, deadline_ns)`` of the lane that the bytes pass: the initiator's
``traffic.cnic.tx`` for a write, ``traffic.cnic.rx`` for a read, and also the server's opposite lane if the server's
process takes part in the transfer. The thread sleeps until core's arbiter lets the chunk through, or gets
`DeadlineExceeded`. On hardware that paces itself, lanes have no rate and only count; pass the class to the hardware by
its own means (an InfiniBand service level, DSCP).

Memory safety
-------------
Pages and arrays are reused as soon as the protocol allows it, so a late byte would corrupt another request's KV:

* When an operation's future has ended, the transport no longer touches that operation's local arrays.
* A page is reused when its operations have succeeded, or `Server.quiesce` has ended. After a *failed* write, bytes may
  still arrive in the remote ranges; only `quiesce` resolves that. Its caller limits the wait, quarantines the pages
  when the limit is reached, and frees them when the future ends. A time-out of the control plane or of a transport
  never frees a page.
* A transport without proof leaves the future open. The pages then stay in quarantine, which a gauge shows.

The protocol assumes no stream of bytes, no thread in the server, and no copying by the CPU. Memory may be registered in
`serve` (the pool) and at the first `read` or `write` (local arrays come from few, long-lived staging buffers);
operations may be posted to a NIC, and one polling thread may deliver completions.
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
    """The channel has ended, on either side; its operations no longer touch local memory."""
    DEADLINE = "deadline"
    BAD_DESCRIPTOR = "bad_descriptor"
    """A range is outside the pool, or a local array does not fit its range. Nothing was moved."""
    PROTOCOL = "protocol"
    """The peer is not a server of this transport, or there is a bug; the channel has ended."""


class TransferError(Exception):
    """A transfer or a connection failed; `cause` is for programs, the text for people."""

    def __init__(self, cause: TransferCause, text: str) -> None:
        super().__init__(f"{cause.value}: {text}")
        self.cause = cause


class ChannelBusy(Exception):  # noqa: N818
    """As many operations are in flight as the channel allows; wait for one of them to end, then post again."""


class Channel(Protocol):
    """An initiator's connection to one server's pool in one traffic class. Any thread may call; only `close` blocks.

    A posted operation ends with the number of bytes moved or with TransferError, by `deadline_ns` (of
    `TrafficManager.clock`). Only a chunk that is being moved and can't be stopped may delay that: memory safety comes
    first. A deadline ends an operation, not the channel; operations can't be cancelled. Operations in flight have no
    order, nor have the ranges of one: if two overlap, wait for one before you post the other. Futures' callbacks run on
    a thread of the channel; they must be quick, and may post.

    `read` and `write` raise only ChannelBusy, at once, when the bound on operations in flight is reached; every other
    error comes with the future. An operation counts until the transport is done with it, even if it has ended.
    """

    @property
    def is_open(self) -> bool:
        """False once operations can only fail; the owner then closes the channel and connects again."""
        ...

    def read(self, remote: Sequence[PageRange], local: Sequence[Bytes], deadline_ns: int) -> "Future[int]":
        """Copy each remote range into its local array: uint8, one dimension, contiguous, of equal length."""
        ...

    def write(self, remote: Sequence[PageRange], local: Sequence[Bytes], deadline_ns: int) -> "Future[int]":
        """Copy each local array into its remote range. Succeeds when the server's threads can see all bytes."""
        ...

    def close(self) -> None:
        """End every operation with PEER_CLOSED, and the channel. May be called twice."""
        ...


class Server(Protocol):
    """Gives initiators access to one pool and knows when each is quiet. Any thread may call; `close` may block."""

    @property
    def address(self) -> str:
        """The address that peers give to `Transport.connect`."""
        ...

    @property
    def refused_connections(self) -> int:
        """Connections that did not prove that they have the cluster's key, or were too many."""
        ...

    def quiesce(self, peer_tag: str) -> "Future[None]":
        """Disconnect a peer. The future ends when nothing that the peer has posted can touch the pool any more.

        Never blocks. The future ends by proof, however long that takes, or with TransferError when the server closes
        first. An unknown peer is quiet. The peer may connect again, even before the future ends.
        """
        ...

    def close(self) -> None:
        """Disconnect every peer, wait a short time until they are quiet, and remove all traces."""
        ...


class Transport(Protocol):
    """A way to connect engines; a cluster uses one. An entry point names an object with these methods, not a class.

    The object may keep what a process's servers and channels share, such as a NIXL agent made when first needed. Any
    thread may call any method.
    """

    def serve(self, pool: BufferPool, traffic: TrafficManager, *, host: str, name: str, key: bytes) -> Server:
        """Let peers read and write `pool` until `Server.close`, which comes before `pool.close`.

        `key` is 32 bytes that the cluster's processes have and nobody else. Only a peer that proves that it has them
        may learn anything of the pool, and it must be shown such a proof too. A transport that can't do that must say
        so in its documentation, with what protects the pool instead.

        `host` is the address at which other hosts reach this one (--data-host). `name` is unique among this host's
        servers; traces of a killed server should be recognisable by its name or process. Raises ValueError when `host`
        makes no valid address, OSError when it can't listen there.
        """
        ...

    def connect(
        self,
        address: str,
        traffic: TrafficManager,
        *,
        traffic_class: TrafficClass,
        peer_tag: str,
        key: bytes,
        max_ops_in_flight: int = 64,
        timeout_s: float = 5.0,
    ) -> Channel:
        """Connect to a server; blocks for at most `timeout_s`. `traffic` is the caller's own.

        `peer_tag` names the caller to the server (see `Server.quiesce`), for example its engine id. Raises ValueError
        for a bad bound or another transport's address, TransferError(PEER_CLOSED) when nobody answers in time or the
        server refuses, and TransferError(PROTOCOL) when it is not a server of this transport or does not have `key`.
        """
        ...

    def sweep(self) -> list[str]:
        """Remove what killed servers of this host have left behind. Returns what was removed. Spares live servers.

        The supervisor calls it on a thread, at the start and after an engine process has ended: it must be quick.
        """
        ...


def check_operation(
    ranges: Sequence[PageRange], local: Sequence[Bytes], page_bytes: int, pages: int, writes_local: bool
) -> None:
    """Raises TransferError(BAD_DESCRIPTOR) that says what is wrong. `writes_local` is True for a read."""
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
    """Raises TransferError(BAD_DESCRIPTOR) that names the first range outside a pool of that shape."""
    for index, one in enumerate(ranges):
        inside = one.offset >= 0 and one.n_bytes >= 1 and one.offset + one.n_bytes <= page_bytes
        if not (inside and 0 <= one.page < pages):
            raise TransferError(
                TransferCause.BAD_DESCRIPTOR,
                f"range {index} (page {one.page}, offset {one.offset}, {one.n_bytes} bytes) is not inside a pool of "
                f"{pages} pages of {page_bytes} bytes",
            )
