"""Loads a workload named by a user as agents of columns: a row of the paper's table, or recorded agents."""

from collections.abc import Sequence

import numpy as np

from dualpath.traces.limits import TraceLimits
from dualpath.traces.paper import PAPER_TRAJECTORIES, paper_agents
from dualpath.traces.reading import TraceError
from dualpath.traces.sources import load_source, paper_row
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
    """`names` is one of ``32K``, ``48K``, ``64K``, or files that `dualpath.traces.sources` reads.

    `count` agents are made (None: 500 of the paper's, or one per recording). More than were recorded are made by
    prepending a round, as in the paper (§9). A recorded subagent is an agent of its own here, so its parent does not
    wait for it. Raises TraceError, and ValueError for impossible scales or counts.
    """
    row = paper_row(names)
    if row is not None:
        return paper_agents(row, count or PAPER_TRAJECTORIES, seed, append_scale, generate_scale)
    source = load_source(names, TraceLimits(max_context_tokens=max_context_tokens))
    table = TurnTable.from_trajectories([one for agent in source.trajectories for one in agent.contexts()])
    if (append_scale, generate_scale) != (1.0, 1.0):
        table = table.scaled(append_scale, generate_scale, max_context_tokens)
    return Agents.prepended(table, count or len(table), max_context_tokens, seed)


def typical_turn(agents: Agents) -> tuple[float, float]:
    """Mean prompt and mean context carried over, in tokens: alpha and beta are sized for them."""
    table = agents.table
    runs = np.bincount(agents.template, minlength=len(table)).repeat(table.turns)
    return (
        float(np.average(table.prompt_tokens, weights=runs)),
        float(np.average(table.kept_tokens, weights=runs)),
    )
