"""The initiator's side of a channel, which posts operations: the threads and checks that both our transports share.

Theory of operation
-------------------
Two threads serve a channel. The *poster* takes operations first-in first-out and sends their headers and the chunks of
writes. The *collector* receives the server's frames and the chunks of reads, and ends operations at their deadlines.
Each charges this engine's CNIC (tx or rx) for a chunk before it touches it. `operations.py` says who may touch what.

The channel breaks when the stream ends, when the server violates the protocol, or on `close`. Every operation then
ends, and the stream is shut down only when none of our threads touches memory any more. So when a server sees our end
of the stream closed, that proves that we are quiet.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from dualpath.core.vocabulary import TrafficClass
from dualpath.transfer.pool import Bytes
from dualpath.transfer.traffic import DeadlineExceeded, Lane, TrafficManager
from dualpath.transfer.transport import PageRange, TransferCause, TransferError, check_operation
from dualpath.transfer.transports.framed.buffers import advance
from dualpath.transfer.transports.framed.frames import (
    CAUSES,
    HEADER_BYTES,
    Frame,
    FrameKind,
    ProtocolError,
    Stream,
    StreamClosed,
    pack_ranges,
    unpack,
)
from dualpath.transfer.transports.framed.handshake import Welcome
from dualpath.transfer.transports.framed.operations import Operation, OperationTable, late_error


class FramedChannel:
    """`Channel` over a stream. A subclass says how payload travels."""

    def __init__(
        self, stream: Stream, welcome: Welcome, traffic: TrafficManager, traffic_class: TrafficClass, max_ops: int
    ) -> None:
        self._stream = stream
        self._welcome = welcome
        self._traffic = traffic
        self._class = traffic_class
        self._table = OperationTable(max_ops, stream.wake)
        self._threads = [
            threading.Thread(target=self._run, args=(loop,), name=f"channel {name}", daemon=True)
            for name, loop in self._loops().items()
        ]
        self._exit_lock = threading.Lock()
        self._threads_left = len(self._threads)
        for thread in self._threads:
            thread.start()

    @property
    def is_open(self) -> bool:
        return self._table.broken is None

    @property
    def ops_in_flight(self) -> int:
        """Posted operations that still wait for the peer's last frame, even if their deadline has ended them."""
        return len(self._table)

    def read(self, remote: Sequence[PageRange], local: Sequence[Bytes], deadline_ns: int) -> "Future[int]":
        return self._submit(Operation(FrameKind.READ, remote, local, deadline_ns), local)

    def write(self, remote: Sequence[PageRange], local: Sequence[Bytes], deadline_ns: int) -> "Future[int]":
        return self._submit(Operation(FrameKind.WRITE, remote, local, deadline_ns), local)

    def _loops(self) -> dict[str, Callable[[], None]]:
        """What the channel's threads do, by name."""
        return {"poster": self._post_all, "collector": self._collect_all}

    def close(self) -> None:
        self._break(TransferError(TransferCause.PEER_CLOSED, "the channel was closed on this side"))
        for thread in self._threads:
            if thread is not threading.current_thread():
                # A thread that still waits for its lane touches no memory any more, and ends by itself.
                thread.join(timeout=1.0)

    # ── How payload travels ──────────────────────────────────────────────────────────────────────────────────────────

    def _prepare(self, op: Operation) -> None:
        """Called before anything is sent for a read or a write."""

    def _put(self, op: Operation, frame: Frame) -> None:
        """Move the next `frame.n_bytes` of a busy write, and send the DATA frame."""
        raise NotImplementedError

    def _get(self, op: Operation, n_bytes: int) -> None:
        """Move the next `n_bytes` of a read, or discard them if `begin_touch` refuses."""
        raise NotImplementedError

    def _interrupt(self) -> None:
        """Make threads that are busy with an operation stop soon."""

    def _read_over(self, op: Operation) -> None:
        """Called after the last frame about a read."""

    # ── Posting ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _submit(self, op: Operation, local: Sequence[Bytes]) -> "Future[int]":
        try:
            shape = self._welcome.page_bytes, self._welcome.pages
            check_operation(op.ranges, local, *shape, writes_local=op.kind is FrameKind.READ)
        except TransferError as error:
            op.future.set_exception(error)
            return op.future
        if op.total_bytes == 0:
            op.future.set_result(0)
        elif op.deadline_ns <= self._traffic.clock():  # the collector might expire it too late
            op.future.set_exception(late_error(op))
        else:
            self._table.add(op)
        return op.future

    def _post_all(self) -> None:
        while (op := self._table.next_queued()) is not None:
            self._prepare(op)
            self._stream.send(self._opening(op), [pack_ranges(op.ranges)])
            if op.kind is FrameKind.WRITE and not self._post_chunks(op):
                self._stream.send(Frame(FrameKind.ABORT, op.number))
                self._table.forget(op)

    def _opening(self, op: Operation) -> Frame:
        timeout_ns = max(op.deadline_ns - self._traffic.clock(), 0)
        return Frame(op.kind, op.number, op.total_bytes, len(op.ranges), timeout_ns=timeout_ns)

    def _post_chunks(self, op: Operation) -> bool:
        """Send a write's payload. Returns False when the operation ended before all of it was sent."""
        lane = self._traffic.cnic.tx
        while op.moved_bytes < op.total_bytes:
            n_bytes = min(lane.chunk_bytes, op.total_bytes - op.moved_bytes)
            if not self._charged(op, n_bytes, lane) or not self._table.begin_touch(op):
                return False
            try:
                self._put(op, Frame(FrameKind.DATA, op.number, n_bytes))
                op.moved_bytes += n_bytes
            finally:
                self._table.end_touch(op)
        return True

    def _charged(self, op: Operation, n_bytes: int, lane: Lane) -> bool:
        """Acquire the lane. Returns False when the operation ended before the grant."""
        if op.decided:
            return False
        try:
            lane.acquire(self._class, n_bytes, op.deadline_ns)
        except DeadlineExceeded:
            self._table.end(op, late_error(op))
        return not op.decided

    # ── Collecting ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _collect_all(self) -> None:
        header = bytearray(HEADER_BYTES)
        while True:
            self._receive([memoryview(header)])
            frame = unpack(header)
            op = self._table.get(frame.op)
            match frame.kind, op:
                case FrameKind.ERROR, _:
                    self._collect_error(frame, op)
                case FrameKind.DATA, Operation(kind=FrameKind.READ):
                    self._collect_data(frame, op)
                case FrameKind.DONE, Operation(kind=FrameKind.WRITE):
                    self._finish(op)
                case _:
                    raise ProtocolError(f"an answer to nothing that was asked: {frame}")

    def _collect_data(self, frame: Frame, op: Operation) -> None:
        if op.moved_bytes + frame.n_bytes > op.total_bytes:
            raise ProtocolError(f"more than the {op.total_bytes} bytes that were asked for: {frame}")
        self._charge_arrival(frame.n_bytes)
        self._get(op, frame.n_bytes)
        op.moved_bytes += frame.n_bytes
        if op.moved_bytes == op.total_bytes:
            self._read_over(op)
            self._finish(op)

    def _collect_error(self, frame: Frame, op: Operation | None) -> None:
        text = bytearray(frame.n_bytes)
        self._receive([memoryview(text)])
        if op is None:  # a write that was aborted meanwhile
            return
        if op.kind is FrameKind.READ:
            self._read_over(op)
        self._finish(op, TransferError(CAUSES[frame.cause], text.decode(errors="replace")))

    def _finish(self, op: Operation, error: TransferError | None = None) -> None:
        self._table.forget(op)
        self._table.end(op, error)

    def _charge_arrival(self, n_bytes: int) -> None:
        """Acquire the receive lane; meanwhile end operations that reach their deadline."""
        while n_bytes:
            try:
                self._traffic.cnic.rx.acquire(self._class, n_bytes, self._table.next_deadline())
                return
            except DeadlineExceeded as late:
                n_bytes -= late.granted_bytes
                self._table.expire(self._traffic.clock())

    def _receive(self, buffers: list[memoryview], wanted: Callable[[], bool] | None = None) -> list[memoryview]:
        """Fill `buffers`; meanwhile end operations that reach their deadline. Stops early when `wanted` turns False.
        Returns what is left to fill."""
        rest = list(filter(len, buffers))
        while rest and (wanted is None or wanted()):
            n_bytes = self._stream.receive(rest, self._table.next_deadline)
            if n_bytes == 0:
                self._table.expire(self._traffic.clock())
            advance(rest, n_bytes)
        return rest

    # ── The end ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _run(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except StreamClosed as closed:
            self._break(TransferError(TransferCause.PEER_CLOSED, str(closed)))
        except ProtocolError as error:
            self._break(TransferError(TransferCause.PROTOCOL, str(error)))
        except BaseException as error:
            self._break(TransferError(TransferCause.PROTOCOL, f"a bug in this channel: {error!r}"))
            raise
        finally:
            self._leave()

    def _break(self, error: TransferError) -> None:
        self._table.fail_all(error)
        self._interrupt()
        self._table.wait_quiet()
        self._stream.shutdown()

    def _leave(self) -> None:
        """The last thread out releases the socket."""
        with self._exit_lock:
            self._threads_left -= 1
            if self._threads_left == 0:
                self._release()

    def _release(self) -> None:
        self._stream.close()
