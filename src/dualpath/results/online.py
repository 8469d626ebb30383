"""What online serving is held against and what came of it: the SLO, windows of a measurement, the capacity found."""

from typing import Literal

import msgspec

Verdict = Literal["ttft", "tpot", "errors", "steady", "duration"]


class Slo(msgspec.Struct, frozen=True):
    """Service levels: means over the turns of a window."""

    ttft_s: float = 4.0
    tpot_s: float = 0.05


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen in one. None where there was no turn, or none of more than a token."""

    end_s: float
    """After the start of the measurement."""
    ttft_s: float | None
    tpot_s: float | None
    turns: int
    late: int
    """Turns that still waited for their first token, longer than the SLO."""
    failed: int


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """Between which rates the limit lies, and what was exceeded above it."""

    holds_agents_per_s: float | None
    """The highest rate that held; None: not even the lowest that was asked about."""
    fails_agents_per_s: float | None
    """The lowest that did not; None: even the highest that was asked about held."""
    ended_by: Verdict | None
    """Why `fails_agents_per_s` did not hold."""
