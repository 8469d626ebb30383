"""Generates seeded agent trajectories with given means.

Every length is drawn from a gamma distribution with the given mean and coefficient of variation `spread`, then rounded
to at least one. Trajectory *i* has its own generator, seeded by ``(seed, i)``: asking for more agents leaves the first
ones unchanged.
"""

import math

import msgspec
import numpy as np

from dualpath.traces.trajectory import Round, Trajectory


class AgentMix(msgspec.Struct, frozen=True, kw_only=True):
    """Means of a population of agents. Raises ValueError for a mean below 1 or a negative spread."""

    turns: float
    """Rounds of a trajectory, the first one included."""
    first_context_tokens: float
    """Tokens that the first round appends (the first prompt)."""
    append_tokens: float
    """Tokens that each later round appends."""
    generate_tokens: float
    gap_s: float = 0.0
    """Pause before each later round."""
    spread: float = 0.25
    """Standard deviation over mean of the token counts and gaps; 0 makes them constant."""
    turns_spread: float = 0.0
    """Standard deviation over mean of the number of turns."""

    def __post_init__(self) -> None:
        for name in ("turns", "first_context_tokens", "append_tokens", "generate_tokens"):
            mean = getattr(self, name)
            if not (math.isfinite(mean) and mean >= 1):
                raise ValueError(f"the mean {name} must be at least 1, not {mean}")
        for name in ("gap_s", "spread", "turns_spread"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number from 0 up, not {value}")


def generate_trajectories(mix: AgentMix, count: int, seed: int) -> list[Trajectory]:
    """Returns `count` trajectories named ``agent-0000`` onwards. Raises ValueError if `count` < 1 or `seed` < 0."""
    if count < 1 or seed < 0:
        raise ValueError(f"the number of agents must be at least 1 and the seed at least 0, not {count} and {seed}")
    return [_trajectory(mix, index, np.random.default_rng([seed, index])) for index in range(count)]


def _trajectory(mix: AgentMix, index: int, rng: np.random.Generator) -> Trajectory:
    turns = _draw_count(rng, mix.turns, mix.turns_spread)
    rounds = [
        Round(
            append_tokens=_draw_count(rng, mix.first_context_tokens if turn == 0 else mix.append_tokens, mix.spread),
            generate_tokens=_draw_count(rng, mix.generate_tokens, mix.spread),
            gap_s=_draw(rng, mix.gap_s, mix.spread) if turn else 0.0,
        )
        for turn in range(turns)
    ]
    return Trajectory(id=f"agent-{index:04d}", rounds=tuple(rounds))


def _draw_count(rng: np.random.Generator, mean: float, spread: float) -> int:
    return max(1, round(_draw(rng, mean, spread)))


def _draw(rng: np.random.Generator, mean: float, spread: float) -> float:
    if spread == 0 or mean == 0:
        return mean
    return float(rng.gamma(shape=1 / spread**2, scale=mean * spread**2))
