"""Processes under virtual time: generators that yield the signals they wait for.

Theory of operation. The runtime's threads and tasks are sequences of "take this, then wait for that", and so are these:
a process is a generator; what it yields is a `Signal`, and it goes on, with the signal's value, when that is set. A
process is itself a signal that is set when it returns, with what it returned. `Workers` are the threads of a pool: jobs
first come, first served, as many at a time as there are threads.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import Any

from dualpath.sim.events import Events

Steps = Generator["Signal", Any, Any]
"""A process to be."""


class Signal:
    """Something that happens once. What waits for it goes on in the order in which it began to wait."""

    __slots__ = ("_waiting", "is_set", "value")

    def __init__(self) -> None:
        self.is_set = False
        self.value: Any = None
        self._waiting: list[Callable[[Any], None]] = []

    def set(self, value: Any = None) -> None:
        self.is_set = True
        self.value = value
        waiting, self._waiting = self._waiting, []
        for go_on in waiting:
            go_on(value)

    def then(self, go_on: Callable[[Any], None]) -> None:
        """Call `go_on(value)` when the signal is set; it must not be set yet."""
        self._waiting.append(go_on)


class Processes:
    """Starts processes, and makes the signals of time."""

    def __init__(self, events: Events) -> None:
        self.events = events

    def start(self, steps: Steps) -> Signal:
        """Run `steps` up to its first wait now; the signal is set, with what it returns, when it ends."""
        ended = Signal()

        def go_on(value: Any) -> None:
            try:
                waited_for = steps.send(value)
                while waited_for.is_set:
                    waited_for = steps.send(waited_for.value)
            except StopIteration as end:
                ended.set(end.value)
            else:
                waited_for.then(go_on)

        go_on(None)
        return ended

    def until(self, time_ns: float) -> Signal:
        """Set at `time_ns`, or set already where that has passed."""
        reached = Signal()
        if time_ns <= self.events.now:
            reached.set()
        else:
            self.events.at(round(time_ns), reached.set)
        return reached

    def after(self, ns: float) -> Signal:
        return self.until(self.events.now + ns)


def all_of(signals: Iterable[Signal]) -> Signal:
    """Set when all are."""
    every = Signal()
    left = [signal for signal in signals if not signal.is_set]
    count = len(left)

    def one(_: Any) -> None:
        nonlocal count
        count -= 1
        if not count:
            every.set()

    for signal in left:
        signal.then(one)
    if not left:
        every.set()
    return every


class Workers:
    """`threads` threads that take jobs in the order in which they are asked for."""

    def __init__(self, processes: Processes, threads: int = 1) -> None:
        self._processes = processes
        self._idle = threads
        self._waiting: deque[tuple[Steps, Signal]] = deque()

    def submit(self, job: Steps) -> Signal:
        """Set, with the job's result, when it has run."""
        ended = Signal()
        if self._idle:
            self._idle -= 1
            self._run(job, ended)
        else:
            self._waiting.append((job, ended))
        return ended

    def _run(self, job: Steps, ended: Signal) -> None:
        running = self._processes.start(job)
        if running.is_set:
            self._over(ended, running.value)
        else:
            running.then(lambda value: self._over(ended, value))

    def _over(self, ended: Signal, value: Any) -> None:
        if self._waiting:
            self._run(*self._waiting.popleft())
        else:
            self._idle += 1
        ended.set(value)


class Condition:
    """A state that others change: `when(holds)` is set once `holds()` does, which is looked at on `changed()`."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Callable[[], bool], Signal]] = []

    def when(self, holds: Callable[[], bool]) -> Signal:
        reached = Signal()
        if holds():
            reached.set()
        else:
            self._waiting.append((holds, reached))
        return reached

    def changed(self) -> None:
        ready = [(holds, reached) for holds, reached in self._waiting if holds()]
        self._waiting = [one for one in self._waiting if one not in ready]
        for _, reached in ready:
            reached.set()
