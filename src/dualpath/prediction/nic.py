"""NICs whose rate the traffic manager keeps, and moves of bytes across them.

Theory of operation. A lane is one direction of one NIC: chunks pass it one after another at its rate. A chunk counts as
asked for `BURST_NS` before it was (the traffic manager's credit against late wake-ups), so a lane that idled lets that
much through at once. A move takes its pieces through all its lanes side by side, while the thread that copies them
takes its share of the cores; it is over when both are. A lane without a rate takes no time.
"""

from collections.abc import Sequence

from dualpath.prediction.cpu import Cpu
from dualpath.prediction.machine import MoveCost
from dualpath.prediction.processes import Processes, Steps

BURST_NS = 2_000_000
PIECE_BYTES = 512 * 1024
"""Bytes that a simulated move asks for at a time: a few of the runtime's chunks, so that moves take fair turns."""
CHUNK_NS = 500_000
MIN_CHUNK_BYTES, MAX_CHUNK_BYTES = 64 * 1024, 256 * 1024


class Lane:
    """One direction of one NIC."""

    def __init__(self, bytes_per_s: int | None, paced: bool = True) -> None:
        """`paced`: the runtime keeps the rate itself, chunk by chunk."""
        self.bytes_per_s = bytes_per_s
        self._paced = paced
        self.moved_bytes = 0
        self._free_ns = float(-BURST_NS)

    def reserve(self, now: int, n_bytes: int) -> float:
        """Take the lane's next turn; when its bytes will have passed."""
        self.moved_bytes += n_bytes
        if self.bytes_per_s is None:
            return now
        self._free_ns = max(self._free_ns, now - BURST_NS) + n_bytes * 1e9 / self.bytes_per_s
        return self._free_ns

    def paced_chunks(self, n_bytes: int) -> int:
        """Into how many chunks the runtime cuts so many bytes to keep the lane's rate; 0 where it keeps none."""
        if self.bytes_per_s is None or not self._paced:
            return 0
        chunk_bytes = min(max(self.bytes_per_s * CHUNK_NS // 1_000_000_000, MIN_CHUNK_BYTES), MAX_CHUNK_BYTES)
        return -(-n_bytes // chunk_bytes)


class Nic:
    """Both directions."""

    def __init__(self, bytes_per_s: int | None, paced: bool = True) -> None:
        self.rx = Lane(bytes_per_s, paced)
        self.tx = Lane(bytes_per_s, paced)


class Mover:
    """Moves bytes through lanes."""

    def __init__(self, processes: Processes, cpu: Cpu) -> None:
        self._processes = processes
        self._cpu = cpu

    def move(self, lanes: Sequence[Lane], n_bytes: int, cost: MoveCost) -> Steps:
        """A process: `n_bytes` through all `lanes`, at the price of `cost` on the cores."""
        copying_ns = cost.copying_ns(n_bytes, lanes[0].paced_chunks(n_bytes))
        copying = self._cpu.run_light(copying_ns, cost.threads)
        events = self._processes.events
        left_bytes = n_bytes
        while left_bytes > 0:
            piece_bytes = min(left_bytes, PIECE_BYTES)
            done_ns = max(lane.reserve(events.now, piece_bytes) for lane in lanes)
            yield self._processes.until(done_ns)
            left_bytes -= piece_bytes
        yield copying
