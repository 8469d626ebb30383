"""Storage reads and writes: each node and direction has one FIFO server, its storage NIC (SNIC).

Theory of operation. The storage behind the NICs can saturate all of them (paper §2), so a NIC is the only queue. A FIFO
server needs no event except the end of a read: the read begins when the NIC is free and takes its bytes over the rate.
A change of rate (a fault) is rare and looks at every read under way: `slow_down` gives each a new time, and the event
of the old one finds that it came too early.

Reads and writes don't share, because NICs are full duplex. Writes are 2 % of the reads and are only counted.
"""

from collections.abc import Iterable, Sequence

from dualpath.core.vocabulary import NodeId, Side
from dualpath.lab.sim.events import Action, Events
from dualpath.lab.sim.turns import LiveTurn

SECOND_NS = 1_000_000_000


class Storage:
    """All nodes' SNICs. Calls `on_loaded((turn, side, attempt))` when a leg is in its buffer."""

    def __init__(
        self, events: Events, bytes_per_s: Sequence[float], latency_ns: int, on_loaded: Action, window_ns: int
    ) -> None:
        """`bytes_per_s` are the nodes' rates."""
        nodes = len(bytes_per_s)
        self._events = events
        self._latency_ns = latency_ns
        self._on_loaded = on_loaded
        self._window_ns = window_ns
        self._ns_per_byte = [SECOND_NS / rate for rate in bytes_per_s]
        self._free_ns = [0.0] * nodes
        self.read_bytes = [0] * nodes
        self.write_bytes = [0] * nodes
        self.busy_ns = [0.0] * nodes
        self.windows: dict[int, list[int]] = {}
        """Bytes read by each node in each window of time, by the read's beginning."""

    def read(self, node: NodeId, n_bytes: int, turn: LiveTurn, side: Side) -> None:
        """Queues a leg on the node's SNIC."""
        now = self._events.now
        start_ns = self._free_ns[node]
        if start_ns < now:
            start_ns = float(now)
        spent_ns = n_bytes * self._ns_per_byte[node]
        self._free_ns[node] = start_ns + spent_ns
        self.busy_ns[node] += spent_ns
        self.read_bytes[node] += n_bytes
        window = self.windows.get(int(start_ns) // self._window_ns)
        if window is None:
            window = self.windows[int(start_ns) // self._window_ns] = [0] * len(self._free_ns)
        window[node] += n_bytes
        done_ns = int(start_ns + spent_ns) + self._latency_ns
        turn.load_done_ns[side is Side.DE] = done_ns
        self._events.at(done_ns, self._arrive, (turn, side, turn.attempt))

    def write(self, node: NodeId, n_bytes: int) -> None:
        """Counts blocks made durable."""
        self.write_bytes[node] += n_bytes

    def slow_down(self, node: NodeId, factor: float, legs: Iterable[tuple[LiveTurn, Side]]) -> None:
        """Multiplies the node's SNIC rate by `factor` from now on; `legs` are its reads under way, in order."""
        now = self._events.now
        self._ns_per_byte[node] /= factor
        for turn, side in legs:
            index = side is Side.DE
            left_ns = max(0, turn.load_done_ns[index] - now) / factor
            turn.load_done_ns[index] = now + int(left_ns)
            self._events.at(turn.load_done_ns[index], self._arrive, (turn, side, turn.attempt))
        self._free_ns[node] = now + max(0.0, self._free_ns[node] - now) / factor

    def _arrive(self, leg: tuple[LiveTurn, Side, int]) -> None:
        turn, side, attempt = leg
        if turn.attempt == attempt and turn.load_done_ns[side is Side.DE] != self._events.now:
            return  # the NIC has changed its rate, and another event was posted
        self._on_loaded(leg)
