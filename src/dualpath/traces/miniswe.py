"""Reads mini-SWE-agent sessions with their text: JSON lines of requests; a file holds one session or more.

A line has `timestamp` (of the request, in s, ms, us or ns, told by its size), `session_id`, `input` (the whole prompt,
as a text or as chat messages) and `output` (a text). The lines of a session are sorted by time. What a prompt shares
with the one before is the longest common prefix of their texts:

* If it begins with the whole prompt before and its output, the context was kept, and the rest is the append.
* Otherwise the context shrinks to what they share. Recordings whose prompts leave out the agent's own answers are all
  of this kind: each prompt is the one before plus the tool's output, and the generation between them is dropped.

Pauses are the times between requests, so they include the recorded service time of the request before.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from dualpath.traces.reading import MAX_SECONDS, NO_OPTIONS, CountTokens, ReadOptions, TraceError, records
from dualpath.traces.sharing import next_round, shared_prefix
from dualpath.traces.texts import Message
from dualpath.traces.trajectory import Round, Trajectory


class _Line(msgspec.Struct, frozen=True):
    timestamp: Annotated[float, Meta(ge=0, le=MAX_SECONDS * 1e9)]
    session_id: str
    input: str | list[Message]
    output: str

    @property
    def prompt(self) -> str:
        return self.input if isinstance(self.input, str) else "".join(message.text for message in self.input)


def read_miniswe(path: Path, options: ReadOptions = NO_OPTIONS) -> list[Trajectory]:
    """Returns the sessions in `path`, in order of their first requests. Raises TraceError."""
    sessions: dict[str, list[_Line]] = {}
    for where, line in records(path, _Line, "a request of a mini-SWE-agent session"):
        if not line.prompt:
            raise TraceError(f"{path}: {where}: the prompt is empty")
        sessions.setdefault(line.session_id, []).append(line)
    in_order = sorted(sessions.items(), key=lambda item: min(line.timestamp for line in item[1]))
    return [_trajectory(name, lines, options.count_tokens) for name, lines in in_order]


def _trajectory(name: str, lines: list[_Line], count_tokens: CountTokens) -> Trajectory:
    rounds: list[Round] = []
    before_prompt = before_output = ""
    before_s, context_tokens = 0.0, 0
    for line in sorted(lines, key=lambda line: line.timestamp):
        prompt = line.prompt
        kept_tokens, at_s = 0, _seconds(line.timestamp)
        if rounds:
            shared = prompt[: shared_prefix(before_prompt, prompt)]
            whole = prompt.startswith(before_prompt + before_output)
            kept_tokens = context_tokens if whole else min(context_tokens, count_tokens(shared))
        # A tokenizer may find no token in a text of spaces; a prompt still has at least one.
        prompt_tokens = max(1, count_tokens(prompt))
        gap_s = max(0.0, at_s - before_s) if rounds else 0.0
        made = next_round(context_tokens, kept_tokens, prompt_tokens, count_tokens(line.output), gap_s)
        rounds.append(made)
        context_tokens = kept_tokens + made.append_tokens + made.generate_tokens
        before_prompt, before_output, before_s = prompt, line.output, at_s
    return Trajectory(id=name, rounds=tuple(rounds))


def _seconds(timestamp: float) -> float:
    """Now is 1.8e9 s, 1.8e12 ms, 1.8e15 us or 1.8e18 ns since 1970; relative times below 1e11 are seconds."""
    for unit in (1e9, 1e6, 1e3):
        if timestamp >= 1e8 * unit:
            return timestamp / unit
    return timestamp
