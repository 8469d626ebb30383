"""A workload as the mean turn of its agents, which is all that closed forms need. Means over all turns, in tokens."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from dualpath.traces.trajectory import Trajectory
from dualpath.traces.turn_table import TurnTable

HIT_BLOCK_TOKENS = 64
"""Storage holds whole blocks of this many tokens (paper §3)."""


class TurnLoad(msgspec.Struct, frozen=True, kw_only=True):
    """The mean turn, with the agent that it belongs to."""

    name: str
    turns_per_agent: float
    """Turns per agent, subagents' included."""
    hit_tokens: float
    """Tokens in whole blocks of the kept context."""
    miss_tokens: float
    """Tokens in the rest of the prompt, which is computed."""
    miss_pairs: float
    """Pairs of a computed token and one that it sees, itself included."""
    generate_tokens: float
    gap_s: float
    """Pause before a turn."""
    total_tokens: float
    """Context at the end of an agent."""
    max_context_tokens: int
    """The longest context of any agent."""

    @property
    def prompt_tokens(self) -> float:
        return self.hit_tokens + self.miss_tokens


def turn_load(name: str, table: TurnTable, agents: int | None = None) -> TurnLoad:
    """Returns the mean turn of `table`, whose templates are `agents` agents (default: one each).

    The newest token of a context has no KV, and only whole blocks are stored.
    """
    stored = np.maximum(0, table.kept_tokens.astype(np.int64) - 1) // HIT_BLOCK_TOKENS * HIT_BLOCK_TOKENS
    miss = table.prompt_tokens - stored
    return TurnLoad(
        name=name,
        turns_per_agent=len(stored) / (agents or len(table)),
        hit_tokens=float(stored.mean()),
        miss_tokens=float(miss.mean()),
        miss_pairs=float((miss * stored + miss * (miss + 1) / 2).mean()),
        generate_tokens=float(table.generate_tokens.mean()),
        gap_s=float(table.gap_ns.mean()) / 1e9,
        total_tokens=float(table.final_context_tokens.mean()),
        max_context_tokens=int(table.context_tokens.max()),
    )


def trajectory_load(name: str, trajectories: Sequence[Trajectory]) -> TurnLoad:
    """Returns the load of recorded trajectories. A subagent has its own context but belongs to its parent's agent."""
    each = [one for trajectory in trajectories for one in trajectory.contexts()]
    return turn_load(name, TurnTable.from_trajectories(each), agents=len(trajectories))
