"""The operations in flight on one channel, and the one rule that keeps the caller's memory safe.

An operation's future may end for several reasons, on several threads. From that moment the caller may reuse its memory.
So a thread marks an operation *busy* while it touches that memory (`begin_touch`, `end_touch`). An operation that is
not busy is ended at once. For a busy one the outcome is only *decided*, and the busy thread ends it in `end_touch`.

An ended operation stays in the table until the peer's last frame about it has come (`forget`), because frames may still
be on their way. So the bound on operations in flight also limits what a slow peer can accumulate.
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
    """A position in a list of byte arrays; moves from the first byte to the last."""

    __slots__ = ("_arrays", "_index", "_offset")

    def __init__(self, arrays: Sequence[Bytes]) -> None:
        self._arrays = arrays
        self._index = 0
        self._offset = 0

    def take(self, n_bytes: int) -> list[Bytes]:
        """Returns the next `n_bytes` as views. At least that many must be left: the caller keeps count."""
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
    """Returns a cursor over ranges that have passed `check_ranges`. Raises ValueError if the pool is closed."""
    return Cursor([pool.view(one.page)[one.offset : one.offset + one.n_bytes] for one in ranges])


class Operation:
    """One posted operation. `local` is a cursor in the caller's memory; `remote` one in the mapped pool (shm only)."""

    def __init__(self, kind: FrameKind, ranges: Sequence[PageRange], local: Sequence[Bytes], deadline_ns: int) -> None:
        self.kind = kind
        self.ranges = ranges
        self.local = Cursor(local)
        self.remote = Cursor(())
        self.total_bytes = sum(one.n_bytes for one in ranges)
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
        """End the future. Must not be called under a lock, because its callbacks may post."""
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.result)


class OperationTable:
    """A channel's operations. Thread-safe. Calls `rearm` when a posted deadline is before what `next_deadline` said."""

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
        """Block until there is a queued operation that has not ended. Returns None when the channel is broken."""
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
        """Remove `op`: the peer will send nothing more about it."""
        with self._lock:
            self._ops.pop(op.number, None)

    def begin_touch(self, op: Operation) -> bool:
        """Call it before touching the caller's memory. Returns False when the memory must not be touched any more."""
        with self._lock:
            if op.decided:
                return False
            op.busy = True
            self._busy_ops += 1
            return True

    def end_touch(self, op: Operation) -> None:
        """Call it after touching the memory. A second call has no effect."""
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
        """End `op` with `error`, or as succeeded; the first call decides."""
        with self._lock:
            settle = self._mark(op, error)
        if settle:
            op.settle()

    def expire(self, now: int) -> None:
        """End the operations whose deadline has passed."""
        with self._lock:
            late = [op for op in self._ops.values() if op.deadline_ns <= now]
            settled = [op for op in late if self._mark(op, late_error(op))]
        for op in settled:
            op.settle()

    def next_deadline(self) -> int | None:
        """Returns when `expire` next has something to do."""
        with self._lock:
            live = (op.deadline_ns for op in self._ops.values() if not op.decided)
            self._armed_ns = min(live, default=None)
            return self._armed_ns

    def fail_all(self, error: TransferError) -> None:
        """End all operations with `error` and accept no more. The first error is kept."""
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
        """Decide the outcome. Returns True if that ends `op`; the caller must then settle it."""
        if op.decided:
            return False
        op.decided = True
        op.error = error
        op.ended = not op.busy
        return op.ended


def late_error(op: Operation) -> TransferError:
    text = f"{op.kind.name.lower()} of {op.total_bytes} bytes: {op.moved_bytes} moved by its deadline"
    return TransferError(TransferCause.DEADLINE, text)
