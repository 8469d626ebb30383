"""The cores that every process of a small machine shares: processor sharing, in virtual time.

Theory of operation. Engines without accelerators compute on the cores that also move bytes, answer HTTP and replay the
agents. The kernel gives runnable threads equal shares, so with W threads computing on C cores each runs at the rate
``min(1, C / W)``, less what busy cores take from each other and what others on the host take from all (`slowness`).
Engines that prefill side by side take little from each other (`side_by_side`), a cluster that decodes more
(`slowdown`): every token is messages, wake-ups and switches.

But a thread that has slept is owed its share, and runs at once: threads that wake up for a message and sleep again
(`run_light`) hardly wait, and those that compute share what they leave.

So there are two lots of tasks. Within a lot everybody runs at the same rate, and a single number, the service one
thread would have had so far, tells who ends when: a task ends when it has grown by the task's demand. A heap of those
ends is all the state a lot has.
"""

from heapq import heappop, heappush

from dualpath.prediction.processes import Signal
from dualpath.sim.events import Events

SLICE_NS = 3_000_000
"""What a thread that has slept may run at once; the kernel's time slice is of this size."""
LEAST_SHARE = 0.05
"""Of the cores, for those that compute, whatever else runs: nobody is starved."""


class Cpu:
    """Cores shared by all tasks. A task may stand for several threads, or for less than one that never sleeps."""

    def __init__(
        self, events: Events, cores: float, slowdown: float, slowness: float, side_by_side: float | None = None
    ) -> None:
        """`slowdown`: by how much tasks take longer when all cores are busy; a lone thread is not slowed down.

        `side_by_side`: the same while no decode step runs; as `slowdown` unless given.
        """
        self._events = events
        self._cores = cores
        self._slowdown = slowdown
        self._side_by_side = slowdown if side_by_side is None else side_by_side
        self._slowness = slowness
        self._light, self._computing = _Lot(), _Lot()
        self._since_ns = 0
        self._armed = 0
        self._decoding = 0
        self.busy_core_ns = 0.0
        """Core time used so far."""

    def run(self, ns: float, threads: float = 1.0) -> Signal:
        """Set when a task has run that takes `ns` on idle cores, with `threads` threads busy meanwhile."""
        return self._run(self._computing, ns, threads)

    def run_decode(self, ns: float, threads: float = 1.0) -> Signal:
        """A decode step."""
        self._advance()
        self._decoding += 1
        step = self.run(ns, threads)
        if step.is_set:
            self._decoded(None)
        else:
            step.then(self._decoded)
        return step

    def _decoded(self, _: object) -> None:
        self._advance()
        self._decoding -= 1
        self._arm()

    def run_light(self, ns: float, threads: float = 1.0) -> Signal:
        """The same in a thread that has slept. What takes longer than a slice shares the cores like the rest."""
        return self._run(self._light if ns <= SLICE_NS else self._computing, ns, threads)

    def _run(self, lot: "_Lot", ns: float, threads: float) -> Signal:
        if ns <= 0:
            ended = Signal()
            ended.set()
            return ended
        self._advance()
        ended = lot.add(ns, threads)
        self._arm()
        return ended

    def _rates(self) -> tuple[float, float]:
        """Of a light thread and of one that computes, in nanoseconds of its demand a nanosecond."""
        threads = self._light.threads + self._computing.threads
        others = min(threads, self._cores) - 1
        slowdown = self._slowdown if self._decoding else self._side_by_side
        slowdown = 1 + (slowdown - 1) * max(0.0, others) / max(1.0, self._cores - 1)
        speed = 1 / (slowdown * self._slowness)
        kept = LEAST_SHARE * self._cores if self._computing.threads else 0.0
        light = min(1.0, (self._cores - kept) / max(self._light.threads, 1.0))
        left = self._cores - light * self._light.threads
        return speed * light, speed * min(1.0, left / max(self._computing.threads, 1.0))

    def _advance(self) -> None:
        spent_ns = self._events.now - self._since_ns
        self._since_ns = self._events.now
        if spent_ns:
            for lot, rate in zip((self._light, self._computing), self._rates(), strict=True):
                lot.served_ns += spent_ns * rate
            self.busy_core_ns += spent_ns * min(self._light.threads + self._computing.threads, self._cores)

    def _arm(self) -> None:
        self._armed += 1
        lots = zip((self._light, self._computing), self._rates(), strict=True)
        left_ns = [lot.least_left_ns / rate for lot, rate in lots if lot.threads]
        if left_ns:
            self._events.at(self._events.now + max(1, round(min(left_ns))), self._fire, self._armed)

    def _fire(self, armed: int) -> None:
        if armed != self._armed:
            return  # somebody came or went meanwhile
        self._advance()
        ended = self._light.take_ended() + self._computing.take_ended()
        self._arm()
        for signal in ended:
            signal.set()


class _Lot:
    """Tasks that run at one rate."""

    def __init__(self) -> None:
        self.threads = 0.0
        self.served_ns = 0.0
        """What a thread would have had that was here all the time."""
        self._ends: list[tuple[float, int, float, Signal]] = []
        """Heap of (service at its end, number, threads, signal)."""
        self._number = 0

    def add(self, ns: float, threads: float) -> Signal:
        ended = Signal()
        self._number += 1
        heappush(self._ends, (self.served_ns + ns, self._number, threads, ended))
        self.threads += threads
        return ended

    @property
    def least_left_ns(self) -> float:
        return self._ends[0][0] - self.served_ns

    def take_ended(self) -> list[Signal]:
        ended = []
        while self._ends and self._ends[0][0] <= self.served_ns + 1:
            _, _, threads, signal = heappop(self._ends)
            self.threads -= threads
            ended.append(signal)
        if not self._ends:
            self.threads = 0.0  # no error of rounding survives
        return ended
