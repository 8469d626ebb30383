"""What a user names as a workload → the mean turn: a row of the paper's table, or recorded agents."""

from collections.abc import Sequence
from pathlib import Path

from dualpath.lab.planning.turn_load import TurnLoad, trajectory_load, turn_load
from dualpath.traces.limits import TraceLimits
from dualpath.traces.paper import PAPER_TRACES, fitted_table
from dualpath.traces.sources import load_source, paper_row


def load_of(names: Sequence[str], max_context_tokens: int | None = None, seed: int = 0) -> TurnLoad:
    """`names`: one of ``32K``, ``48K``, ``64K``; or files that `dualpath.traces.sources` reads.

    `max_context_tokens` ends recorded agents before the first turn beyond it. Raises TraceError.
    """
    row = paper_row(names)
    if row is not None:
        return turn_load(f"the paper's {row} trace", fitted_table(PAPER_TRACES[row], seed=seed))
    trajectories = load_source(names, TraceLimits(max_context_tokens=max_context_tokens)).trajectories
    name = Path(names[0]).name if len(names) == 1 else f"{len(trajectories)} sessions"
    return trajectory_load(name, trajectories)
