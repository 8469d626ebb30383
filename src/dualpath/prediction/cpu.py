"""The cores that every process of a small machine shares: processor sharing, in virtual time.

Theory of operation. Engines without accelerators compute on the cores that also move bytes, answer HTTP and replay the
agents. The kernel gives runnable threads equal shares, so with W threads runnable on C cores everybody runs at the same
rate, ``min(1, C / W)``, less what busy cores take from each other through caches and memory (`slowdown`) and what
others on the host take from all (`slowness`). One rate for all means that a single number, the service one thread would
have had so far, tells who ends when: a task ends when it has grown by the task's demand. A heap of those ends is all
the state there is.
"""

from heapq import heappop, heappush

from dualpath.prediction.processes import Signal
from dualpath.sim.events import Events


class Cpu:
    """Cores shared by all tasks. A task may stand for several threads, or for less than one that never sleeps."""

    def __init__(self, events: Events, cores: float, slowdown: float, slowness: float) -> None:
        """`slowdown`: by how much tasks take longer when all cores are busy; a lone thread is not slowed down."""
        self._events = events
        self._cores = cores
        self._slowdown = slowdown
        self._slowness = slowness
        self._ends: list[tuple[float, int, float, Signal]] = []
        """Heap of (service at its end, number, threads, signal)."""
        self._threads = 0.0
        self._served_ns = 0.0
        self._since_ns = 0
        self._number = 0
        self._armed = 0
        self.busy_core_ns = 0.0
        """Core time used so far."""

    def run(self, ns: float, threads: float = 1.0) -> Signal:
        """Set when a task has run that takes `ns` on idle cores, with `threads` threads busy meanwhile."""
        ended = Signal()
        if ns <= 0:
            ended.set()
            return ended
        self._advance()
        self._number += 1
        heappush(self._ends, (self._served_ns + ns, self._number, threads, ended))
        self._threads += threads
        self._arm()
        return ended

    def _rate(self) -> float:
        others = min(self._threads, self._cores) - 1
        slowdown = 1 + (self._slowdown - 1) * max(0.0, others) / max(1.0, self._cores - 1)
        return min(1.0, self._cores / self._threads) / (slowdown * self._slowness)

    def _advance(self) -> None:
        spent_ns = self._events.now - self._since_ns
        self._since_ns = self._events.now
        if spent_ns and self._ends:
            self._served_ns += spent_ns * self._rate()
            self.busy_core_ns += spent_ns * min(self._threads, self._cores)

    def _arm(self) -> None:
        self._armed += 1
        if self._ends:
            left_ns = (self._ends[0][0] - self._served_ns) / self._rate()
            self._events.at(self._events.now + max(1, round(left_ns)), self._fire, self._armed)

    def _fire(self, armed: int) -> None:
        if armed != self._armed:
            return  # somebody came or went meanwhile
        self._advance()
        ended: list[Signal] = []
        while self._ends and self._ends[0][0] <= self._served_ns + 1:
            _, _, threads, signal = heappop(self._ends)
            self._threads -= threads
            ended.append(signal)
        if not self._ends:
            self._threads = 0.0  # no error of rounding survives
        self._arm()
        for signal in ended:
            signal.set()
