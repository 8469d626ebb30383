"""Decides whether a system holds its service levels at a rate of arrivals, by the paper's protocol (§7).

Agents arrive, and every 150 s their latencies are checked. If one window is too slow, the answer is no. If a window is
within 5 % of the one half an hour before, the system is steady and the answer is yes. Agents take an hour and more, so
an overloaded system gets slower long before it is too slow; a run of fixed length would let it pass.
"""

from collections.abc import Sequence

from dualpath.lab.sim.run import without_garbage_collection
from dualpath.lab.sim.simulator import Simulator

SLO_TTFT_S, SLO_TPOT_S = 4.0, 0.05
"""Means over a window's turns."""
WINDOW_S = 150
WINDOWS_BEFORE = 12
"""Windows in half an hour."""
STEADY = 0.05
LONGEST_S = 3 * 3600
"""A run that is neither steady nor too slow by then counts as sustained."""


def sustains(simulator: Simulator) -> bool:
    """Runs the simulator, from its start, until the answer is known."""
    ttft_s: list[float] = []
    counted = 0
    with without_garbage_collection():
        for window in range(LONGEST_S // WINDOW_S):
            simulator.run((window + 1) * WINDOW_S * 1_000_000_000)
            measured = simulator.measured
            ttft_s.append(_mean(measured.ttft_s[counted:]))
            tpot_s = _mean([tpot_s for tpot_s in measured.tpot_s[counted:] if tpot_s])
            counted = measured.finished
            if ttft_s[-1] > SLO_TTFT_S or tpot_s > SLO_TPOT_S:
                return False
            if window >= WINDOWS_BEFORE and _close(ttft_s[-1], ttft_s[window - WINDOWS_BEFORE]):
                return True
    return True


def _close(now_s: float, before_s: float) -> bool:
    return abs(now_s - before_s) <= STEADY * before_s


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
