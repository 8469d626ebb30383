"""The colours of every figure, so that a system looks the same in all of them.

A system's colour is its own (`core.systems`); stages and engines have Paul Tol's palette. All stay distinct under the
common kinds of colour blindness.
"""

from collections.abc import Collection

from dualpath.core.systems import BASELINE, HEADLINE, SYSTEMS, system_or_unknown

STAGE_COLOURS = {
    "outside": "#BBBBBB",
    "scheduling": "#EEDD88",
    "allocation": "#FFAABB",
    "read": "#EE8866",
    "prefill": "#44BB99",
    "decode": "#99DDFF",
}
"""Where a turn's time went, in the order that it passes them; `outside` is what the server did not see."""

ENGINE_COLOURS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#999999")
"""By the engine's place in its run; those after the last begin anew."""


def colour_of(system: str) -> str:
    """As the system says; one for all that are not installed here."""
    return system_or_unknown(system).colour


def foremost(systems: Collection[str]) -> str | None:
    """Whose ratio to basic a card shows: dualpath's, else the last one of ours, else any; None where none competes."""
    competing = [name for name in systems if name != BASELINE and not system_or_unknown(name).policy.free_io]
    known = [name for name in SYSTEMS.names() if name in competing]
    return HEADLINE if HEADLINE in competing else next(reversed(known or competing), None)
