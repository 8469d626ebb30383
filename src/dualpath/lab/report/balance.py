"""How evenly the storage NICs were read: over a run, and over windows of its time.

Samples count what a NIC had received since the run's start; a window's bytes are interpolated between them.
"""

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from dualpath.core.read_path import find_read_path
from dualpath.core.systems import system_or_unknown
from dualpath.results.file import SnicSample

IDLE_SHARE = 0.02
"""A window in which the NICs moved less than this share of their busiest window's bytes has no balance."""


class Windows(msgspec.Struct, frozen=True):
    """Equal spans of a run's time."""

    width_s: float
    starts_s: NDArray[np.float64]
    """[windows]"""
    engines: list[str]
    bytes_per_s: NDArray[np.float64]
    """[engines, windows]"""


def readers(system: str, engines: Sequence[str]) -> list[str]:
    """The engines whose storage NICs `system` may use."""
    side = find_read_path(system_or_unknown(system).policy.read_path).readers
    return [engine for engine in engines if side == "both" or engine.startswith(side)]


def windows_of(samples: Sequence[SnicSample], at_most: int) -> Windows | None:
    """Windows no shorter than the samples' mean distance, `at_most` of them; None for fewer than two samples."""
    times_s = np.array([sample.at_s for sample in samples])
    if len(times_s) < 2 or times_s[-1] <= times_s[0]:
        return None
    count = max(1, min(at_most, len(times_s) - 1))
    edges_s = np.linspace(times_s[0], times_s[-1], count + 1)
    engines = sorted({name for sample in samples for name in sample.received_bytes}, key=prefill_first)
    received = np.array(
        [np.interp(edges_s, times_s, [one.received_bytes.get(name, 0) for one in samples]) for name in engines]
    )
    width_s = float(edges_s[1] - edges_s[0])
    return Windows(width_s, edges_s[:-1], engines, np.diff(received, axis=1) / width_s)


def max_over_avg(windows: Windows, system: str) -> list[float | None]:
    """By window, over the NICs that `system` reads with; None where they were next to idle."""
    read = readers(system, windows.engines)
    rates = windows.bytes_per_s[[windows.engines.index(name) for name in read]] if read else np.zeros((1, 1))
    totals = rates.sum(axis=0)
    busy = totals > IDLE_SHARE * totals.max(initial=0.0)
    return [float(rates[:, at].max() * len(rates) / totals[at]) if busy[at] else None for at in range(rates.shape[1])]


def prefill_first(engine: str) -> tuple[bool, int, str]:
    """Sorts engines: PE0, PE1, …, DE0, …"""
    digits = engine.lstrip("PDE")
    return (not engine.startswith("PE"), int(digits) if digits.isdecimal() else 0, engine)
