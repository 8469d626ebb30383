"""The traffic manager: every byte into or out of an engine passes one of its NICs, in one of two classes (paper §5).

Theory of operation
-------------------
An engine has two NICs, ``snic`` (storage network) and ``cnic`` (compute network). Each NIC has two lanes, ``rx`` into
the engine and ``tx`` out of it. Before a thread moves a chunk, it calls `Lane.acquire`, which returns when the lane
lets the chunk through. `core.arbiter.Arbiter` decides who is next; this module adds a lock and sleeping.

One of the threads that wait on a lane *leads*: it sleeps until the arbiter can grant something, polls it, wakes the
threads with a grant, and passes the lead on when it has a grant itself. So a grant wakes one thread, not all. A leader
that sleeps can't be woken; a high-class thread, which may wait less long, takes the lead from a low-class one.

A thread sleeps 50-100 µs too long, more when another holds the interpreter lock, and copies its chunk before it
requests the next one. Without credit the lane would idle meanwhile and lose that part of its rate. So a chunk counts as
requested `burst_ns` earlier than it was: it starts when the lane became free, but at most that long ago. The cost is
that an idle lane lets through `burst_ns` worth of bytes at once.

With a rate of None (real hardware, whose NICs pace themselves) no thread waits, and all bytes are still counted.
"""

import threading
import time
from collections.abc import Callable
from functools import partial

import msgspec

from dualpath.core.arbiter import Arbiter
from dualpath.core.traffic_classes import WEIGHTS
from dualpath.core.vocabulary import TrafficClass

Clock = Callable[[], int]
Sleep = Callable[[int], None]
Weights = tuple[int, int]

BURST_NS = 2_000_000
MIN_CHUNK_BYTES = 64 * 1024
MAX_CHUNK_BYTES = 256 * 1024
CHUNK_NS = 2_000_000
"""A chunk should take about this long, which is `BURST_NS`. A high-class message waits for a packet of a low-class one
and not for its chunk; but each chunk wakes threads that take the interpreter lock and the processor from messages. With
chunks of 500 µs KV cost twice the CPU, and messages beside it took 1.7 to 2 times as long (measured)."""
WHOLE_CHUNK_BYTES = 1024 * 1024
"""Chunk size on lanes without a rate, and on the storage network, which carries no high class: nobody waits for a chunk
there. Each chunk costs about 50 µs of CPU; with 64 KiB chunks a SNIC of 60 MB/s took a tenth of a core (measured)."""


class DeadlineExceeded(Exception):  # noqa: N818
    """The deadline passed before the lane's grant. `granted_bytes` of the request were let through and counted."""

    def __init__(self, text: str, granted_bytes: int = 0) -> None:
        super().__init__(text)
        self.granted_bytes = granted_bytes


class LaneStatistics(msgspec.Struct, frozen=True, gc=False):
    """Bytes let through so far by class, and their time at the lane's rate (0 when it has none)."""

    high_bytes: int
    low_bytes: int
    busy_ns: int
    waiting: int
    """Threads that wait now."""


class NicStatistics(msgspec.Struct, frozen=True, gc=False):
    """Both lanes of a NIC."""

    rx: LaneStatistics
    tx: LaneStatistics


class TrafficStatistics(msgspec.Struct, frozen=True, gc=False):
    """Both NICs of an engine."""

    snic: NicStatistics
    cnic: NicStatistics


class _Waiter:
    """A requested chunk. `signal` is a lock that the waiting thread blocks on: the cheapest timed wait there is.

    `attended` means that a thread waits for it and can take the lead.
    """

    __slots__ = ("attended", "done_ns", "signal", "traffic_class")

    def __init__(self, traffic_class: TrafficClass) -> None:
        self.traffic_class = traffic_class
        self.attended = False
        self.done_ns: int | None = None
        self.signal = threading.Lock()
        self.signal.acquire()

    def wake(self) -> None:
        if self.signal.locked():
            self.signal.release()


class Lane:
    """One direction of one NIC."""

    def __init__(
        self,
        name: str,
        rate_bytes_per_s: int | None,
        clock: Clock,
        sleep: Sleep,
        weights: Weights,
        burst_ns: int,
        whole_chunks: bool,
    ) -> None:
        self.name = name
        self._whole_chunks = whole_chunks or rate_bytes_per_s is None
        self.rate_bytes_per_s = rate_bytes_per_s
        self._clock = clock
        self._sleep = sleep
        self._arbiter = Arbiter(rate_bytes_per_s, weights, burst_ns)
        self._burst_ns = burst_ns
        self._lock = threading.Lock()
        self._waiting: dict[int, _Waiter] = {}
        self._leader: int | None = None

    @property
    def chunk_bytes(self) -> int:
        """Size of the chunks in which to move bytes through this lane."""
        if self._whole_chunks or self.rate_bytes_per_s is None:
            return WHOLE_CHUNK_BYTES
        return min(max(self.rate_bytes_per_s * CHUNK_NS // 1_000_000_000, MIN_CHUNK_BYTES), MAX_CHUNK_BYTES)

    def acquire(self, traffic_class: TrafficClass, n_bytes: int, deadline_ns: int | None = None) -> None:
        """Block until `n_bytes` count as sent; more than a chunk is requested one chunk at a time.

        Raises DeadlineExceeded at `deadline_ns` of the manager's clock; chunks granted by then stay counted.
        """
        if self.rate_bytes_per_s is None:
            if n_bytes:
                with self._lock:
                    self._ask(self._clock(), n_bytes, _Waiter(traffic_class))
            return
        granted_bytes = 0
        while granted_bytes < n_bytes:
            chunk_bytes = min(n_bytes - granted_bytes, self.chunk_bytes)
            try:
                self._finish(*self._begin(traffic_class, chunk_bytes, deadline_ns), deadline_ns)
            except DeadlineExceeded as late:
                raise DeadlineExceeded(f"{late}, {granted_bytes} of {n_bytes} bytes sent", granted_bytes) from None
            granted_bytes += chunk_bytes

    def statistics(self) -> LaneStatistics:
        with self._lock:
            high_bytes, low_bytes = self._arbiter.served_bytes
            return LaneStatistics(high_bytes, low_bytes, self._arbiter.busy_ns, len(self._waiting))

    def _begin(self, traffic_class: TrafficClass, n_bytes: int, deadline_ns: int | None) -> tuple[int, _Waiter]:
        """Request a chunk. It checks the deadline first, because a free lane would grant the chunk even if late."""
        waiter = _Waiter(traffic_class)
        with self._lock:
            now = self._clock()
            if deadline_ns is not None and now >= deadline_ns:
                raise self._late(now, deadline_ns)
            return self._ask(now, n_bytes, waiter), waiter

    def _ask(self, now: int, n_bytes: int, waiter: _Waiter) -> int:
        ticket = self._arbiter.request(now - self._burst_ns, waiter.traffic_class, n_bytes)
        self._waiting[ticket] = waiter
        self._grant(now)
        return ticket

    def _finish(self, ticket: int, waiter: _Waiter, deadline_ns: int | None) -> None:
        """Wait for the chunk that `_begin` requested; lead the lane if no other thread does."""
        while True:
            with self._lock:
                waiter.attended = True
                now = self._clock()
                self._grant(now)
                if waiter.done_ns is not None:
                    self._pass_lead(ticket)
                    break
                if deadline_ns is not None and now >= deadline_ns:
                    self._give_back(ticket)
                    raise self._late(now, deadline_ns)
                if self._may_lead(waiter):
                    self._leader = ticket
                wake_ns = self._arbiter.next_wake() if self._leader == ticket else None
            self._wait(waiter, now, wake_ns, deadline_ns)
        if waiter.done_ns > now:
            self._sleep(waiter.done_ns - now)

    def _may_lead(self, waiter: _Waiter) -> bool:
        """Whether nobody leads, or one who may sleep longer than `waiter` can wait: a leader can't be woken."""
        leader = self._waiting.get(self._leader) if self._leader is not None else None
        return leader is None or waiter.traffic_class < leader.traffic_class

    def _late(self, now: int, deadline_ns: int) -> DeadlineExceeded:
        return DeadlineExceeded(f"{self.name}: the deadline passed {now - deadline_ns} ns ago")

    def _wait(self, waiter: _Waiter, now: int, wake_ns: int | None, deadline_ns: int | None) -> None:
        """Sleep: the leader until `wake_ns`, the others until they get a grant or the lead."""
        until_ns = min((at for at in (wake_ns, deadline_ns) if at is not None), default=None)
        if wake_ns is not None and until_ns is not None:
            self._sleep(max(until_ns - now, 0))
        elif until_ns is None:
            waiter.signal.acquire()
        else:
            waiter.signal.acquire(timeout=min(max(until_ns - now, 0) / 1e9, threading.TIMEOUT_MAX))

    def _grant(self, now: int) -> None:
        for grant in self._arbiter.poll(now):
            waiter = self._waiting.pop(grant.ticket)
            waiter.done_ns = grant.done_ns
            if grant.ticket != self._leader:
                waiter.wake()

    def _withdraw(self, ticket: int) -> None:
        with self._lock:
            self._give_back(ticket)

    def _give_back(self, ticket: int) -> None:
        self._arbiter.cancel(ticket)
        self._waiting.pop(ticket, None)
        self._pass_lead(ticket)

    def _pass_lead(self, ticket: int) -> None:
        if self._leader == ticket:
            self._leader = next((other for other, waiter in self._waiting.items() if waiter.attended), None)
            if self._leader is not None:
                self._waiting[self._leader].wake()


class Nic:
    """A full-duplex NIC of one engine."""

    def __init__(self, name: str, lane: Callable[[str], Lane]) -> None:
        self.rx = lane(f"{name} rx")
        self.tx = lane(f"{name} tx")

    def statistics(self) -> NicStatistics:
        return NicStatistics(self.rx.statistics(), self.tx.statistics())


def _sleep_ns(n_ns: int) -> None:
    time.sleep(n_ns / 1e9)


class TrafficManager:
    """The NICs of one engine. Rates are per direction; None leaves the pacing to the hardware.

    `snic` is the node's, if its engines share one (paper §2); else the manager has one of its own. `weights` are HIGH's
    and LOW's. For `copies_pass_cnic` see `local_copy`. `clock` returns nanoseconds, and every deadline in this package
    is a time of that clock; `sleep` takes nanoseconds.
    """

    def __init__(
        self,
        snic_bytes_per_s: int | None = None,
        cnic_bytes_per_s: int | None = None,
        *,
        snic: Nic | None = None,
        weights: Weights = WEIGHTS,
        copies_pass_cnic: bool = True,
        burst_ns: int = BURST_NS,
        clock: Clock = time.monotonic_ns,
        sleep: Sleep = _sleep_ns,
    ) -> None:
        self.clock = clock
        lane = partial(Lane, clock=clock, sleep=sleep, weights=weights, burst_ns=burst_ns)
        self._copies_pass_cnic = copies_pass_cnic
        self.snic = snic or Nic("snic", partial(lane, rate_bytes_per_s=snic_bytes_per_s, whole_chunks=True))
        self.cnic = Nic("cnic", partial(lane, rate_bytes_per_s=cnic_bytes_per_s, whole_chunks=False))

    def local_copy(
        self, n_bytes: int, deadline_ns: int | None = None, traffic_class: TrafficClass = TrafficClass.LOW
    ) -> None:
        """Charge a copy between this engine's DRAM and its GPU: out through the CNIC and in again (paper §5).

        Blocks like `Lane.acquire`, for the slower of the two lanes, not for their sum; not at all where copies don't
        pass the CNIC. Raises DeadlineExceeded.
        """
        rx, tx = self.cnic.rx, self.cnic.tx
        while n_bytes > 0 and self._copies_pass_cnic:
            chunk_bytes = min(n_bytes, tx.chunk_bytes)
            leaving = tx._begin(traffic_class, chunk_bytes, deadline_ns)
            arriving = rx._begin(traffic_class, chunk_bytes, None)
            try:
                tx._finish(*leaving, deadline_ns)
            except DeadlineExceeded:
                rx._withdraw(arriving[0])
                raise
            rx._finish(*arriving, deadline_ns)
            n_bytes -= chunk_bytes

    def statistics(self) -> TrafficStatistics:
        return TrafficStatistics(self.snic.statistics(), self.cnic.statistics())
