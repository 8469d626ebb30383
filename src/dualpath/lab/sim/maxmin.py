"""Links shared by flows, max-min fairly, in two classes: the exact answer with which closed forms are compared.

Theory of operation. A flow crosses some links and has bytes left. At every change (a flow starts or ends, a link's rate
changes) all rates are recomputed by progressive filling: all rates grow together until a link is full; its flows stop
there, the others continue. Between changes rates are constant, so the next flow to end is known, and its end is the one
armed event. If a change overtakes that event, it finds another number and does nothing.

HIGH flows (model execution) are filled first, into 99 % of every link that LOW flows use too. LOW flows then get all
that is left of every link, and HIGH gets what they could not use. So neither class starves, and no link idles that a
flow could use.
"""

from collections.abc import Sequence

from dualpath.core.traffic_classes import WEIGHTS
from dualpath.core.vocabulary import TrafficClass
from dualpath.lab.sim.events import Action, Events

HIGH_SHARE = WEIGHTS[0] / sum(WEIGHTS)
_LITTLE_BYTES = 1e-6


class Flow:
    """Bytes under way over some links."""

    __slots__ = ("argument", "kind", "left_bytes", "links", "number", "on_done", "rate")

    def __init__(
        self, number: int, links: tuple[int, ...], n_bytes: float, kind: TrafficClass, on_done: Action, argument: object
    ) -> None:
        self.number = number
        self.links = links
        self.left_bytes = float(n_bytes)
        self.kind = kind
        self.on_done = on_done
        self.argument = argument
        self.rate = 0.0
        """Present rate, bytes per nanosecond."""


class SharedLinks:
    """Links numbered from 0 and the flows on them. Every change costs O(flows * links)."""

    def __init__(self, events: Events, bytes_per_s: Sequence[float]) -> None:
        if not bytes_per_s or min(bytes_per_s) <= 0:
            raise ValueError("there must be at least one link, and every rate must be above zero")
        self._events = events
        self._rates = [rate / 1e9 for rate in bytes_per_s]
        self._flows: dict[int, Flow] = {}
        self._next_number = 0
        self._since_ns = 0
        self._change = 0
        self.moved_bytes = [0.0] * len(self._rates)
        """Bytes sent over each link so far."""

    def start(
        self,
        links: Sequence[int],
        n_bytes: float,
        on_done: Action,
        argument: object = None,
        kind: TrafficClass = TrafficClass.LOW,
    ) -> None:
        """Sends bytes over `links`; calls `on_done(argument)` when the last one has arrived."""
        if n_bytes <= 0:
            self._events.at(self._events.now, on_done, argument)
            return
        self._advance()
        flow = Flow(self._next_number, tuple(dict.fromkeys(links)), n_bytes, kind, on_done, argument)
        self._next_number += 1
        self._flows[flow.number] = flow
        self._rearm()

    def set_rate(self, link: int, bytes_per_s: float) -> None:
        """Changes a link's rate from now on."""
        if bytes_per_s <= 0:
            raise ValueError(f"link {link} can't have a rate of {bytes_per_s}: it must be above zero")
        self._advance()
        self._rates[link] = bytes_per_s / 1e9
        self._rearm()

    def rates(self) -> dict[int, float]:
        """Bytes per second of each flow under way, by its number."""
        return {flow.number: flow.rate * 1e9 for flow in self._flows.values()}

    def _advance(self) -> None:
        spent_ns = self._events.now - self._since_ns
        self._since_ns = self._events.now
        for flow in self._flows.values():
            moved = min(flow.left_bytes, flow.rate * spent_ns)
            flow.left_bytes -= moved
            for link in flow.links:
                self.moved_bytes[link] += moved

    def _rearm(self) -> None:
        self._change += 1
        if not self._flows:
            return
        _share(list(self._flows.values()), self._rates)
        next_ns = min(flow.left_bytes / flow.rate for flow in self._flows.values())
        self._events.at(self._events.now + max(1, round(next_ns)), self._end, self._change)

    def _end(self, change: int) -> None:
        if change != self._change:
            return
        self._advance()
        # Events are on whole nanoseconds: what a flow moves within one counts as moved.
        done = [flow for flow in self._flows.values() if flow.left_bytes <= flow.rate + _LITTLE_BYTES]
        for flow in done:
            for link in flow.links:
                self.moved_bytes[link] += flow.left_bytes
            del self._flows[flow.number]
        self._rearm()
        for flow in done:
            flow.on_done(flow.argument)


def _share(flows: list[Flow], capacities: Sequence[float]) -> None:
    """Sets every flow's rate."""
    for flow in flows:
        flow.rate = 0.0
    high = [flow for flow in flows if flow.kind is TrafficClass.HIGH]
    low = [flow for flow in flows if flow.kind is TrafficClass.LOW]
    left = list(capacities)
    if high:
        reserved = [0.0] * len(left)
        for link in {link for flow in low for link in flow.links}:
            reserved[link] = left[link] * (1 - HIGH_SHARE)
        left = [capacity - kept for capacity, kept in zip(left, reserved, strict=True)]
        _fill(high, left)
        left = [capacity + kept for capacity, kept in zip(left, reserved, strict=True)]
    _fill(low, left)
    _fill(high, left)


def _fill(flows: list[Flow], left: list[float]) -> None:
    """Fills progressively on top of the flows' present rates; takes what it gives out of `left`."""
    open_flows = flows
    while open_flows:
        users: dict[int, int] = {}
        for flow in open_flows:
            for link in flow.links:
                users[link] = users.get(link, 0) + 1
        share, full = min((left[link] / count, link) for link, count in users.items())
        for flow in open_flows:
            flow.rate += share
            for link in flow.links:
                left[link] -= share
        left[full] = 0.0
        open_flows = [flow for flow in open_flows if all(left[link] > 1e-15 for link in flow.links)]
