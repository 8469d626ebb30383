"""Records of online serving: the SLO, a measurement's windows, the capacity found."""

from typing import Literal

import msgspec

Verdict = Literal["ttft", "tpot", "errors", "steady", "duration"]


class Slo(msgspec.Struct, frozen=True):
    """Service levels: limits of the means over a window's turns."""

    ttft_s: float = 4.0
    tpot_s: float = 0.05


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of one window. A mean is None without a turn (TPOT: without a turn of more than one token)."""

    end_s: float
    """Seconds after the start of the measurement."""
    ttft_s: float | None
    tpot_s: float | None
    turns: int
    late: int
    """Turns that had waited for their first token for longer than the SLO."""
    failed: int


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """The rates between which the limit lies, and what was exceeded above it."""

    holds_agents_per_s: float | None
    """The highest rate that held; None: not even the lowest probed rate did."""
    fails_agents_per_s: float | None
    """The lowest rate that failed; None: even the highest probed rate held."""
    ended_by: Verdict | None
    """Why `fails_agents_per_s` failed."""
