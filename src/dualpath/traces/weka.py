"""Reads WEKA's sessions of coding agents: a JSON object each, one per file or one per line.

An entry of ``requests`` is a turn: ``in`` prompt tokens, ``out`` generated ones, ``hash_ids`` with one id per full
block of the prompt, ``t`` its start, ``api_time`` its duration (seconds), ``think_time`` the pause before it. Without
``think_time``, the pause is the time from the end of what ran before to ``t``.

What a prompt shares with the turn before is the longest common prefix of their ``hash_ids``:

* If it reaches the end of the prompt before (give or take a block), the context was kept, generated tokens included,
  and the rest of ``in`` is the append.
* If it falls short, there was a compaction, and the context shrinks to the shared blocks.

A turn may continue an earlier context instead, past requests that share little with it (a session's title, a
detour)::

    A  [b0 b1 b2 b3]           A' continues A and not B, so B is set aside: it becomes a subagent of A,
    B  [b9 b8]                 which A' waits for
    A' [b0 b1 b2 b3 b4]

An entry of type ``subagent`` is a nested session with its own ``requests`` and a fresh context; its parent waits for
it. Consecutive subagents ran together. A session or a subagent without turns is left out.
"""

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from dualpath.traces.reading import (
    MAX_SECONDS,
    NO_OPTIONS,
    PromptTokens,
    ReadOptions,
    Seconds,
    Tokens,
    TraceError,
    records,
)
from dualpath.traces.sharing import next_round, shared_prefix
from dualpath.traces.trajectory import Round, Trajectory

_SLACK_BLOCKS = 1
"""A prompt's last block may hash differently once the generation follows it; a longer difference is a compaction."""
_MAX_DEPTH = 32
"""How deep subagents may be nested."""


class _Entry(msgspec.Struct):
    type: str
    prompt_tokens: PromptTokens | None = msgspec.field(name="in", default=None)
    generate_tokens: Tokens | None = msgspec.field(name="out", default=None)
    hash_ids: list[int] | None = None
    t: Seconds | None = None
    api_time: Seconds | None = None
    think_time: Annotated[float, Meta(ge=-MAX_SECONDS, le=MAX_SECONDS)] | None = None
    """Pause before it; clocks that differ record small negative ones."""
    requests: list["_Entry"] | None = None

    @property
    def end(self) -> float | None:
        """When it was answered, for a subagent its last request; None if that was not recorded."""
        if self.type == "subagent":
            return max((one.end for one in self.requests or () if one.end is not None), default=None)
        return None if self.t is None else self.t + (self.api_time or 0.0)


class _Session(msgspec.Struct):
    id: str
    requests: list[_Entry]
    block_size: Annotated[int, Meta(ge=1)] = 64


class _Turn(msgspec.Struct, kw_only=True):
    number: int
    """The place of its entry in ``requests``."""
    prompt_tokens: int
    generate_tokens: int
    hash_ids: list[int]
    gap_s: float
    subagents: list[Trajectory]

    @property
    def context_tokens(self) -> int:
        return self.prompt_tokens + max(1, self.generate_tokens)

    def continues(self, before: "_Turn") -> bool:
        """Whether the prompt begins with all of `before`'s prompt."""
        blocks = max(1, len(before.hash_ids) - _SLACK_BLOCKS)
        return len(before.hash_ids) > 0 and self.hash_ids[:blocks] == before.hash_ids[:blocks]

    def round_after(self, before: "_Turn | None", block_tokens: int) -> Round:
        kept_tokens = context_tokens = 0
        if before is not None:
            context_tokens = before.context_tokens
            kept_tokens = shared_prefix(self.hash_ids, before.hash_ids) * block_tokens
            if self.continues(before):
                kept_tokens = context_tokens
        kept_tokens = min(kept_tokens, self.prompt_tokens)
        made = next_round(context_tokens, kept_tokens, self.prompt_tokens, self.generate_tokens, self.gap_s)
        return msgspec.structs.replace(made, subagents=tuple(self.subagents))


def read_weka(path: Path, _options: ReadOptions = NO_OPTIONS) -> list[Trajectory]:
    """Returns the sessions in `path` under their own ids. Raises TraceError."""
    found = []
    for where, session in records(path, _Session, "a WEKA session"):
        reader = _SessionReader(f"{path}: {where}: ", session.block_size)
        found.append(reader.trajectory(session.id, session.requests, "requests"))
    return [one for one in found if one is not None]


class _SessionReader:
    """Turns entries into trajectories. `at` is the path of a field inside the session, for errors."""

    def __init__(self, place: str, block_tokens: int) -> None:
        self._place = place
        self._block_tokens = block_tokens

    def trajectory(self, identity: str, entries: list[_Entry], at: str, depth: int = 0) -> Trajectory | None:
        """Returns None if `entries` hold no turn."""
        if depth > _MAX_DEPTH:
            raise TraceError(f"{self._place}{at} is a subagent {depth} levels deep; at most {_MAX_DEPTH} are read")
        turns: list[_Turn] = []
        ended_s: float | None = None
        for index, entry in enumerate(entries):
            here = f"{at}[{index}]"
            if entry.type == "subagent":
                inner = self.trajectory(f"{identity}/{index}", entry.requests or [], f"{here}.requests", depth + 1)
                if inner is None:
                    continue
                if not turns:
                    raise TraceError(f"{self._place}{here}.type is subagent before any turn of its parent")
                turns[-1].subagents.append(inner)
                ended_s = max((end for end in (ended_s, entry.end) if end is not None), default=None)
            else:
                turns.append(self._turn(index, entry, ended_s, here))
                ended_s = entry.end
        return self._joined(identity, turns) if turns else None

    def _turn(self, number: int, entry: _Entry, ended_s: float | None, at: str) -> _Turn:
        prompt, generated, hash_ids = entry.prompt_tokens, entry.generate_tokens, entry.hash_ids
        if prompt is None or generated is None or hash_ids is None:
            name = "in" if prompt is None else "out" if generated is None else "hash_ids"
            raise TraceError(f"{self._place}{at}.{name} is missing; a turn of type {entry.type!r} needs it")
        if (len(hash_ids) - 1) * self._block_tokens >= prompt:
            raise TraceError(
                f"{self._place}{at}.hash_ids names {len(hash_ids)} blocks of {self._block_tokens} tokens, more than a "
                f"prompt of {prompt} tokens has"
            )
        gap_s = entry.think_time
        if gap_s is None:
            gap_s = 0.0 if entry.t is None or ended_s is None else entry.t - ended_s
        return _Turn(
            number=number,
            prompt_tokens=prompt,
            generate_tokens=generated,
            hash_ids=hash_ids,
            gap_s=max(0.0, gap_s),
            subagents=[],
        )

    def _joined(self, identity: str, turns: list[_Turn]) -> Trajectory:
        """Returns the trajectory of `turns`, with those asked on the side set aside as subagents."""
        thread: list[_Turn] = []
        breaks: list[int] = []
        """Places in the thread where a context ended that the next turn did not continue."""
        for turn in turns:
            if thread and not turn.continues(thread[-1]):
                at = _continued(turn, thread, breaks)
                if at is None:
                    breaks.append(len(thread) - 1)
                else:
                    aside = thread[at + 1 :]
                    thread[at].subagents.append(self._linear(f"{identity}/{aside[0].number}", aside))
                    del thread[at + 1 :]
                    breaks = [one for one in breaks if one < at]
            thread.append(turn)
        return self._linear(identity, thread)

    def _linear(self, identity: str, turns: list[_Turn]) -> Trajectory:
        befores = [None, *turns[:-1]]
        rounds = (turn.round_after(before, self._block_tokens) for before, turn in zip(befores, turns, strict=True))
        return Trajectory(id=identity, rounds=tuple(rounds))


def _continued(turn: _Turn, thread: list[_Turn], breaks: list[int]) -> int | None:
    """Returns where the context ended that `turn` continues; None if setting aside what followed costs more.

    The cost is what the first of those turns shares with that context, because a subagent's context is a fresh one.
    """
    found = next((at for at in reversed(breaks) if turn.continues(thread[at])), None)
    if found is None:
        return None
    old, aside, last = thread[found], thread[found + 1], thread[-1]
    gain = shared_prefix(turn.hash_ids, old.hash_ids) - shared_prefix(turn.hash_ids, last.hash_ids)
    return found if gain > shared_prefix(aside.hash_ids, old.hash_ids) else None
