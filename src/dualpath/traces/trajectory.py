"""A trajectory: the rounds that an agent asks of a serving system (paper §9).

Round *i* is the pair ``(A_i, g_i)``. Its prompt is everything before it, appended and generated, plus ``A_i`` new
tokens; exactly ``g_i`` tokens are generated::

    round 0   [ A_0 ] → g_0
    round 1   [ A_0 | g_0 | A_1 ] → g_1
    round 2   [ A_0 | g_0 | A_1 | g_1 | A_2 ] → g_2

A compaction shortens the context before the append: `keep_tokens` says how many of its tokens survive, always a prefix.
A round may start other trajectories (subagents); they have contexts of their own and the next round waits for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """One turn: tokens appended, tokens generated, and the pause before it."""

    append_tokens: int
    generate_tokens: int
    gap_s: float = 0.0
    """The agent's pause (tool time) between the end of the round before and this one."""
    keep_tokens: int | None = None
    """Context tokens that survive a compaction before the append; None: all of them."""
    subagents: tuple[Trajectory, ...] = ()
    """Trajectories started together once this round has generated its tokens; the next round waits for all of them."""

    def __post_init__(self) -> None:
        if self.append_tokens < 0 or self.generate_tokens < 1:
            raise ValueError(
                f"a round appends at least 0 tokens and generates at least 1, not {self.append_tokens} and "
                f"{self.generate_tokens}"
            )
        if self.gap_s < 0 or (self.keep_tokens is not None and self.keep_tokens < 0):
            raise ValueError(f"gap_s ({self.gap_s}) and keep_tokens ({self.keep_tokens}) can't be below zero")


class RoundSpan(msgspec.Struct, frozen=True, gc=False):
    """Lengths of one round within its trajectory, in tokens."""

    kept_tokens: int
    """Context tokens that the prompt begins with."""
    prompt_tokens: int
    context_tokens: int
    """Prompt and generated tokens: the context that the next round starts from."""


class Totals(msgspec.Struct, frozen=True, gc=False):
    """Sums over trajectories, subagents included."""

    trajectories: int
    rounds: int
    prompt_tokens: int
    append_tokens: int
    generate_tokens: int
    max_context_tokens: int


class Trajectory(msgspec.Struct, frozen=True, kw_only=True):
    """An agent's whole run. `id` seeds its token ids, so it must be unique in a replay.

    Raises ValueError if it has no rounds, keeps more tokens than there are, or has an empty prompt.
    """

    id: str
    rounds: tuple[Round, ...]

    def __post_init__(self) -> None:
        if not self.rounds:
            raise ValueError(f"trajectory {self.id!r} has no rounds")
        context_tokens = 0
        for index, (round_, span) in enumerate(zip(self.rounds, self.spans(), strict=True)):
            if round_.keep_tokens is not None and round_.keep_tokens > context_tokens:
                raise ValueError(
                    f"trajectory {self.id!r}, round {index} keeps {round_.keep_tokens} tokens of a context of "
                    f"{context_tokens}"
                )
            if span.prompt_tokens == 0:
                raise ValueError(f"trajectory {self.id!r}, round {index} has an empty prompt")
            context_tokens = span.context_tokens

    def spans(self) -> Iterator[RoundSpan]:
        """Yields the lengths round by round."""
        context_tokens = 0
        for round_ in self.rounds:
            kept_tokens = context_tokens if round_.keep_tokens is None else round_.keep_tokens
            prompt_tokens = kept_tokens + round_.append_tokens
            context_tokens = prompt_tokens + round_.generate_tokens
            yield RoundSpan(kept_tokens, prompt_tokens, context_tokens)

    def walk(self) -> Iterator[Trajectory]:
        """Yields this trajectory, then its subagents at every depth."""
        yield self
        for round_ in self.rounds:
            for subagent in round_.subagents:
                yield from subagent.walk()

    def contexts(self) -> Iterator[Trajectory]:
        """Yields this trajectory and its subagents at every depth, each without subagents: a context by itself."""
        for one in self.walk():
            rounds = tuple(msgspec.structs.replace(round_, subagents=()) for round_ in one.rounds)
            yield Trajectory(id=one.id, rounds=rounds)


def renamed(trajectory: Trajectory, identity: str) -> Trajectory:
    """Copies the trajectory under another name, so that two agents of one recording have different tokens."""
    rounds = tuple(
        msgspec.structs.replace(
            round_,
            subagents=tuple(
                renamed(subagent, f"{identity}/{index}.{number}") for number, subagent in enumerate(round_.subagents)
            ),
        )
        if round_.subagents
        else round_
        for index, round_ in enumerate(trajectory.rounds)
    )
    return Trajectory(id=identity, rounds=rounds)


def totals(trajectories: Iterable[Trajectory]) -> Totals:
    """Sums `trajectories` and their subagents."""
    every = [one for trajectory in trajectories for one in trajectory.walk()]
    spans = [span for one in every for span in one.spans()]
    rounds = [round_ for one in every for round_ in one.rounds]
    return Totals(
        trajectories=len(every),
        rounds=len(rounds),
        prompt_tokens=sum(span.prompt_tokens for span in spans),
        append_tokens=sum(round_.append_tokens for round_ in rounds),
        generate_tokens=sum(round_.generate_tokens for round_ in rounds),
        max_context_tokens=max((span.context_tokens for span in spans), default=0),
    )
