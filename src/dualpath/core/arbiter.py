"""One direction of one NIC, shared between two traffic classes by weight (paper §5: 99 % for model execution).

Theory of operation. The link serves one chunk at a time, at its rate. Callers cut transfers into chunks, so a newcomer
waits for at most one chunk of the other class. Start-time fair queueing chooses the class: each class has a virtual
start tag; the class with the smaller tag is served, and its tag grows by ``bytes / weight``. The tag just served is the
link's virtual time. A class that was idle starts again from there, so idleness earns no credit. Hence:

* work conserving: a lone class has the whole link;
* 99 : 1 in bytes while both are backlogged, to within a chunk; neither is ever starved;
* a high chunk that arrives while low ones queue is next, after the low chunk on the wire.

`poll` may be called late: it replays what the link would have done, and considers at each start only the chunks that
had been requested by then. It reaches back at most `burst_ns`. That credit keeps the jitter of a sleeping thread from
costing bandwidth, and its bound keeps an idle link from bursting.

A rate of None is an unlimited link: every chunk is granted at once, and still counted.
"""

from collections import OrderedDict

import msgspec

from dualpath.core.traffic_classes import WEIGHTS
from dualpath.core.vocabulary import TrafficClass

SECOND_NS = 1_000_000_000


class Grant(msgspec.Struct, frozen=True, gc=False):
    """The chunk of `ticket` has the link from `start_ns` to `done_ns`, and counts as sent from `done_ns` on."""

    ticket: int
    start_ns: int
    done_ns: int


class _Asked(msgspec.Struct, frozen=True, gc=False):
    n_bytes: int
    asked_ns: int


class Arbiter:
    """Grants chunks of two classes their time on one link. `poll` is O(grants), every other method O(1)."""

    def __init__(
        self, rate_bytes_per_s: int | None, weights: tuple[int, int] = WEIGHTS, burst_ns: int = 2_000_000
    ) -> None:
        """`weights` are HIGH's and LOW's. Raises ValueError for a rate or weight below 1 or a burst below 0."""
        if (rate_bytes_per_s is not None and rate_bytes_per_s < 1) or min(weights) < 1 or burst_ns < 0:
            raise ValueError(
                f"rate {rate_bytes_per_s} bytes/s, weights {weights}, burst {burst_ns} ns: rate and weights must be "
                "at least 1 and the burst at least 0; for an unlimited link give the rate None"
            )
        self._rate = rate_bytes_per_s
        self._burst_ns = burst_ns
        # Tags count bytes × the *other* class's weight: the same ratios as bytes ÷ weight, in exact integers.
        self._cost_per_byte = (weights[1], weights[0])
        self._tags = [0, 0]
        self._virtual_time = 0
        self._backlogged = [False, False]
        self._queues: tuple[OrderedDict[int, _Asked], OrderedDict[int, _Asked]] = (OrderedDict(), OrderedDict())
        self._class_of: dict[int, TrafficClass] = {}
        self._next_ticket = 0
        self._free_at_ns = 0
        self._served_bytes = [0, 0]
        self._queued_bytes = [0, 0]
        self._busy_ns = 0

    def request(self, now: int, traffic_class: TrafficClass, n_bytes: int) -> int:
        """Queue a chunk. Returns its ticket, which a `Grant` will name. Raises ValueError when the chunk is empty."""
        if n_bytes < 1:
            raise ValueError(f"a chunk of {n_bytes} bytes: a chunk has at least one byte")
        ticket = self._next_ticket
        self._next_ticket += 1
        self._queues[traffic_class][ticket] = _Asked(n_bytes, now)
        self._class_of[ticket] = traffic_class
        self._queued_bytes[traffic_class] += n_bytes
        return ticket

    def cancel(self, ticket: int) -> bool:
        """Take a chunk out of the queue. Returns False when it was granted already or is unknown."""
        traffic_class = self._class_of.pop(ticket, None)
        if traffic_class is None:
            return False
        self._queued_bytes[traffic_class] -= self._queues[traffic_class].pop(ticket).n_bytes
        return True

    def poll(self, now: int) -> list[Grant]:
        """Returns grants for all chunks that can start by `now`, in link order; their `done_ns` may be after `now`."""
        grants: list[Grant] = []
        while (start_ns := self._next_start_ns()) is not None:
            start_ns = max(start_ns, now - self._burst_ns)
            if start_ns > now:
                break
            grants.append(self._serve(self._choose_class(start_ns), start_ns))
        return grants

    def next_wake(self) -> int | None:
        """Returns when the next chunk can start; None while nothing is queued. A past time means: poll now."""
        return self._next_start_ns()

    @property
    def served_bytes(self) -> tuple[int, int]:
        """Bytes granted so far, HIGH and LOW."""
        return self._served_bytes[0], self._served_bytes[1]

    @property
    def queued_bytes(self) -> tuple[int, int]:
        """Bytes waiting for a grant, HIGH and LOW."""
        return self._queued_bytes[0], self._queued_bytes[1]

    @property
    def busy_ns(self) -> int:
        """Total wire time of all grants so far."""
        return self._busy_ns

    def _next_start_ns(self) -> int | None:
        heads = [next(iter(queue.values())).asked_ns for queue in self._queues if queue]
        return max(self._free_at_ns, min(heads)) if heads else None

    def _choose_class(self, start_ns: int) -> TrafficClass:
        """Returns the class with the smaller tag among those with a request by `start_ns`; HIGH on a tie."""
        for traffic_class in TrafficClass:
            queue = self._queues[traffic_class]
            was_backlogged = self._backlogged[traffic_class]
            self._backlogged[traffic_class] = bool(queue) and next(iter(queue.values())).asked_ns <= start_ns
            if not was_backlogged:
                self._tags[traffic_class] = max(self._tags[traffic_class], self._virtual_time)
        return min((kind for kind in TrafficClass if self._backlogged[kind]), key=self._tags.__getitem__)

    def _serve(self, traffic_class: TrafficClass, start_ns: int) -> Grant:
        ticket, asked = self._queues[traffic_class].popitem(last=False)
        del self._class_of[ticket]
        self._virtual_time = self._tags[traffic_class]
        self._tags[traffic_class] += asked.n_bytes * self._cost_per_byte[traffic_class]
        self._queued_bytes[traffic_class] -= asked.n_bytes
        self._served_bytes[traffic_class] += asked.n_bytes
        wire_ns = 0 if self._rate is None else -(-asked.n_bytes * SECOND_NS // self._rate)
        self._busy_ns += wire_ns
        self._free_at_ns = start_ns + wire_ns
        return Grant(ticket, start_ns, self._free_at_ns)
