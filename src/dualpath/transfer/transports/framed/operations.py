"""The operations in flight on one channel, and the one rule that keeps the caller's memory safe.

An operation's future may end for several reasons, on several threads, and from that moment the caller's memory is the
caller's again. So a thread marks an operation *busy* while it touches that memory (`begin_touch`, `end_touch`). Whoever
ends an operation that is not busy ends it at once; of a busy one the outcome is only *decided*, and the thread that is
busy with it ends it when it lets go.

An ended operation stays in the table until the peer's last frame about it has come (`forget`), since frames may still
be on their way. So the bound on operations in flight also bounds what a slow peer can pile up.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from dualpath.transfer.pool import Bytes, MappedPages
from dualpath.transfer.transport import ChannelBusy, PageRange, TransferCause, TransferError
from dualpath.transfer.transports.framed.frames import FrameKind


class Cursor:
    """A place in a list of byte arrays; walks from first byte to last."""

    __slots__ = ("_arrays", "_index", "_offset")

    def __init__(self, arrays: Sequence[Bytes]) -> None:
        self._arrays = arrays
        self._index = 0
        self._offset = 0

    def take(self, n_bytes: int) -> list[Bytes]:
        """The next `n_bytes` as views. There must be as many: the caller keeps count."""
        slices = []
        while n_bytes:
            array = self._arrays[self._index]
            piece = array[self._offset : self._offset + n_bytes]
            slices.append(piece)
            n_bytes -= len(piece)
            self._offset += len(piece)
            if self._offset == len(array):
                self._index += 1
                self._offset = 0
        return slices


def cursor_over(pool: MappedPages, ranges: Sequence[PageRange]) -> Cursor:
    """Raises ValueError where the pool is closed. The ranges must have passed `check_ranges`."""
    return Cursor([pool.view(one.page)[one.offset : one.offset + one.n_bytes] for one in ranges])


class Operation:
    """One posted operation. `local` walks the caller's memory; `remote` the mapped pool, over shared memory only."""

    def __init__(
        self, kind: FrameKind, ranges: Sequence[PageRange], local: Sequence[Bytes], payload: bytes, deadline_ns: int
    ) -> None:
        self.kind = kind
        self.ranges = ranges
        self.local = Cursor(local)
        self.remote = Cursor(())
        self.payload = payload
        self.total_bytes = len(payload) if kind is FrameKind.PING else sum(one.n_bytes for one in ranges)
        self.moved_bytes = 0
        self.deadline_ns = deadline_ns
        self.number = 0
        self.busy = False
        self.decided = False
        self.ended = False
        self.error: TransferError | None = None
        self.result: int | bytes = self.total_bytes
        self.future: Future[Any] = Future()
        self.future.set_running_or_notify_cancel()

    def settle(self) -> None:
        """End the future. Never called under a lock: its callbacks may post."""
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.result)


class OperationTable:
    """Thread-safe. `rearm` is called when a deadline is posted that is earlier than what `next_deadline` said."""

    def __init__(self, max_ops: int, rearm: Callable[[], None]) -> None:
        self._max_ops = max_ops
        self._rearm = rearm
        self._lock = threading.Lock()
        self._has_work = threading.Condition(self._lock)
        self._quiet = threading.Condition(self._lock)
        self._ops: dict[int, Operation] = {}
        self._queue: deque[Operation] = deque()
        self._next_number = 1
        self._busy_ops = 0
        self._armed_ns: int | None = None
        self.broken: TransferError | None = None
        """Why the channel takes no more operations; None while it does."""

    def __len__(self) -> int:
        return len(self._ops)

    def add(self, op: Operation) -> None:
        """Queue an operation; it ends at once on a broken channel. Raises ChannelBusy."""
        with self._lock:
            if self.broken is None:
                if len(self._ops) >= self._max_ops:
                    raise ChannelBusy(f"{len(self._ops)} operations in flight is the channel's bound; wait for one")
                op.number = self._next_number
                self._next_number += 1
                self._ops[op.number] = op
                self._queue.append(op)
                self._has_work.notify()
                if self._armed_ns is None or op.deadline_ns < self._armed_ns:
                    self._armed_ns = op.deadline_ns
                    self._rearm()
                return
            op.error = self.broken
        op.settle()

    def next_queued(self) -> Operation | None:
        """Block for the next operation that is still wanted; None when the channel is broken."""
        with self._lock:
            while self.broken is None:
                if not self._queue:
                    self._has_work.wait()
                    continue
                op = self._queue.popleft()
                if not op.decided:
                    return op
                self._ops.pop(op.number, None)
            return None

    def get(self, number: int) -> Operation | None:
        return self._ops.get(number)

    def forget(self, op: Operation) -> None:
        """Nothing more will come about `op`."""
        with self._lock:
            self._ops.pop(op.number, None)

    def begin_touch(self, op: Operation) -> bool:
        """Before touching the caller's memory; False: it is the caller's again, keep off."""
        with self._lock:
            if op.decided:
                return False
            op.busy = True
            self._busy_ops += 1
            return True

    def end_touch(self, op: Operation) -> None:
        """After it. May be called again, to no effect."""
        with self._lock:
            if not op.busy:
                return
            op.busy = False
            self._busy_ops -= 1
            if self._busy_ops == 0:
                self._quiet.notify_all()
            op.ended = settle = op.decided
        if settle:
            op.settle()

    def end(self, op: Operation, error: TransferError | None = None) -> None:
        """End `op`, with `error` or well; the first to come decides."""
        with self._lock:
            settle = self._mark(op, error)
        if settle:
            op.settle()

    def expire(self, now: int) -> None:
        """End what has passed its deadline."""
        with self._lock:
            late = [op for op in self._ops.values() if op.deadline_ns <= now]
            settled = [op for op in late if self._mark(op, late_error(op))]
        for op in settled:
            op.settle()

    def next_deadline(self) -> int | None:
        """When `expire` next has something to do."""
        with self._lock:
            live = (op.deadline_ns for op in self._ops.values() if not op.decided)
            self._armed_ns = min(live, default=None)
            return self._armed_ns

    def fail_all(self, error: TransferError) -> None:
        """End everything with `error` and take no more. The first error stays."""
        with self._lock:
            if self.broken is None:
                self.broken = error
            settled = [op for op in self._ops.values() if self._mark(op, self.broken)]
            self._queue.clear()
            self._has_work.notify_all()
        for op in settled:
            op.settle()

    def wait_quiet(self, timeout_s: float | None = None) -> bool:
        """Block until no thread touches callers' memory."""
        with self._lock:
            return self._quiet.wait_for(lambda: self._busy_ops == 0, timeout_s)

    def _mark(self, op: Operation, error: TransferError | None) -> bool:
        """Decide the outcome; True if `op` ended with that, and is to be settled."""
        if op.decided:
            return False
        op.decided = True
        op.error = error
        op.ended = not op.busy
        return op.ended


def late_error(op: Operation) -> TransferError:
    text = f"{op.kind.name.lower()} of {op.total_bytes} bytes: {op.moved_bytes} moved by its deadline"
    return TransferError(TransferCause.DEADLINE, text)
