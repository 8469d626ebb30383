"""Reader of mini-SWE-agent sessions with their text: JSON lines of requests, a file or more of sessions.

A line has `timestamp` (of the request; in seconds, or thousandths, millionths or billionths of one, told by its size),
`session_id`, `input` (the whole prompt, as a text or as chat messages) and `output` (a text). Lines of a session are
put in order of time. What a prompt has in common with the one before is the longest prefix of their texts:

* it begins with the whole prompt before and its output: the context was kept, and the rest is the append;
* else the context shrinks to what they share. Recordings whose prompts leave out the agent's own answers are all of
  this kind: each prompt is the one before and the tool's output, and what was generated between them is dropped.

Tokens are counted with a `tokenizers` tokenizer, or, where none is given, as UTF-8 bytes over `BYTES_PER_TOKEN`;
a chat's messages are joined without the marks of a template. Pauses are the times between requests, so they include the
recorded service time of the request before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from dualpath.traces.limits import TraceError
from dualpath.traces.trajectory import Round, Trajectory

BYTES_PER_TOKEN = 4

CountTokens = Callable[[str], int]


def tokens_of_bytes(text: str) -> int:
    return -(-len(text.encode()) // BYTES_PER_TOKEN)


class _Message(msgspec.Struct):
    content: str | list[dict[str, object]] | None = None

    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(str(part.get("text", "")) for part in self.content)
        return self.content or ""


class _Line(msgspec.Struct, frozen=True):
    timestamp: float
    session_id: str
    input: str | list[_Message]
    output: str

    @property
    def prompt(self) -> str:
        return self.input if isinstance(self.input, str) else "".join(message.text() for message in self.input)


def load_tokenizer(path: Path) -> CountTokens:
    """Of a ``tokenizer.json``. Raises TraceError."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise TraceError(f"{path}: not a tokenizer.json: {error}") from error

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    return count


def read_miniswe(path: Path, count_tokens: CountTokens = tokens_of_bytes) -> list[Trajectory]:
    """The sessions in `path`, in order of their first requests. Raises TraceError."""
    sessions: dict[str, list[_Line]] = {}
    for line in _lines(path):
        sessions.setdefault(line.session_id, []).append(line)
    if not sessions:
        raise TraceError(f"{path}: holds no requests")
    in_order = sorted(sessions.items(), key=lambda item: min(line.timestamp for line in item[1]))
    return [_trajectory(path, name, lines, count_tokens) for name, lines in in_order]


def _lines(path: Path) -> Iterator[_Line]:
    decoder = msgspec.json.Decoder(_Line)
    number = 0
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    line = decoder.decode(text)
                    if line.timestamp < 0:
                        raise TraceError(f"{path}: line {number}: timestamp {line.timestamp:g} is below zero")
                    yield line
    except OSError as error:
        raise TraceError(f"{path}: can't be read: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise TraceError(f"{path}: line {number}: not a request of a mini-SWE-agent session: {error}") from error


def _trajectory(path: Path, name: str, lines: list[_Line], count_tokens: CountTokens) -> Trajectory:
    rounds: list[Round] = []
    before: _Line | None = None
    context_tokens = 0
    for line in sorted(lines, key=lambda line: line.timestamp):
        if not line.prompt:
            raise TraceError(f"{path}: session {name!r} has an empty prompt at timestamp {line.timestamp:.0f}")
        kept_tokens = 0
        if before is not None:
            whole = line.prompt.startswith(before.prompt + before.output)
            kept_tokens = context_tokens if whole else min(context_tokens, count_tokens(_shared(before, line)))
        append_tokens = max(0, count_tokens(line.prompt) - kept_tokens)
        generate_tokens = max(1, count_tokens(line.output))
        rounds.append(
            Round(
                append_tokens=append_tokens,
                generate_tokens=generate_tokens,
                gap_s=0.0 if before is None else _seconds(line.timestamp) - _seconds(before.timestamp),
                keep_tokens=None if kept_tokens == context_tokens else kept_tokens,
            )
        )
        context_tokens = kept_tokens + append_tokens + generate_tokens
        before = line
    return Trajectory(id=name, rounds=tuple(rounds))


def _shared(before: _Line, line: _Line) -> str:
    """The longest prefix of both prompts."""
    if line.prompt.startswith(before.prompt):
        return before.prompt
    pairs = zip(before.prompt, line.prompt, strict=False)
    differs = next((index for index, (one, other) in enumerate(pairs) if one != other), None)
    return line.prompt if differs is None else line.prompt[:differs]


def _seconds(timestamp: float) -> float:
    """Today is 1.8e9 s, 1.8e12 ms, 1.8e15 us or 1.8e18 ns since 1970; relative times below 1e11 are seconds."""
    for unit in (1e9, 1e6, 1e3):
        if timestamp >= 1e8 * unit:
            return timestamp / unit
    return timestamp
