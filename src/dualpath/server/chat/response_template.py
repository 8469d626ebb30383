"""Reads messages of models whose tokenizer brings a `response_template`, with Transformers' own parser."""

import json
import secrets
from typing import Any

from dualpath.server.chat.deltas import Delta
from dualpath.server.chat.parsing import ReadingPlan

_REASONING = ("reasoning_content", "reasoning", "thinking")


class TemplateParser:
    """Reads one message. A call comes whole, when it has ended. What the template can't read is content.

    `prefix` is the prompt's end, `tools` are as the chat template has them.
    """

    def __init__(self, plan: ReadingPlan) -> None:
        from transformers.utils.chat_parsing import ResponseParser

        self.calls = 0
        self._plan = plan
        self._parser: Any = ResponseParser(plan.template, prefix=plan.prompt_end, tools=plan.tools)
        self._pending = ""
        """Text that has not come out yet: a marker's beginning, or a call that has not ended."""

    @property
    def in_call(self) -> bool:
        return False  # the parser tells of a call when it has ended

    def push(self, text: str) -> list[Delta]:
        """Returns what `text` adds to the message, as far as it is sure."""
        if self._parser is None:
            return [Delta("content", text)] if text else []
        self._pending += text
        try:
            return self._deltas(self._parser.feed(text))
        except Exception:  # the template's parsers raise what they like
            return self._give_up()

    def finish(self) -> list[Delta]:
        try:
            return self._deltas(self._parser.finalize()[1]) if self._parser is not None else []
        except Exception:
            return self._give_up()

    def _give_up(self) -> list[Delta]:
        pending, self._pending, self._parser = self._pending, "", None
        return [Delta("content", pending)] if pending else []

    def _deltas(self, events: list[dict[str, Any]]) -> list[Delta]:
        deltas: list[Delta] = []
        for event in events:
            field, text = event["field"], event.get("text") or ""
            if event["type"] == "region_chunk" and field != "tool_calls":
                self._pending = self._pending.partition(text)[2]
                if field == "content":
                    deltas.append(Delta("content", text))
                elif field in _REASONING and self._plan.include_reasoning:
                    deltas.append(Delta("reasoning", text))
            elif event["type"] == "region_close" and field == "tool_calls":
                self._pending = ""
                value = event["value"]
                for call in value if isinstance(value, list) else [value]:
                    deltas += self._call(call)
        return deltas

    def _call(self, call: dict[str, Any]) -> list[Delta]:
        function = call.get("function", call)
        arguments = function.get("arguments", {})
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        self.calls += 1
        if self.calls > 1 and not self._plan.parallel:
            return []
        call_id = str(call.get("id") or f"call_{secrets.token_hex(12)}")
        return [Delta("call", function["name"], self.calls - 1, call_id), Delta("arguments", text, self.calls - 1)]
