"""What a model's chat template knows, found out by rendering small chats: roles, tools, how it wants arguments.

A template is a program, and drops what it does not know without a word. So a role or a tool counts as known if its
text comes out.
"""

import functools
from collections.abc import Mapping
from typing import Any

_MARK = "x9a7f3mark"
_MAX_ROLES = 64
_TOOL = {"type": "function", "function": {"name": _MARK, "description": "", "parameters": {"type": "object"}}}
_USER = {"role": "user", "content": "x"}


def _calling(arguments: Any) -> dict[str, Any]:
    call = {"id": "call000000", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


class ChatTemplate:
    """The chat template of one tokenizer. `text` is its source, empty if there is none."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        source = getattr(tokenizer, "chat_template", None) or ""
        self.text = "\n".join(source.values()) if isinstance(source, Mapping) else str(source)
        self.takes_role = functools.lru_cache(_MAX_ROLES)(self._takes_role)

    @functools.cached_property
    def knows_tools(self) -> bool:
        return any(_MARK in (self._render(chat, tools=[_TOOL]) or "") for chat in self._chats(_USER))

    @functools.cached_property
    def wants_text_arguments(self) -> bool:
        """Whether it takes a call's arguments only as JSON text. Most take an object."""
        return _MARK not in (self._render([_USER, _calling({_MARK: 1})]) or "") and self.takes_text_arguments

    @functools.cached_property
    def takes_text_arguments(self) -> bool:
        """Whether it shows a call's arguments as they are, if they are JSON text."""
        text = f'{{"{_MARK}": 1}}'
        return text in (self._render([_USER, _calling(text)]) or "")

    def _takes_role(self, role: str) -> bool | None:
        """Returns whether a message of this role comes out; None where the template refuses it, and says why."""
        rendered = [self._render(chat) for chat in self._chats({"role": role, "content": _MARK})]
        done = [text for text in rendered if text is not None]
        return any(_MARK in text for text in done) if done else None

    def _chats(self, message: dict[str, Any]) -> list[list[dict[str, Any]]]:
        """Returns chats in which templates that are strict about the order of roles may take `message`."""
        system = {"role": "system", "content": "x"}
        calling = _calling("{}" if self.wants_text_arguments else {})
        answer = {**message, "tool_call_id": "call000000", "name": "f"}
        return [[message], [message, _USER], [_USER, message], [system, message], [_USER, calling, answer]]

    def _render(self, chat: list[dict[str, Any]], **options: Any) -> str | None:
        try:
            return str(self._tokenizer.apply_chat_template(chat, tokenize=False, **options))
        except Exception:  # a template may raise anything
            return None
