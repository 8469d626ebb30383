"""How much the headline depends on the two constants that matter most: effective compute and usable storage NIC.

This is no comparison with the paper: it shows the simulator at the ends of the ranges that publications give.
"""

from collections.abc import Sequence

import msgspec

from dualpath.lab.paper.offline import AGENTS_660B, DS660B
from dualpath.lab.paper.runner import Runner

PREFILL_FLOP_PER_S = (0.37e15, 0.66e15)
"""Range implied by published throughput of such models."""
SNIC_BYTES_PER_S = (43e9, 50e9)
"""3FS's figure for a 400 Gb/s NIC, and the full rate."""


class WhatIf(msgspec.Struct, frozen=True, kw_only=True):
    """DS 660B, 1,024 agents of 64K at once."""

    prefill_pflop_per_s: float
    snic_gb_per_s: float
    basic_jct_s: float
    dualpath_jct_s: float

    @property
    def speedup(self) -> float:
        return self.basic_jct_s / self.dualpath_jct_s


def sensitivity(runner: Runner) -> list[WhatIf]:
    """Simulates the fitted point, then one constant at a time at the ends of its range."""
    fitted = runner.calibration
    nic = 50e9
    points = [(fitted.prefill_flop_per_s, fitted.snic_efficiency * nic)]
    points += [(flop_per_s, points[0][1]) for flop_per_s in PREFILL_FLOP_PER_S]
    points += [(points[0][0], snic) for snic in SNIC_BYTES_PER_S]
    answers = []
    for flop_per_s, snic in points:
        changed = msgspec.structs.replace(fitted, prefill_flop_per_s=flop_per_s, snic_efficiency=snic / nic)
        at = runner if changed == fitted else runner.with_calibration(changed)
        jct = [at.offline(DS660B, system, AGENTS_660B[0]).simulated_s for system in ("basic", "dualpath")]
        answers.append(
            WhatIf(
                prefill_pflop_per_s=flop_per_s / 1e15,
                snic_gb_per_s=snic / 1e9,
                basic_jct_s=jct[0],
                dualpath_jct_s=jct[1],
            )
        )
    return answers


def sensitivity_page(answers: Sequence[WhatIf]) -> str:
    """Returns a section of the results page."""
    lines = [
        "\n## Sensitivity",
        "",
        "DS 660B on 2P4D, 1,024 agents of 64K at once; the first row is the fitted point. A what-if, no comparison.",
        "",
        "| prefill, PFLOP/s a GPU | storage NIC, GB/s | Basic JCT, s | Ours JCT, s | Basic over Ours |",
        "|--:|--:|--:|--:|--:|",
    ]
    for one in answers:
        numbers = (f"{one.prefill_pflop_per_s:.2f}", f"{one.snic_gb_per_s:.1f}", f"{one.basic_jct_s:,.0f}")
        lines.append("| " + " | ".join((*numbers, f"{one.dualpath_jct_s:,.0f}", f"{one.speedup:.2f}")) + " |")
    return "\n".join(lines) + "\n"
