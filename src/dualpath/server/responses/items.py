"""Input items of the Responses API, and how they become messages of a chat."""

import base64
import binascii
from collections.abc import Callable
from typing import Any

import msgspec

from dualpath.server.chat.conversation import Conversation
from dualpath.server.errors import ApiError, bad_parameter
from dualpath.server.responses.tools import Tools

_SEAL = "dualpath:"
_TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")


class ItemPart(msgspec.Struct, omit_defaults=True):
    type: str
    text: str | None = None
    refusal: str | None = None


class Item(msgspec.Struct, omit_defaults=True):
    """One item: a message, a tool call, a tool's result, reasoning, or a reference to an earlier item."""

    type: str | None = None
    id: str | None = None
    role: str | None = None
    content: str | list[ItemPart] | None = None
    call_id: str | None = None
    name: str | None = None
    namespace: str | None = None
    arguments: str | None = None
    input: str | None = None
    output: str | list[ItemPart] | None = None
    summary: list[ItemPart] | None = None
    encrypted_content: str | None = None


Items = Callable[[str], "Item | None"]
"""Finds an item by its id."""


def add_items(conversation: Conversation, items: list[Item], known: Items, tools: Tools) -> None:
    for i, item in enumerate(items):
        _add(conversation, item, known, tools, f"input[{i}]")


def _add(conversation: Conversation, item: Item, known: Items, tools: Tools, where: str) -> None:
    match item.type:
        case "message" | None:
            if item.role not in ("user", "assistant", "system", "developer"):
                raise _bad(f"{where} has role {item.role!r}; it must be user, assistant, system or developer")
            for text in _texts(item.content, f"{where}.content"):
                conversation.say(item.role, text)
        case "reasoning":
            if text := _reasoning(item, where):
                conversation.think(text)
        case "function_call" | "custom_tool_call":
            name = tools.function_name(_given(item.name, "name", where), item.namespace)
            conversation.call(_given(item.call_id, "call_id", where), name, _arguments(item, where))
        case "function_call_output" | "custom_tool_call_output":
            output = "\n".join(_texts(item.output, f"{where}.output"))
            conversation.result(_given(item.call_id, "call_id", where), output)
        case "item_reference":
            found = known(_given(item.id, "id", where))
            if found is None or found.type == "item_reference":
                raise ApiError(404, f"{where}: the item {item.id!r} is not stored", code="not_found", param="input")
            _add(conversation, found, known, tools, where)
        case _:
            raise _bad(
                f"{where} is of type {item.type!r}, which this server does not take; it takes message, reasoning, "
                "function_call, custom_tool_call, their outputs, and item_reference",
                code="unsupported_content",
            )


def _arguments(item: Item, where: str) -> str:
    if item.type == "function_call":
        return _given(item.arguments, "arguments", where)
    return msgspec.json.encode({"input": _given(item.input, "input", where)}).decode()


def _reasoning(item: Item, where: str) -> str:
    """Returns the reasoning of an item: its text, else what is sealed in it, else its summary."""
    texts = _texts(item.content or [], f"{where}.content")
    return "".join(texts) or unseal(item.encrypted_content) or "\n".join(_texts(item.summary or [], f"{where}.summary"))


def _texts(content: str | list[ItemPart] | None, where: str) -> list[str]:
    if content is None:
        raise _bad(f"{where} is missing")
    if isinstance(content, str):
        return [content]
    texts = []
    for i, part in enumerate(content):
        if part.type == "refusal":
            texts.append(_given(part.refusal, "refusal", f"{where}[{i}]"))
        elif part.type in _TEXT_PARTS:
            texts.append(_given(part.text, "text", f"{where}[{i}]"))
        else:
            raise _bad(
                f"{where}[{i}] is of type {part.type!r}; this server takes only text", code="unsupported_content"
            )
    return texts


def _given(value: str | None, name: str, where: str) -> str:
    if value is None:
        raise _bad(f"{where} has no {name!r}")
    return value


def _bad(message: str, **more: Any) -> ApiError:
    return bad_parameter("input", message, **more)


def seal(reasoning: str) -> str:
    """Returns reasoning in one opaque word, which a client that asked for it sends back as it is. It is no secret."""
    return _SEAL + base64.b64encode(reasoning.encode()).decode()


def unseal(sealed: str | None) -> str:
    """Returns the reasoning of `seal`; empty for what another server has sealed."""
    if not (sealed or "").startswith(_SEAL):
        return ""
    try:
        return base64.b64decode((sealed or "").removeprefix(_SEAL), validate=True).decode()
    except (binascii.Error, ValueError):
        return ""
