"""Reads ShareGPT's conversations: records of ``conversations``, lists of ``from`` and ``value``, in a JSON array.

What the model said (`MODELS`) is an answer; what anyone else said before it is the append. Conversations that ask
nothing are left out. The format has no times: pauses are zero.
"""

from pathlib import Path

import msgspec

from dualpath.traces.reading import NO_OPTIONS, ReadOptions, records
from dualpath.traces.texts import rounds_of_conversation
from dualpath.traces.trajectory import Trajectory

MODELS = frozenset({"gpt", "chatgpt", "assistant", "model", "bard", "bing", "function_call"})
"""``function_call`` is the model's turn; the result comes back as an ``observation``."""


class _Turn(msgspec.Struct):
    speaker: str = msgspec.field(name="from")
    value: str | None


class _Record(msgspec.Struct):
    conversations: list[_Turn]
    id: str | int | None = None


def read_sharegpt(path: Path, options: ReadOptions = NO_OPTIONS) -> list[Trajectory]:
    """Returns the conversations in `path`. Raises TraceError."""
    found = []
    for number, (_, record) in enumerate(records(path, _Record, "a ShareGPT conversation")):
        said = [(turn.speaker in MODELS, turn.value or "") for turn in record.conversations]
        rounds = rounds_of_conversation(said, options.count_tokens)
        if rounds:
            name = f"conversation-{number:05d}" if record.id is None else str(record.id)
            found.append(Trajectory(id=name, rounds=rounds))
    return found
