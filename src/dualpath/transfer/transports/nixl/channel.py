"""The initiator's side: posts chunks to NIXL from buffers of its own, and looks when they are done.

Chunks travel through a few registered slots, and the caller's arrays are copied from or to them. So an operation ends
at its deadline whatever becomes of a chunk that can't be stopped: only its slot waits. To register a caller's array for
each operation would cost more than the copy; to keep it registered would be wrong, as its memory may become another's.

The *poster* charges a chunk to its lane and posts it. The *poller* looks whether chunks are done, asleep between two
looks, and for good while nothing is in flight. The *collector* ends operations at their deadlines and sees the server
go. Threads use the agent only under `_changed`. Where the fabric is not one-sided the server's process moves bytes too,
and its lanes are not charged for them: nobody there sees a chunk.
"""

import threading
from collections.abc import Callable, Iterator, Sequence

import msgspec
import numpy as np

from dualpath.core.vocabulary import TrafficClass
from dualpath.transfer.pool import Bytes
from dualpath.transfer.traffic import Lane, TrafficManager
from dualpath.transfer.transport import PageRange
from dualpath.transfer.transports.framed.channel import FramedChannel
from dualpath.transfer.transports.framed.frames import (
    MAX_CHUNK_BYTES,
    Frame,
    FrameKind,
    ProtocolError,
    Stream,
    StreamClosed,
)
from dualpath.transfer.transports.framed.handshake import Welcome
from dualpath.transfer.transports.framed.operations import Operation
from dualpath.transfer.transports.nixl.agent import Agent, Invitation, rest

SLOTS = 4
MAX_DESCRIPTORS = 256
"""In one chunk: UCX takes 5 to 15 µs for each."""
IDLE_AFTER_S = 0.002

_invitation = msgspec.msgpack.Decoder(Invitation)

Piece = tuple[int, int]
"""Where in the server's memory, and how many bytes."""


class _Flight(msgspec.Struct, eq=False):
    """A chunk in its slot. `number` is the agent's."""

    op: Operation
    slot: int
    n_bytes: int
    local: list[Bytes]
    number: int = 0
    moved: bool = False


class NixlChannel(FramedChannel):
    """`Channel`."""

    def __init__(
        self, stream: Stream, welcome: Welcome, traffic: TrafficManager, traffic_class: TrafficClass, max_ops: int
    ) -> None:
        self._invitation = read_invitation(welcome)
        self._slots = np.empty((SLOTS, MAX_CHUNK_BYTES), np.uint8)
        self._agent: Agent | None = Agent(traffic_class, stream.is_loopback, self._slots[0], self._slots.nbytes)
        try:
            self._agent.meet(self._invitation.metadata)
        except StreamClosed:
            self._agent.destroy()
            raise
        self._changed = threading.Condition()
        self._free = list(range(SLOTS))
        self._flights: dict[int, _Flight] = {}
        self._posting: Operation | None = None
        self._busy = False
        """What we have told the server."""
        super().__init__(stream, welcome, traffic, traffic_class, max_ops)

    def _loops(self) -> dict[str, Callable[[], None]]:
        return super()._loops() | {"poller": self._poll_all}

    # ── Posting ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _post_all(self) -> None:
        while (op := self._table.next_queued()) is not None:
            self._posting = op
            lane = self._traffic.cnic.rx if op.kind is FrameKind.READ else self._traffic.cnic.tx
            chunks = _chunks(op.ranges, self._invitation, lane.chunk_bytes)
            all(self._post(op, chunk, lane) for chunk in chunks)
            self._posting = None
            self._let_go(op)

    def _post(self, op: Operation, chunk: list[Piece], lane: Lane) -> bool:
        """Move a chunk through a free slot. Returns False when the operation has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._agent is None)
            if self._agent is None:
                return False
            slot = self._free.pop()
        n_bytes = sum(n_bytes for _, n_bytes in chunk)
        flight = _Flight(op, slot, n_bytes, op.local.take(n_bytes))
        ready = self._charged(op, n_bytes, lane) and (op.kind is FrameKind.READ or self._copy(flight))
        with self._changed:
            if not ready or self._agent is None:
                self._free.append(slot)
                return False
            self._tell(True)
            near = self._agent.memory_at + slot * MAX_CHUNK_BYTES
            flight.number = self._agent.post(op.kind is FrameKind.WRITE, near, chunk)
            self._flights[slot] = flight
            self._changed.notify_all()
            # A read's arrays are the poller's to touch: two threads at once may not touch those of one operation.
            moved = op.kind is FrameKind.WRITE and self._is_done(flight)
        if moved:
            self._land(flight)
        return not op.decided

    def _copy(self, flight: _Flight) -> bool:
        """Copy between the caller's arrays and the slot. Returns False when the operation has ended."""
        op = flight.op
        if not self._table.begin_touch(op):
            return False
        at = 0
        try:
            for array in flight.local:
                part = self._slots[flight.slot, at : at + len(array)]
                at += len(array)
                source, destination = (part, array) if op.kind is FrameKind.READ else (array, part)
                np.copyto(destination, source)
        finally:
            self._table.end_touch(op)
        return True

    # ── Polling ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _poll_all(self) -> None:
        while True:
            with self._changed:
                if not self._wait_for_flights():
                    return
                landed = [flight for flight in self._flights.values() if not flight.moved and self._is_done(flight)]
            for flight in landed:
                self._land(flight)
            if not landed:
                rest()

    def _is_done(self, flight: _Flight) -> bool:
        assert self._agent is not None
        flight.moved = self._agent.is_done(flight.number)
        return flight.moved

    def _wait_for_flights(self) -> bool:
        """Returns False at the end of the channel. Called under `_changed`."""

        def awake() -> bool:
            return self._agent is None or bool(self._flights)

        while not awake():
            if not self._busy:
                self._changed.wait()
            elif not self._changed.wait_for(awake, IDLE_AFTER_S):  # also when the poster has landed all by itself
                self._tell(False)
        return self._agent is not None

    def _land(self, flight: _Flight) -> None:
        """A chunk's bytes have moved: give its slot back, and end its operation if it was the last."""
        if flight.op.kind is FrameKind.READ:
            self._copy(flight)
        with self._changed:
            if self._flights.pop(flight.slot, None) is None:  # the channel has ended
                return
            flight.op.moved_bytes += flight.n_bytes
            self._free.append(flight.slot)
            self._changed.notify_all()
        self._let_go(flight.op)

    def _let_go(self, op: Operation) -> None:
        with self._changed:
            if self._posting is op or any(flight.op is op for flight in self._flights.values()):
                return
        self._finish(op)

    def _tell(self, busy: bool) -> None:
        """Tell the server whether its agent must be driven. Called under `_changed`."""
        if busy is not self._busy:
            self._busy = busy
            self._stream.send(Frame(FrameKind.BUSY if busy else FrameKind.IDLE))

    # ── Collecting, and the end ──────────────────────────────────────────────────────────────────────────────────────

    def _collect_all(self) -> None:
        self._receive([memoryview(bytearray(1))])
        raise ProtocolError("a server says nothing more")

    def _interrupt(self) -> None:
        """After this nothing of ours is on its way to the server's memory or from it: the socket may be shut down."""
        with self._changed:
            self._flights.clear()
            agent, self._agent = self._agent, None
            self._changed.notify_all()
            if agent is not None and not agent.destroy():
                raise RuntimeError("an agent of NIXL's lives on; the server must see this process die")


def read_invitation(welcome: Welcome) -> Invitation:
    """Raises msgspec.DecodeError, ProtocolError."""
    given = _invitation.decode(welcome.where)
    if given.stride_bytes < welcome.page_bytes or given.pool_at + welcome.pages * given.stride_bytes > 1 << 63:
        raise ProtocolError(f"its pool can't lie where it says: {welcome.pages} pages at {given.pool_at:#x}")
    return given


def _chunks(ranges: Sequence[PageRange], pool: Invitation, chunk_bytes: int) -> Iterator[list[Piece]]:
    """Yields `ranges` in chunks of at most `chunk_bytes`, and of at most MAX_DESCRIPTORS."""
    chunk: list[Piece] = []
    room_bytes = chunk_bytes
    for one in ranges:
        at = pool.pool_at + one.page * pool.stride_bytes + one.offset
        end = at + one.n_bytes
        while at < end:
            n_bytes = min(end - at, room_bytes)
            chunk.append((at, n_bytes))
            at += n_bytes
            room_bytes -= n_bytes
            if not room_bytes or len(chunk) == MAX_DESCRIPTORS:
                yield chunk
                chunk, room_bytes = [], chunk_bytes
    if chunk:
        yield chunk
