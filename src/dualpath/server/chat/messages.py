"""A request's messages as chat templates need them: plain text, arguments as objects, only what was given."""

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from dualpath.server.chat.template import ChatTemplate
from dualpath.server.errors import bad_parameter
from dualpath.server.protocol import ChatMessage, ChatRequest, TokenizeRequest

_MAX_ROLES = 16
_OURS = frozenset(("chat_template", "tokenize", "tools", "messages", "conversation", "return_dict", "return_tensors"))


def template_messages(messages: Sequence[ChatMessage], template: ChatTemplate) -> list[dict[str, Any]]:
    """Raises ApiError (400) that names the message at fault."""
    roles = _template_roles(messages, template)
    return [_record(f"messages[{i}]", message, roles, template) for i, message in enumerate(messages)]


def template_options(asked: ChatRequest | TokenizeRequest) -> dict[str, Any]:
    """Returns the template's variables beside the messages: tools, and what the client gives on."""
    options: dict[str, Any] = dict(asked.chat_template_kwargs or {})
    if forbidden := options.keys() & _OURS:
        raise bad_parameter("chat_template_kwargs", f"{', '.join(sorted(forbidden))} may not be set here")
    if asked.tools:
        options["tools"] = [msgspec.to_builtins(tool) for tool in asked.tools]
    if isinstance(asked, ChatRequest) and asked.reasoning_effort is not None:
        options.setdefault("reasoning_effort", asked.reasoning_effort)
        if asked.reasoning_effort == "none":  # templates with thinking that can be turned off
            options.setdefault("enable_thinking", False)
            options.setdefault("thinking", False)
    return options


def _template_roles(messages: Sequence[ChatMessage], template: ChatTemplate) -> dict[str, str]:
    """Returns the template's role for each role of the messages. ``developer`` is OpenAI's newer name of ``system``."""
    roles: dict[str, str] = {}
    for index, message in enumerate(messages):
        role = message.role
        if role in roles:
            continue
        if len(roles) == _MAX_ROLES:
            raise bad_parameter(f"messages[{index}].role", f"the messages have more than {_MAX_ROLES} different roles")
        taken = template.takes_role(role) if template.text and len(role) <= 64 else len(role) <= 64
        roles[role] = "system" if role == "developer" and not taken else role
        if roles[role] == role and taken is False:
            raise bad_parameter(
                f"messages[{index}].role",
                f"the model's chat template has no role {role[:64]!r} and would drop the message; use system, user, "
                "assistant or tool",
            )
    return roles


def _record(where: str, message: ChatMessage, roles: dict[str, str], template: ChatTemplate) -> dict[str, Any]:
    if message.function_call:
        raise bad_parameter(
            f"{where}.function_call",
            f"{where} has a function_call, which is not supported; send tool_calls",
            code="unsupported_parameter",
        )
    record: dict[str, Any] = {"role": roles[message.role], "content": _text(where, message)}
    for key in ("name", "tool_call_id"):
        if (value := getattr(message, key)) is not None:
            record[key] = value
    if reasoning := message.reasoning or message.reasoning_content:
        record.update(reasoning=reasoning, reasoning_content=reasoning, thinking=reasoning)
    if message.tool_calls:
        calls = enumerate(message.tool_calls)
        record["tool_calls"] = [_call(f"{where}.tool_calls[{j}]", call, template) for j, call in calls]
    return record


def _text(where: str, message: ChatMessage) -> str:
    content = message.content
    if isinstance(content, list):
        for part in content:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise bad_parameter(
                    "messages",
                    f"{where} has a content part of type {part.get('type')!r}; this server takes only "
                    '{"type": "text", "text": "…"}',
                    code="unsupported_content",
                )
        return "\n".join(part["text"] for part in content)
    if content is None and message.role != "assistant":
        raise bad_parameter("messages", f"{where} has no content; give a text")
    return content or ""


def _call(where: str, call: Any, template: ChatTemplate) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise bad_parameter(where, f'{where} must be {{"id": …, "type": "function", "function": {{"name": …}}}}')
    written = _arguments(f"{where}.function.arguments", function.get("arguments"), template)
    return {
        "id": str(call.get("id") or ""),
        "type": "function",
        "function": {"name": function["name"], "arguments": written},
    }


def _arguments(where: str, given: Any, template: ChatTemplate) -> Any:
    """Returns a call's arguments as the template takes them.

    Text that is no JSON object is what a model wrote by mistake, or was cut off: it goes back as it is where the
    template can show it.
    """
    text = given if isinstance(given, str) and given.strip() else "{}"
    if given and not isinstance(given, str | dict):
        raise bad_parameter(where, f"{where} must be the JSON text of an object")
    try:
        arguments = given if isinstance(given, dict) else msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        return text if template.takes_text_arguments else {"INVALID_JSON": text}
    return json.dumps(arguments, ensure_ascii=False) if template.wants_text_arguments else arguments
