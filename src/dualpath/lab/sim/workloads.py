"""What a user names as a workload, as agents of columns: a row of the paper's table, or recorded ones."""

from collections.abc import Sequence

import numpy as np

from dualpath.traces.limits import TraceError, TraceLimits
from dualpath.traces.paper import PAPER_TRACES, paper_agents
from dualpath.traces.sources import load_source
from dualpath.traces.turn_table import Agents, TurnTable

__all__ = ["TraceError", "agents_of", "typical_turn"]


def agents_of(
    names: Sequence[str],
    count: int | None = None,
    *,
    seed: int = 0,
    append_scale: float = 1.0,
    generate_scale: float = 1.0,
    max_context_tokens: int | None = None,
) -> Agents:
    """`names`: one of ``32K``, ``48K``, ``64K``; or files that `dualpath.traces.sources` reads.

    `count` agents (500 of the paper's, one each of recorded ones where None); more than were recorded come about by
    prepending a round, as the paper does (§9). Raises TraceError, and ValueError for scales or counts that can't be.
    """
    if len(names) == 1 and names[0] in PAPER_TRACES:
        return paper_agents(names[0], count or 500, seed, append_scale, generate_scale)
    source = load_source(names, TraceLimits(max_context_tokens=max_context_tokens))
    table = TurnTable.from_trajectories(source.trajectories)
    if (append_scale, generate_scale) != (1.0, 1.0):
        table = table.scaled(append_scale, generate_scale, max_context_tokens)
    return Agents.prepended(table, count or len(table), max_context_tokens, seed)


def typical_turn(agents: Agents) -> tuple[float, float]:
    """Mean prompt and mean context carried over, in tokens: what alpha and beta are sized for."""
    table = agents.table
    runs = np.bincount(agents.template, minlength=len(table)).repeat(table.turns)
    return (
        float(np.average(table.prompt_tokens, weights=runs)),
        float(np.average(table.kept_tokens, weights=runs)),
    )
