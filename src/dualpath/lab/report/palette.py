"""The colours of every figure, so that a system looks the same in all of them.

Systems have the Okabe–Ito palette, stages and engines Paul Tol's; all stay distinct under the common kinds
of colour blindness.
"""

COLOURS = {
    "basic": "#8C8C8C",
    "basic-layerwise": "#CC79A7",
    "dualpath-rr": "#E69F00",
    "dualpath": "#0072B2",
    "dualpath-split": "#56B4E9",
    "de-only": "#F0E442",
    "oracle": "#009E73",
}
OTHER_COLOUR = "#D55E00"

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
