"""One direction of one NIC, shared between two traffic classes by weight (paper §5: 99 % for model execution).

Theory of operation. Callers cut transfers into chunks, which the link serves at its rate. Start-time fair queueing
chooses the class: each class has a virtual start tag; the class with the smaller tag is served, and its tag grows by
``bytes / weight``. The tag just served is the link's virtual time. A class that was idle starts again from there, so
idleness earns no credit. A chunk is many packets, and a NIC chooses for each: a high chunk that comes while a low one
is on the wire goes after the *packet* on the wire, and the rest of the low chunk moves back. Hence:

* work conserving: a lone class has the whole link;
* 99 : 1 in bytes while both are backlogged, to within two chunks; neither is ever starved;
* a high chunk that arrives while low ones queue waits for one packet, or for low's turn: its one byte in a hundred.

The low chunk was told its `done_ns` before and keeps it: the link owes that time, and starts the next low chunk so much
later. So bytes are never ahead of the rate by more than the high class's burst and one low chunk.

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
PACKET_BYTES = 4096
"""The largest packet of InfiniBand and RoCE."""


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
        self._packet_ns = max(self._wire_ns(PACKET_BYTES), 1)
        self._burst_ns = burst_ns
        # Tags count bytes × the *other* class's weight: the same ratios as bytes ÷ weight, in exact integers.
        self._cost_per_byte = (weights[1], weights[0])
        self._tags = [0, 0]
        self._virtual_time = 0
        self._backlogged = [False, False]
        self._queues: tuple[OrderedDict[int, _Asked], OrderedDict[int, _Asked]] = (OrderedDict(), OrderedDict())
        self._class_of: dict[int, TrafficClass] = {}
        self._next_ticket = 0
        self._free_at_ns = [0, 0]
        """When the link is free of high chunks and, later or at the same time, of all."""
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
        """Returns grants for all chunks that can start by `now`, a class's in link order; some end after `now`."""
        grants: list[Grant] = []
        while (head := self._next()) is not None and head[1] <= now:
            traffic_class, start_ns = head
            grants.append(self._serve(traffic_class, max(start_ns, now - self._burst_ns)))
        return grants

    def next_wake(self) -> int | None:
        """Returns when the next chunk can start; None while nothing is queued. A past time means: poll now."""
        head = self._next()
        return head[1] if head is not None else None

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

    def _next(self) -> tuple[TrafficClass, int] | None:
        """Returns whose chunk is next, and when it starts."""
        high, low = (next(iter(queue.values())).asked_ns if queue else None for queue in self._queues)
        free_of_high_ns, free_ns = self._free_at_ns
        low_start_ns = None if low is None else max(low, free_ns)
        if high is None:
            return None if low_start_ns is None else (TrafficClass.LOW, low_start_ns)
        high_start_ns = max(high, free_of_high_ns)
        if high_start_ns < free_ns:  # in the middle of a low chunk
            high_start_ns += (free_ns - high_start_ns) % self._packet_ns
        if low is not None and low_start_ns is not None:
            lows_turn = low <= high_start_ns and self._tag(TrafficClass.LOW) < self._tag(TrafficClass.HIGH)
            if lows_turn or low_start_ns < high_start_ns:
                return TrafficClass.LOW, low_start_ns
        return TrafficClass.HIGH, high_start_ns

    def _tag(self, traffic_class: TrafficClass) -> int:
        tag = self._tags[traffic_class]
        return tag if self._backlogged[traffic_class] else max(tag, self._virtual_time)

    def _serve(self, traffic_class: TrafficClass, start_ns: int) -> Grant:
        for kind in TrafficClass:
            self._tags[kind] = self._tag(kind)
            queue = self._queues[kind]
            self._backlogged[kind] = bool(queue) and next(iter(queue.values())).asked_ns <= start_ns
        ticket, asked = self._queues[traffic_class].popitem(last=False)
        del self._class_of[ticket]
        self._virtual_time = self._tags[traffic_class]
        self._tags[traffic_class] += asked.n_bytes * self._cost_per_byte[traffic_class]
        self._queued_bytes[traffic_class] -= asked.n_bytes
        self._served_bytes[traffic_class] += asked.n_bytes
        wire_ns = self._wire_ns(asked.n_bytes)
        self._busy_ns += wire_ns
        done_ns = start_ns + wire_ns
        free_of_high_ns, free_ns = self._free_at_ns
        if traffic_class is TrafficClass.HIGH:
            self._free_at_ns = [done_ns, max(free_ns, start_ns) + wire_ns]
        else:
            in_turn = self._backlogged[TrafficClass.HIGH]  # then high waits for all of it
            self._free_at_ns = [done_ns if in_turn else free_of_high_ns, done_ns]
        return Grant(ticket, start_ns, done_ns)

    def _wire_ns(self, n_bytes: int) -> int:
        return 0 if self._rate is None else -(-n_bytes * SECOND_NS // self._rate)
