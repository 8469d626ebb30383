"""What a user names as a workload → the mean turn: a row of the paper's table, WEKA sessions, or a Mooncake trace."""

from collections.abc import Sequence
from pathlib import Path

from dualpath.plan.turn_load import TurnLoad, trajectory_load, turn_load
from dualpath.workload.mooncake import read_mooncake
from dualpath.workload.paper import PAPER_TRACES, fitted_table
from dualpath.workload.weka import TraceError, WekaLimits, read_weka


def load_of(names: Sequence[str], max_context_tokens: int | None = None, seed: int = 0) -> TurnLoad:
    """`names`: one of ``32K``, ``48K``, ``64K``; or one Mooncake ``.jsonl``; or WEKA session files, an agent each.

    `max_context_tokens` ends recorded agents before the first turn beyond it. Raises TraceError.
    """
    if len(names) == 1 and names[0] in PAPER_TRACES:
        return turn_load(f"the paper's {names[0]} trace", fitted_table(PAPER_TRACES[names[0]], seed=seed))
    paths = [Path(name) for name in names]
    for path in paths:
        if not path.is_file():
            raise TraceError(f"no trace {str(path)!r}: give {', '.join(PAPER_TRACES)}, or files")
    if paths[0].suffix == ".jsonl":
        if len(paths) > 1:
            raise TraceError(f"{paths[0]} is a whole trace by itself; give one .jsonl file")
        return trajectory_load(paths[0].name, read_mooncake(paths[0], max_context_tokens).trajectories)
    limits = WekaLimits(max_context_tokens=max_context_tokens)
    name = paths[0].name if len(paths) == 1 else f"{len(paths)} sessions"
    return trajectory_load(name, [read_weka(path, limits) for path in paths])
