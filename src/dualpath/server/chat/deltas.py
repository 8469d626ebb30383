"""What a generation adds to a message, step by step. Every chat API's writer is made of these, and of nothing else."""

from collections.abc import Iterable
from typing import Literal

import msgspec


class Delta(msgspec.Struct, frozen=True, gc=False):
    """One addition to an assistant message.

    ``content`` and ``reasoning`` add `text`. ``call`` opens tool call number `call` (from 0): `text` is the function's
    name and `call_id` its id. ``arguments`` adds `text`, a part of the JSON of call number `call`.
    """

    kind: Literal["content", "reasoning", "call", "arguments"]
    text: str
    call: int = 0
    call_id: str = ""


class Call(msgspec.Struct):
    """A whole tool call; `arguments` is JSON text, as the model wrote it."""

    call_id: str
    name: str
    arguments: str = ""


class Message(msgspec.Struct):
    """A whole assistant message. None: the model wrote nothing of that kind."""

    content: str | None = None
    reasoning: str | None = None
    calls: list[Call] = []


def fold(deltas: Iterable[Delta]) -> Message:
    """Returns the message that the deltas add up to."""
    message = Message()
    for delta in deltas:
        match delta.kind:
            case "content":
                message.content = (message.content or "") + delta.text
            case "reasoning":
                message.reasoning = (message.reasoning or "") + delta.text
            case "call":
                message.calls.append(Call(delta.call_id, delta.text))
            case "arguments":
                message.calls[delta.call].arguments += delta.text
    return message
