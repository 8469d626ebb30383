"""How much of a recorded trajectory to take: token counts divided, long contexts and long sessions cut.

Recorded sessions are long (contexts beyond 100K tokens). Dividing every count keeps the ratios between append,
generation and context; where the prompt *ends* is scaled, not each append, so rounding errors don't add up.
"""

import msgspec

from dualpath.traces.trajectory import Round, Trajectory


class TraceLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How much of a session to take."""

    scale: float = 1.0
    """Prompt lengths and generations are divided by this and rounded, to no less than 1 where there was anything."""
    max_context_tokens: int | None = None
    """After scaling: a session ends before the first turn whose prompt and generation exceed it."""
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
    """What `limits` leave of a trajectory, its subagents each on their own; None where no turn is left."""
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
