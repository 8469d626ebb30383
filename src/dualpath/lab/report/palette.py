"""The colours of all figures, so that a system looks the same everywhere.

A system brings its own colour (`core.systems`); stages and engines use Paul Tol's palette. All stay distinct under the
common kinds of colour blindness.
"""

from dualpath.core.systems import system_or_unknown

STAGE_COLOURS = {
    "outside": "#BBBBBB",
    "scheduling": "#EEDD88",
    "allocation": "#FFAABB",
    "read": "#EE8866",
    "prefill": "#44BB99",
    "decode": "#99DDFF",
}
"""Colours by stage of a turn, see `results.turns.STAGES`."""

ENGINE_COLOURS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#999999")
"""Colours by the engine's place in its run; they repeat after the last."""


def colour_of(system: str) -> str:
    """Returns the system's own colour; systems that are not installed here share one."""
    return system_or_unknown(system).colour
