"""Reads OpenAI chat messages: JSON lines, each with ``messages``, a list of ``role`` and ``content``.

A line is a whole conversation or one request of it. Every message of the role ``assistant`` is an answer; what lies
between two answers is the append. A line whose messages begin with all those of an earlier line (of the same
``session_id``, where lines have one) is a later request of the same conversation and takes its place. Each line is
continued at most once: a second continuation starts another agent, as does a line that changes earlier messages::

    [system, user]                              ┐ one conversation of two rounds: the answer to its first request is in
    [system, user, assistant, tool]             ┘ the second, the answer to the second was not recorded (one token)

Texts and the names and arguments of tool calls count. Images, tool definitions and times do not: pauses are zero.
"""

from pathlib import Path

import msgspec

from dualpath.traces.reading import NO_OPTIONS, ReadOptions, TraceError, records
from dualpath.traces.texts import Message, rounds_of_conversation
from dualpath.traces.trajectory import Trajectory


class _Record(msgspec.Struct):
    messages: list[Message]
    session_id: str | int | None = None


class _Conversation(msgspec.Struct):
    name: str
    said: list[tuple[bool, str]]
    """Texts in order, each with whether the model said it."""


def read_chat(path: Path, options: ReadOptions = NO_OPTIONS) -> list[Trajectory]:
    """Returns the conversations in `path`, in order of their first lines. Raises TraceError."""
    conversations: list[_Conversation] = []
    latest: dict[int, _Conversation] = {}
    """Keyed by the last of `_keys`: all messages of a conversation so far."""
    for where, record in records(path, _Record, "a record of chat messages"):
        roles = [message.role for message in record.messages]
        if None in roles:
            raise TraceError(f"{path}: {where}: messages[{roles.index(None)}] has no role")
        texts = [message.text for message in record.messages]
        keys = _keys(record.session_id, roles, texts)
        continued = next((latest.pop(key) for key in reversed(keys[:-1]) if key in latest), None)
        if continued is None:
            name = f"conversation-{len(conversations):05d}" if record.session_id is None else str(record.session_id)
            continued = _Conversation(name, [])
            conversations.append(continued)
        continued.said = [(role == "assistant", text) for role, text in zip(roles, texts, strict=True)]
        if keys:
            latest[keys[-1]] = continued
    rounds = [(one.name, rounds_of_conversation(one.said, options.count_tokens)) for one in conversations]
    return [Trajectory(id=name, rounds=turns) for name, turns in rounds if turns]


def _keys(session: str | int | None, roles: list[str | None], texts: list[str]) -> list[int]:
    """Returns a key for each message, made of it and all before it."""
    keys: list[int] = []
    key = hash(session)
    for role, text in zip(roles, texts, strict=True):
        key = hash((key, role, text))
        keys.append(key)
    return keys
