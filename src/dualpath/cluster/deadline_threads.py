"""Threads for calls that may never return: every call has a deadline, and a thread that hangs is replaced.

Theory of operation. Nobody can interrupt a thread that waits for a disk or a server. So a call that is late is
*abandoned*: whoever waits for it gets `LateError` at once, its thread counts as hung, and another thread takes its
place, until `most_hung` threads hang. What an abandoned call brings home later is dropped. A hung thread that comes
back ends, or takes the place of one that still hangs. When every thread hangs, calls are refused at once.

An abandoned call must not touch what its caller has taken back. So it works on memory of its own, and gives or takes
what belongs to the caller only inside `Call.hand_over`, which an abandoned call can't enter.

The threads are daemons: a process ends although some hang.
"""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Generic, TypeVar

from dualpath.thread_names import name_this_thread

T = TypeVar("T")
Clock = Callable[[], float]
CHECKS = 20
"""A deadline is noticed at most a `CHECKS`-th of it too late."""


class LateError(Exception):
    """The call has missed its deadline, or every thread hangs. What it was to do may still happen, or never."""


class AbandonedError(Exception):
    """Raised in the thread of a call that nobody waits for any more, where it may end."""


class Call(Generic[T]):
    """One call. Its thread uses `paused`, `check`, `progress` and `hand_over`; who waits, `future` and `let_go`."""

    def __init__(
        self,
        work: "Callable[[Call[T]], T]",
        if_late: "Callable[[Call[T]], T]",
        deadline_s: float,
        clock: Clock,
    ) -> None:
        self._work = work
        self._if_late = if_late
        self._deadline_s = deadline_s
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._abandoned = False
        self.future: asyncio.Future[T] = self._loop.create_future()
        self.began_s = math.inf
        self.due_s = math.inf

    def check(self) -> None:
        """Raises AbandonedError when nobody waits for this call any more."""
        if self._abandoned:
            raise AbandonedError

    def progress(self) -> None:
        """The deadline starts anew. Raises AbandonedError."""
        self.check()
        self.due_s = self._clock() + self._deadline_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here does not count. Raises AbandonedError."""
        self.check()
        paused_s, due_s, self.due_s = self._clock(), self.due_s, math.inf
        try:
            yield
        finally:
            self.due_s = due_s + self._clock() - paused_s

    def hand_over(self, act: Callable[[], None]) -> None:
        """Do something short with memory of the caller's. Raises AbandonedError when it has taken that back."""
        with self._lock:
            self.check()
            act()

    async def let_go(self) -> None:
        """Abandon the call. When this returns, it touches nothing of the caller's."""
        while not self.abandon():
            await asyncio.sleep(0.001)
        if not self.future.cancel() and not self.future.cancelled():
            self.future.exception()  # mark it as seen: nobody looks at it any more

    def abandon(self) -> bool:
        """Returns False while it hands over, which takes milliseconds. The future stays as it is."""
        if not self._lock.acquire(blocking=False):
            return False
        self._abandoned = True
        self._lock.release()
        return True

    # ── what the threads and their watch do ─────────────────────────────────────────────────────────────────────────

    def begin(self) -> bool:
        """Returns False when there is nothing to do: it has been abandoned."""
        self.began_s = self._clock()
        self.due_s = self.began_s + self._deadline_s
        return not self._abandoned

    def run(self) -> Callable[[], None]:
        """On a thread. Returns what delivers the outcome to who waits; that of an abandoned call is dropped."""
        result, error = _outcome(lambda: self._work(self))

        def deliver() -> None:
            if not self._abandoned:
                with suppress(RuntimeError):  # the loop is closed, and nobody waits
                    self._loop.call_soon_threadsafe(self._settle, result, error)

        return deliver

    def late(self) -> None:
        """On the event loop, once it is abandoned."""
        self._settle(*_outcome(lambda: self._if_late(self)))

    def refuse(self) -> None:
        """On the event loop: no thread will take it."""
        self._settle(None, LateError("every thread hangs"))

    def _settle(self, result: T | None, error: Exception | None) -> None:
        if self.future.done():
            return
        if error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)  # type: ignore[arg-type]


def _outcome(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error


def _late(_: Call[T]) -> T:
    raise LateError("no answer by the deadline")


class DeadlineThreads:
    """`count` threads called `name`, and up to `most_hung` more for those that hang. Calls begin in their order.

    Used from one event loop. `running` includes `hung` calls; `late_calls` have missed their deadline so far.
    """

    def __init__(
        self, count: int, name: str, deadline_s: float, *, most_hung: int, clock: Clock = time.monotonic
    ) -> None:
        self._count = count
        self._most_hung = most_hung
        self._name = name
        self._deadline_s = deadline_s
        self._clock = clock
        lock = threading.Lock()
        self._work = threading.Condition(lock)
        self._ended = threading.Condition(lock)
        self._queue: deque[Call[object]] = deque()
        self._running: set[Call[object]] = set()
        self._hung: set[Call[object]] = set()
        self._threads = self._idle = 0
        self._closed = False
        self._timer: asyncio.TimerHandle | None = None
        self.late_calls = 0

    def submit(
        self,
        work: Callable[[Call[T]], T],
        *,
        if_late: Callable[[Call[T]], T] = _late,
        deadline_s: float | None = None,
    ) -> Call[T]:
        """Queue a call, whose deadline starts when a thread takes it. `if_late` says what comes of a late one."""
        call = Call(work, if_late, self._deadline_s if deadline_s is None else deadline_s, self._clock)
        with self._work:
            if self._closed or self._all_hang():
                call.refuse()
                return call
            self._queue.append(call)  # type: ignore[arg-type]
            self._hire()
            self._work.notify()
        self._arm()
        return call

    @property
    def running(self) -> int:
        return len(self._running) + len(self._hung)

    @property
    def hung(self) -> int:
        return len(self._hung)

    def close(self, wait_s: float, *, finish: bool = False) -> None:
        """Take no more calls. Wait for those that run, and with `finish` for those queued, but not for hung ones."""
        until_s = time.monotonic() + wait_s
        with self._ended:
            self._closed = True
            if not finish:
                self._queue.clear()
            self._work.notify_all()
            while (self._queue or self._running) and not self._all_hang() and time.monotonic() < until_s:
                self._ended.wait(max(until_s - time.monotonic(), 0))
            self._queue.clear()

    # ── the event loop's part ───────────────────────────────────────────────────────────────────────────────────────

    def _arm(self) -> None:
        if self._timer is None and not self._closed:
            self._timer = asyncio.get_running_loop().call_later(self._deadline_s / CHECKS, self._watch)

    def _watch(self) -> None:
        """Abandon what is late, and replace its threads."""
        self._timer = None
        now_s = self._clock()
        refused: list[Call[object]] = []
        with self._work:
            late = [call for call in self._running if call.due_s <= now_s and call.abandon()]
            self._running.difference_update(late)
            self._hung.update(late)
            self._hire()
            if self._all_hang():
                refused += self._queue
                self._queue.clear()
            busy = bool(self._queue or self._running)
        self.late_calls += len(late)
        for call in late:
            call.late()
        for call in refused:
            call.refuse()
        if busy:
            self._arm()

    def _all_hang(self) -> bool:
        return len(self._hung) >= self._count + self._most_hung

    def _hire(self) -> None:
        """Start threads for what is queued, as far as there may be more. Holds the lock."""
        most = self._count + min(len(self._hung), self._most_hung)
        for _ in range(min(len(self._queue) - self._idle, most - self._threads)):
            self._threads += 1
            threading.Thread(target=self._take_calls, name=self._name, daemon=True).start()

    # ── the threads' part ───────────────────────────────────────────────────────────────────────────────────────────

    def _take_calls(self) -> None:
        name_this_thread(self._name)
        while (call := self._next()) is not None:
            deliver = call.run()
            with self._ended:
                self._running.discard(call)
                self._hung.discard(call)
                self._ended.notify_all()
            deliver()
            del call, deliver  # an idle thread keeps no memory of its last call's

    def _next(self) -> Call[object] | None:
        """Returns the next call; None when this thread is one too many, or has nothing more to do."""
        with self._work:
            while True:
                if self._threads - len(self._hung) > self._count:
                    break
                if self._queue:
                    call = self._queue.popleft()
                    if call.begin():
                        self._running.add(call)
                        return call
                elif self._closed:
                    break
                else:
                    self._idle += 1
                    self._work.wait()
                    self._idle -= 1
            self._threads -= 1
            self._work.notify()  # it may have been woken for a call that another thread must take now
            return None
