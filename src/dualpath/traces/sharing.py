"""The round that a prompt makes of the context before it; every reader of recorded prompts uses this."""

from collections.abc import Sequence

from dualpath.traces.trajectory import Round


def shared_prefix(one: Sequence[object], other: Sequence[object]) -> int:
    """Returns the length of the longest common prefix of two lists or two texts."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    # Slices are compared in C, so halving is much faster than a loop over the items.
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle)
    return low


def next_round(
    context_tokens: int, kept_tokens: int, prompt_tokens: int, generate_tokens: int, gap_s: float = 0.0
) -> Round:
    """The round of a prompt that begins with `kept_tokens` of the context before. It generates at least one token."""
    return Round(
        append_tokens=max(0, prompt_tokens - kept_tokens),
        generate_tokens=max(1, generate_tokens),
        gap_s=gap_s,
        keep_tokens=None if kept_tokens == context_tokens else kept_tokens,
    )
