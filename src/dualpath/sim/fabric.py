"""The compute network: what each CNIC reads from memory, and writes to it, in closed form.

Every byte in or out of a GPU goes through its CNIC, host-device copies included (paper §5), so a copy from the PE
buffer is read *and* written by the PE's own CNIC:

| moves | read by | written by |
|---|---|---|
| PE buffer → PE HBM | PE | PE |
| DE buffer → PE HBM | DE | PE |
| PE HBM → DE buffer | PE | DE |
| DE buffer → DE HBM | DE | DE |

Within the bottleneck-free range (§4.2) these links carry a fraction of what they could. A prefill step therefore takes
as long as its busiest direction *of the PE's own CNIC* would. A DE's copies queue behind each other and get what steps
that pull from the same DE leave over, at least half. Model-execution messages come first (99 : 1 by weight): the rate
is what they leave over (`Calibration.collective_share`).
"""

from array import array

from dualpath.core.vocabulary import EngineId
from dualpath.sim.events import Action, Events

SECOND_NS = 1_000_000_000


class Fabric:
    """CNICs by engine id."""

    def __init__(self, events: Events, engines: int, bytes_per_s: float) -> None:
        self._events = events
        self.ns_per_byte = SECOND_NS / bytes_per_s
        self.read_bytes = array("q", bytes(8 * engines))
        self.write_bytes = array("q", bytes(8 * engines))
        self._pulled = array("d", bytes(8 * engines))
        """Bytes per nanosecond that steps under way pull from the engine's buffer."""
        self._copy_free_ns = array("d", bytes(8 * engines))

    def pull(self, prefill: EngineId, decode: EngineId, pe_bytes: int, de_bytes: int) -> None:
        """Count a chunk's loads: `pe_bytes` from the PE buffer, `de_bytes` from the DE buffer."""
        self.read_bytes[prefill] += pe_bytes
        self.read_bytes[decode] += de_bytes
        self.write_bytes[prefill] += pe_bytes + de_bytes

    def pace(self, pulls: list[tuple[EngineId, int]], step_ns: float) -> list[tuple[EngineId, float]]:
        """For a step's time, DEs send these bytes at an even rate; give the answer to `unpace` when it ends."""
        paced = [(decode, n_bytes / step_ns) for decode, n_bytes in pulls]
        for decode, rate in paced:
            self._pulled[decode] += rate
        return paced

    def unpace(self, paced: list[tuple[EngineId, float]]) -> None:
        """The step that pulled is over."""
        for decode, rate in paced:
            self._pulled[decode] -= rate

    def ship(self, prefill: EngineId, decode: EngineId, n_bytes: int) -> None:
        """Count what a chunk sends to the DE buffer."""
        self.read_bytes[prefill] += n_bytes
        self.write_bytes[decode] += n_bytes

    def copy(self, decode: EngineId, n_bytes: int, least_ns: float, on_done: Action, argument: object) -> None:
        """Copy a prompt from the DE buffer to the device, in `least_ns` or more, behind the engine's earlier copies."""
        self.read_bytes[decode] += n_bytes
        self.write_bytes[decode] += n_bytes
        start_ns = max(float(self._events.now), self._copy_free_ns[decode])
        rate = max(1 / self.ns_per_byte - self._pulled[decode], 0.5 / self.ns_per_byte)
        done_ns = start_ns + max(least_ns, n_bytes / rate)
        self._copy_free_ns[decode] = done_ns
        self._events.at(int(done_ns), on_done, argument)
