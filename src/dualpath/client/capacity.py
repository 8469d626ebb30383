"""Finds the most agents per second that a server takes within its SLO, by probes.

Theory of operation. If one rate fails, every higher rate is taken to fail. Both ends of the given range are probed
first, then the (geometric) middle of what is left, until the rate that holds and the rate that fails are within
`PRECISION` of each other::

    0.5 holds ────── 1.0 holds ── 1.19 fails ── 1.41 fails ─────────── 2.0 fails

Each probe has its own agents, which share no prefix with an earlier probe's, so each starts with nothing in storage.
"""

from collections.abc import Awaitable, Callable

from dualpath.client.online import OnlineResult
from dualpath.results.online import Capacity

PRECISION = 0.1

Probe = Callable[[int, float], Awaitable[OnlineResult]]
"""Runs the probe of a number at a rate (agents per second)."""


async def find_capacity(probe: Probe, low: float, high: float) -> tuple[Capacity, list[OnlineResult]]:
    """Probes between `low` and `high` agents per second. Also returns all results. Raises ValueError for no range."""
    if not 0 < low < high:
        raise ValueError(f"a range of rates begins above 0 and ends above its beginning, not {low:g}:{high:g}")
    probes: list[OnlineResult] = []

    async def holds(rate: float) -> bool:
        probes.append(await probe(len(probes), rate))
        return probes[-1].holds

    if not await holds(low):
        return Capacity(holds_agents_per_s=None, fails_agents_per_s=low, ended_by=probes[-1].verdict), probes
    if await holds(high):
        return Capacity(holds_agents_per_s=high, fails_agents_per_s=None, ended_by=None), probes
    ended_by = probes[-1].verdict
    while high / low > 1 + PRECISION:
        middle = (low * high) ** 0.5
        if await holds(middle):
            low = middle
        else:
            high, ended_by = middle, probes[-1].verdict
    return Capacity(holds_agents_per_s=low, fails_agents_per_s=high, ended_by=ended_by), probes
