"""Where the time to first token went, on average over turns, stage by stage."""

from collections.abc import Sequence

import numpy as np

from dualpath.results.file import Run

STAGES = ("scheduling", "allocation", "read", "prefill", "outside")
"""`outside` is what the client saw beyond the server's stages: HTTP, tokenising, tries that failed."""


def mean_stages_s(runs: Sequence[Run]) -> dict[str, float] | None:
    """Mean seconds by stage over every turn of `runs`; None where the server told no timings."""
    rows = []
    for turn in (turn for run in runs for turn in run.turn_results):
        timings = turn.timings
        if timings is not None:
            inside = (timings.scheduling_s, timings.allocation_s, timings.read_s, timings.prefill_s)
            rows.append((*inside, max(0.0, turn.ttft_s - sum(inside))))
    if not rows:
        return None
    return dict(zip(STAGES, np.mean(rows, axis=0).tolist(), strict=True))
