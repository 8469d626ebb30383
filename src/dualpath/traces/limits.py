"""Limits on recorded trajectories: divide token counts, cut long contexts and long sessions.

Recorded sessions are long (contexts beyond 100K tokens). Dividing every count keeps the ratios between append,
generation and context. The *end* of each prompt is scaled, not each append, so rounding errors don't add up.
"""

import msgspec

from dualpath.traces.trajectory import Round, Trajectory


class TraceLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How much of a session to take."""

    scale: float = 1.0
    """Divides prompt lengths and generations, which are then rounded; what was above 0 stays at least 1."""
    max_context_tokens: int | None = None
    """A session ends before the first turn whose scaled prompt and generation exceed this."""
    max_turns: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"scale must be a number above 0, not {self.scale}")
        for name in ("max_context_tokens", "max_turns"):
            cap = getattr(self, name)
            if cap is not None and cap < 1:
                raise ValueError(f"{name} must be at least 1, not {cap}")


NO_LIMITS = TraceLimits()


def limited(trajectory: Trajectory, limits: TraceLimits) -> Trajectory | None:
    """Cuts a trajectory to `limits`, its subagents each by themselves. Returns None if no turn is left."""
    if limits == NO_LIMITS:
        return trajectory
    rounds: list[Round] = []
    context_tokens = 0
    for round_, span in zip(trajectory.rounds[: limits.max_turns], trajectory.spans(), strict=False):
        kept_tokens = context_tokens
        if round_.keep_tokens is not None:
            kept_tokens = min(context_tokens, _scaled(round_.keep_tokens, limits))
        append_tokens = max(1 if round_.append_tokens else 0, _scaled(span.prompt_tokens, limits) - kept_tokens)
        generate_tokens = max(1, _scaled(round_.generate_tokens, limits))
        context_tokens = kept_tokens + append_tokens + generate_tokens
        if limits.max_context_tokens is not None and context_tokens > limits.max_context_tokens:
            break
        subagents = (limited(subagent, limits) for subagent in round_.subagents)
        rounds.append(
            Round(
                append_tokens=append_tokens,
                generate_tokens=generate_tokens,
                gap_s=round_.gap_s,
                keep_tokens=None if round_.keep_tokens is None else kept_tokens,
                subagents=tuple(subagent for subagent in subagents if subagent is not None),
            )
        )
    return Trajectory(id=trajectory.id, rounds=tuple(rounds)) if rounds else None


def _scaled(tokens: int, limits: TraceLimits) -> int:
    return max(1, round(tokens / limits.scale)) if tokens else 0
