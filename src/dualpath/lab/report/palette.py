"""The colours of every figure, so that a system looks the same in all of them.

A system's colour is its own (`core.systems`); stages and engines have Paul Tol's palette. All stay distinct under the
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
"""By stage of a turn, see `results.turns.STAGES`."""

ENGINE_COLOURS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#999999")
"""By the engine's place in its run; those after the last begin anew."""


def colour_of(system: str) -> str:
    """The system's own colour; those that are not installed here share one."""
    return system_or_unknown(system).colour
