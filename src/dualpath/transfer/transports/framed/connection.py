"""The server's side of one connection: checks, paces and answers a peer's operations on this engine's pool.

Two threads serve it. The *receiver* takes frames and the chunks of writes, and answers writes. The *replier* serves
reads first-in first-out, so that an outgoing read does not delay an incoming write. Every chunk passes this
engine's CNIC. Nothing that a peer sends is trusted: a descriptor outside the pool is answered with an error, a protocol
violation ends the connection, and the queue between the threads is bounded, which stops a peer that asks for too much.
"""

import contextlib
import queue
import socket
import threading
from typing import TYPE_CHECKING

import msgspec

from dualpath.core.vocabulary import TrafficClass
from dualpath.transfer.pool import Bytes
from dualpath.transfer.traffic import DeadlineExceeded
from dualpath.transfer.transport import TransferCause, TransferError, check_ranges
from dualpath.transfer.transports.framed.frames import (
    CAUSES,
    RANGE_BYTES,
    Frame,
    FrameKind,
    ProtocolError,
    Stream,
    StreamClosed,
    unpack_ranges,
)
from dualpath.transfer.transports.framed.handshake import VERSION, Session, Welcome
from dualpath.transfer.transports.framed.operations import Cursor, cursor_over
from dualpath.transfer.transports.framed.sealed import Seal

if TYPE_CHECKING:
    from dualpath.transfer.transports.framed.server import FramedServer

MAX_QUEUED_REPLIES = 1024


class _Transfer(msgspec.Struct):
    """A read to be served, or a write whose chunks arrive. A write without a cursor was refused; its chunks are
    discarded and not counted.
    """

    op: int
    left_bytes: int
    cursor: Cursor | None
    deadline_ns: int


class Connection:
    """One connection that has proved itself. A subclass says how payload travels and how to hang up."""

    def __init__(self, number: int, connected: socket.socket, server: "FramedServer", session: Session) -> None:
        self.number = number
        self.peer_tag = session.hello.tag
        self._session = session
        self._forced = False
        self._class = session.hello.traffic_class
        self._stream = Stream(connected, server.traffic.clock)
        if server.authenticated:
            theirs, ours = session.frame_keys()
            self._stream.seal = Seal(ours, theirs)
        self._server = server
        self._writes: dict[int, _Transfer] = {}
        self._replies: queue.Queue[_Transfer | None] = queue.Queue(MAX_QUEUED_REPLIES)
        self._replier = threading.Thread(target=self._reply_all, name=f"channel replier {number}", daemon=True)
        self._receiver = threading.Thread(target=self._run, name=f"channel receiver {number}", daemon=True)

    def start(self) -> None:
        """Raises RuntimeError when no thread can be started; then it is closed."""
        try:
            self._receiver.start()
        except RuntimeError:
            self._stream.close()
            raise

    def join(self, timeout_s: float) -> None:
        self._receiver.join(timeout_s)

    def force(self) -> None:
        """End the connection without waiting for the peer, which is then not proven quiet."""
        self._forced = True
        self._stream.shutdown()

    # ── How payload travels ──────────────────────────────────────────────────────────────────────────────────────────

    def hang_up(self) -> None:
        """End the connection from any thread. Its end must prove that the peer no longer touches the pool."""
        raise NotImplementedError

    def _pull(self, n_bytes: int, cursor: Cursor | None) -> None:
        """Receive a chunk of a write into the pool, or discard it when there is no cursor."""
        raise NotImplementedError

    def _push(self, frame: Frame, slices: list[Bytes]) -> None:
        """Send a chunk of a read."""
        raise NotImplementedError

    def _mark_class(self, traffic_class: TrafficClass) -> None:
        """The peer's class is known now."""

    def _where(self) -> bytes:
        """What the peer is told of the pool, once it has proved itself."""
        return b""

    def _pushed(self, op: int) -> None:
        """The last chunk of a read was sent, or its error."""
        self._ended(op)

    def _has_let_go(self) -> bool:
        """Whether nothing of ours can be touched for the peer any more, now that its end is closed."""
        return True

    # ── Receiving ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        try:
            self._greet()
            self._replier.start()
            self._receive_all()
        except StreamClosed:
            pass
        except Exception as error:  # no failure of a connection may end the server
            self._server.violated(self, error)
            self._part()
        finally:
            self._stream.shutdown()
            if self._replier.ident is not None:
                self._replies.put(None)
                self._replier.join()
            self._stream.close()
            if self._has_let_go() and not self._forced:
                self._server.in_flight.end_connection(self.peer_tag, self.number)
            self._server.gone(self)

    def _greet(self) -> None:
        self._mark_class(self._class)
        if not self._server.in_flight.begin(self.peer_tag, (self.number, 0)):
            raise ProtocolError("it has too much in flight")
        pool = self._server.pool
        welcome = Welcome(VERSION, pool.page_bytes, pool.pages, self._where())
        welcome = msgspec.structs.replace(welcome, proof=self._session.server_proof(welcome))
        body = msgspec.msgpack.encode(welcome)
        self._stream.send(Frame(FrameKind.WELCOME, n_bytes=len(body)), [body])

    def _part(self) -> None:
        """Hang up and wait until the peer has closed its end."""
        self.hang_up()
        with contextlib.suppress(StreamClosed):
            while True:
                self._stream.discard(1 << 20)

    def _receive_all(self) -> None:
        while True:
            frame = self._stream.receive_frame()
            match frame.kind:
                case FrameKind.DATA:
                    self._receive_chunk(frame)
                case FrameKind.READ | FrameKind.WRITE:
                    self._open(frame)
                case FrameKind.ABORT:
                    if self._writes.pop(frame.op, None) is None:
                        raise ProtocolError(f"ABORT of no open write: {frame}")
                    self._ended(frame.op)
                case FrameKind.DONE:
                    self._ended(frame.op)
                case _:
                    raise ProtocolError(f"a server is not sent {frame.kind.name}")

    def _open(self, frame: Frame) -> None:
        ranges = unpack_ranges(self._stream.receive_bytes(frame.ranges * RANGE_BYTES))
        if frame.n_bytes != sum(one.n_bytes for one in ranges) or not ranges or frame.op == 0:
            raise ProtocolError(f"a total that is not the sum of the ranges: {frame}")
        if not self._server.in_flight.begin(self.peer_tag, (self.number, frame.op)):
            raise ProtocolError(f"operation {frame.op} is in flight already, or too many are")
        deadline_ns = self._server.traffic.clock() + frame.timeout_ns
        pool = self._server.pool
        try:
            check_ranges(ranges, pool.page_bytes, pool.pages)
            cursor: Cursor | None = cursor_over(pool, ranges)
        except TransferError as error:
            cursor = None
            self._answer_error(frame.op, error)
        transfer = _Transfer(frame.op, frame.n_bytes, cursor, deadline_ns)
        if frame.kind is FrameKind.WRITE:
            self._writes[frame.op] = transfer
        elif cursor is not None:
            self._replies.put(transfer)
        else:
            self._pushed(frame.op)

    def _receive_chunk(self, frame: Frame) -> None:
        write = self._writes.get(frame.op)
        if write is None or frame.n_bytes > write.left_bytes:
            raise ProtocolError(f"a chunk of no open write: {frame}")
        if write.cursor is not None:
            try:
                self._server.traffic.cnic.rx.acquire(self._class, frame.n_bytes, write.deadline_ns)
            except DeadlineExceeded as late:
                write.cursor = None
                self._answer_error(frame.op, TransferError(TransferCause.DEADLINE, f"on the receiving side: {late}"))
        self._pull(frame.n_bytes, write.cursor)
        write.left_bytes -= frame.n_bytes
        if write.left_bytes == 0:
            del self._writes[frame.op]
            self._ended(frame.op)
            if write.cursor is not None:
                self._send(Frame(FrameKind.DONE, frame.op))

    # ── Replying ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _reply_all(self) -> None:
        connected = True
        while (reply := self._replies.get()) is not None:
            if not connected:
                continue
            try:
                self._reply_read(reply)
            except StreamClosed:
                connected = False

    def _reply_read(self, read: _Transfer) -> None:
        lane = self._server.traffic.cnic.tx
        assert read.cursor is not None
        while read.left_bytes:
            n_bytes = min(lane.chunk_bytes, read.left_bytes)
            try:
                lane.acquire(self._class, n_bytes, read.deadline_ns)
            except DeadlineExceeded as late:
                self._answer_error(read.op, TransferError(TransferCause.DEADLINE, f"on the sending side: {late}"))
                break
            self._push(Frame(FrameKind.DATA, read.op, n_bytes), read.cursor.take(n_bytes))
            read.left_bytes -= n_bytes
        self._pushed(read.op)

    def _answer_error(self, op: int, error: TransferError) -> None:
        self._server.rejected()
        text = str(error).removeprefix(f"{error.cause.value}: ").encode()[:1024]
        self._send(Frame(FrameKind.ERROR, op, len(text), cause=CAUSES.index(error.cause)), [text])

    def _send(self, frame: Frame, payload: list[bytes] | None = None) -> None:
        """Send unless we have hung up: then only the receiver still waits, for the peer's end."""
        with contextlib.suppress(StreamClosed):
            self._stream.send(frame, payload or ())

    def _ended(self, op: int) -> None:
        self._server.in_flight.end(self.peer_tag, (self.number, op))
