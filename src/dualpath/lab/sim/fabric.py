"""The compute network in closed form: what each CNIC reads from memory and writes to it.

Every byte in or out of a GPU passes its CNIC, host-device copies included (paper §5), so a copy from the PE buffer is
read *and* written by the PE's own CNIC:

| moves | read by | written by |
|---|---|---|
| PE buffer → PE HBM | PE | PE |
| DE buffer → PE HBM | DE | PE |
| PE HBM → DE buffer | PE | DE |
| DE buffer → DE HBM | DE | DE |

Within the bottleneck-free range (§4.2) these links carry a fraction of what they could. A prefill step therefore takes
as long as its busiest direction *of the PE's own CNIC*. A DE's copies queue behind each other and get what steps that
pull from the same DE leave over, at least half. Model-execution messages come first (99 : 1 by weight): the rate is
what they leave over (`Calibration.collective_share`).
"""

from array import array
from collections.abc import Sequence

from dualpath.core.vocabulary import EngineId
from dualpath.lab.sim.events import Action, Events

SECOND_NS = 1_000_000_000


class Fabric:
    """All CNICs, by engine id."""

    def __init__(self, events: Events, bytes_per_s: Sequence[float]) -> None:
        """`bytes_per_s` are the engines' rates."""
        engines = len(bytes_per_s)
        self._events = events
        self.ns_per_byte = [SECOND_NS / rate for rate in bytes_per_s]
        self.read_bytes = array("q", bytes(8 * engines))
        self.write_bytes = array("q", bytes(8 * engines))
        self._pulled = array("d", bytes(8 * engines))
        """Bytes per nanosecond that steps under way pull from the engine's buffer."""
        self._copy_free_ns = array("d", bytes(8 * engines))

    def count_chunk(self, decode: EngineId, pulled_bytes: int, shipped_bytes: int) -> None:
        """Counts what a PE pulls from the DE buffer for a chunk, and ships to it."""
        self.read_bytes[decode] += pulled_bytes
        self.write_bytes[decode] += shipped_bytes

    def count_step(self, prefill: EngineId, read_bytes: int, written_bytes: int) -> None:
        """Counts what the PE's own CNIC reads and writes for all chunks of a step."""
        self.read_bytes[prefill] += read_bytes
        self.write_bytes[prefill] += written_bytes

    def pace(self, pulls: list[tuple[EngineId, int]], step_ns: float) -> list[tuple[EngineId, float]]:
        """Lets DEs send these bytes evenly over a step's time; give the answer to `unpace` when the step ends."""
        paced = [(decode, n_bytes / step_ns) for decode, n_bytes in pulls]
        for decode, rate in paced:
            self._pulled[decode] += rate
        return paced

    def unpace(self, paced: list[tuple[EngineId, float]]) -> None:
        """Ends the pulls of a step that is over."""
        for decode, rate in paced:
            self._pulled[decode] -= rate

    def copy(self, decode: EngineId, n_bytes: int, least_ns: float, on_done: Action, argument: object) -> None:
        """Copies a prompt from DE buffer to device, in `least_ns` or more, behind the engine's earlier copies."""
        self.read_bytes[decode] += n_bytes
        self.write_bytes[decode] += n_bytes
        start_ns = self._copy_free_ns[decode]
        if start_ns < self._events.now:
            start_ns = float(self._events.now)
        ns_per_byte = self.ns_per_byte[decode]
        rate = 1 / ns_per_byte - self._pulled[decode]
        if rate < 0.5 / ns_per_byte:
            rate = 0.5 / ns_per_byte
        copy_ns = n_bytes / rate
        done_ns = start_ns + (copy_ns if copy_ns > least_ns else least_ns)
        self._copy_free_ns[decode] = done_ns
        self._events.at(int(done_ns), on_done, argument)
