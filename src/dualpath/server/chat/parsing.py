"""Generated text as a message: content, reasoning and tool calls, as they come.

`ChatParser` is a machine with a state for each part of a message. Each state takes what it can of the text that is
held, and leaves what may still become a marker. Nothing raises: a call that is none is content, and arguments that are
not JSON are given on as the model wrote them, as OpenAI's own API does.

Transformers' `ResponseParser` does the same from a `response_template`, and reads the models that bring one
(`response_template.py`). Our table is not written in it, because it gives arguments only when a call has ended, ends
them at a marker that stands inside a JSON string, raises midway where they are not JSON, and keeps all text to the end.
"""

import functools
import json
import secrets
from collections.abc import Callable
from typing import Any

import msgspec
import regex

from dualpath.server.chat.arguments import ArgumentsReader, JsonReader, ParameterReader
from dualpath.server.chat.deltas import Delta
from dualpath.server.chat.formats import CallFormat, ReasoningFormat

_MAX_HEADER_CHARACTERS = 4096


class ReadingPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How to read the answers of one request."""

    calls: CallFormat | None = None
    """None: no tools are offered, so nothing is a call."""
    reasoning: ReasoningFormat | None = None
    reasoning_open: bool = False
    """The prompt ends inside reasoning."""
    reasoning_closed: bool = False
    """The prompt ends just after reasoning: there is none in the answer."""
    include_reasoning: bool = True
    parallel: bool = True
    """False: calls after the first are dropped."""
    named: bool = False
    """The request named the function to call."""
    required: bool = False
    """The answer is calls and nothing else."""
    hidden_token_ids: frozenset[int] = frozenset()
    """Special tokens that are no text of the answer, though the answer is read with special tokens."""
    types: dict[str, dict[str, frozenset[str]]] = {}
    """JSON types of each tool's parameters (`schemas.value_types`)."""
    template: Any = None
    """The tokenizer's own `response_template`, which then reads the answer (`response_template.TemplateParser`)."""
    prompt_end: str = ""
    tools: list[dict[str, Any]] = []


class ChatParser:
    """Reads one message as `plan` says."""

    def __init__(self, plan: ReadingPlan) -> None:
        self.calls = 0
        self._plan = plan
        self._marks = _marks(plan.calls, plan.reasoning, False)
        self._held = ""
        self._out: list[Delta] = []
        self._begun = False
        self._strip = plan.reasoning_open
        self._reader: ArgumentsReader = JsonReader()
        self._read = ""
        self._opening = 0
        self._state: Callable[[], bool] = self._reasoning if plan.reasoning_open else self._content

    @property
    def in_call(self) -> bool:
        return self._state in (self._header, self._object, self._arguments, self._closing)

    def push(self, text: str) -> list[Delta]:
        """Returns what `text` adds to the message, as far as it is sure."""
        self._held += text
        while self._held and self._state():
            pass
        out, self._out = self._out, []
        return out

    def finish(self) -> list[Delta]:
        out = self.push("")
        held, self._held = self._held, ""
        if self._state == self._reasoning:
            self._reason(held.rstrip())
        elif self._state == self._arguments:
            self._argue(self._reader.cut(held))
        elif self._plan.required:
            pass  # the beginning of a call, cut off before its name
        elif self._state == self._object:
            self._say(self._read + held)
        elif self._state != self._closing and not (self.calls and held.isspace()):
            self._say(held)
        return out + self._out

    # ── states: each returns whether there may be more to do with what is held ──────────────────────────────────────

    def _content(self) -> bool:
        match = None if self._marks is None else self._marks.search(self._held, partial=True)
        start = len(self._held) if match is None else match.start()
        if start > 0:
            self._say(self._take(start))
            return match is not None  # text has begun, so other marks count now
        if match is None or match.partial:
            return False
        if match.lastgroup == "call":
            self._state = self._header
            return True
        self._take(match.end())
        if match.lastgroup == "think":
            self._state, self._strip = self._reasoning, True
        return True

    def _reasoning(self) -> bool:
        assert self._plan.reasoning is not None
        match = _compiled(r"\s*" + regex.escape(self._plan.reasoning.close)).search(self._held, partial=True)
        self._reason(self._take(len(self._held) if match is None else match.start()))
        if match is None or match.partial:
            return False
        self._take(match.end() - match.start())
        self._state, self._strip = self._content, True
        return True

    def _header(self) -> bool:
        form = self._calls_format
        match = _compiled(r"\s*" + form.header).match(self._held, partial=True)
        if match is not None and match.partial and len(self._held) <= _MAX_HEADER_CHARACTERS:
            return False
        if match is None or match.partial:
            return self._other_header()
        self._call(match["name"], match.groupdict().get("id"))
        self._take(match.end())
        types = self._plan.types.get(match["name"], {})
        self._reader = JsonReader() if form.parameters is None else ParameterReader(form.parameters, types)
        self._state, self._read = self._arguments, ""
        return True

    def _other_header(self) -> bool:
        """Go on where an opener was not followed by a header: to an object with other keys first, or to content."""
        form = self._calls_format
        start = _compiled(r"\s*" + form.object_start).match(self._held, partial=True) if form.object_start else None
        if start is not None and start.partial and len(self._held) <= _MAX_HEADER_CHARACTERS:
            return False
        if start is None or start.partial:
            opener = _compiled(rf"\s*(?:{form.opener})").match(self._held)
            self._say(self._take(opener.end() if opener else len(self._held)))
            self._state = self._content
        else:
            self._read = self._take(self._held.index("{"))
            self._state, self._reader, self._opening = self._object, JsonReader(), len(self._read)
        return True

    def _object(self) -> bool:
        read = self._reader.read(self._held)
        self._read, self._held = self._read + read.arguments, read.rest
        if not read.ended:
            return False
        call = _as_call(self._read[self._opening :])
        if call is None:
            self._say(self._read)
            self._state = self._content
        else:
            self._call(call[0], None)
            self._argue(call[1])
            self._held, self._state = "}" + read.rest, self._closing
        return True

    def _arguments(self) -> bool:
        if not self._read and self._calls_format.parameters is None:  # a tagged value's white space is its own
            self._held = self._held.lstrip()
        read = self._reader.read(self._held)
        self._held = read.rest
        self._read = self._read or read.arguments
        self._argue(read.arguments)
        if read.ended:
            self._argue("" if self._read.strip() else "{}")
            self._state = self._closing
        return read.ended

    def _closing(self) -> bool:
        match = _compiled(rf"[\s}}]*(?:{self._calls_format.closer})").match(self._held, partial=True)
        if match is not None and match.partial:
            return False
        self._take(match.end() if match else 0)
        self._state, self._strip = self._content, True
        return True

    # ── what comes out ──────────────────────────────────────────────────────────────────────────────────────────────

    def _take(self, length: int) -> str:
        taken, self._held = self._held[:length], self._held[length:]
        return taken

    def _say(self, text: str) -> None:
        text = text.lstrip("\n") if self._strip else text
        if text:
            self._out.append(Delta("content", text))
            self._strip = False
            if not self._begun and not text.isspace():
                self._begun = True
                self._marks = _marks(self._plan.calls, self._plan.reasoning, True)

    def _reason(self, text: str) -> None:
        text = text.lstrip() if self._strip else text
        if text:
            self._strip = False
            if self._plan.include_reasoning:
                self._out.append(Delta("reasoning", text))

    def _call(self, name: str, call_id: str | None) -> None:
        self.calls += 1
        if self._wanted:
            self._out.append(Delta("call", name, self.calls - 1, call_id or f"call_{secrets.token_hex(12)}"))

    def _argue(self, text: str) -> None:
        if text and self._wanted:
            self._out.append(Delta("arguments", text, self.calls - 1))

    @property
    def _wanted(self) -> bool:
        return self._plan.parallel or self.calls == 1

    @property
    def _calls_format(self) -> CallFormat:
        assert self._plan.calls is not None
        return self._plan.calls


def _as_call(text: str) -> tuple[str, str] | None:
    try:
        record = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("name"), str):
        return None
    arguments = record.get("arguments", record.get("parameters", {}))
    return record["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


@functools.lru_cache(64)
def _compiled(pattern: str) -> Any:
    return regex.compile(pattern)


@functools.lru_cache(64)
def _marks(calls: CallFormat | None, reasoning: ReasoningFormat | None, begun: bool) -> Any:
    """Returns the expression of all that ends content, once text has `begun` or before. None: nothing does."""
    parts = []
    if calls is not None and not (begun and calls.only_first):
        parts.append(rf"(?P<call>\s*(?:{calls.opener}))")
    if reasoning is not None and not (begun and not reasoning.anywhere):
        parts.append(rf"(?P<think>\s*{regex.escape(reasoning.open)})")
    if noise := "|".join(n for n in (calls and calls.noise, reasoning and reasoning.noise) if n):
        parts.append(rf"(?P<noise>{noise})")
    return regex.compile("|".join(parts)) if parts else None
