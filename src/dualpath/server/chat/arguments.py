"""The arguments of a call while they are being generated: where a JSON object ends, and tagged parameters as JSON.

Both readers give arguments on as soon as they are final, and both know where the arguments end from what they mean: a
marker inside a JSON string is text. What is not as the format says is given on as it is.
"""

import contextlib
import json
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import regex

from dualpath.server.chat.formats import TaggedParameters


class Read(NamedTuple):
    """`arguments` are final JSON text; `rest` is what the reader has not used; `ended`: it is what follows them."""

    arguments: str
    rest: str
    ended: bool


class ArgumentsReader(Protocol):
    def read(self, text: str) -> Read:
        """Read on. `text` is the last `rest`, with what has been generated since."""
        ...

    def cut(self, text: str) -> str:
        """Returns what the last `rest` adds to the arguments where the answer ends inside them."""
        ...


class JsonReader:
    """Finds the end of one JSON object. Text that can't be JSON ends it too, as a closing marker would."""

    _OUTSIDE = regex.compile(r'["{}\[\]]|[^\s,:\w+.\-]')
    _INSIDE = regex.compile(r'["\\]')

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def read(self, text: str) -> Read:
        at = 1 if self._escaped and text else 0
        self._escaped = self._escaped and not at
        while match := (self._INSIDE if self._in_string else self._OUTSIDE).search(text, at):
            at = match.end()
            sign = match[0]
            if sign == '"':
                self._in_string = not self._in_string
            elif sign == "\\":
                self._escaped = at == len(text)
                at += 1
            elif sign in "{[":
                self._depth += 1
            elif sign in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return Read(text[:at], text[at:], True)
            else:
                return Read(text[: match.start()], text[match.start() :], True)
        return Read(text, "", False)

    def cut(self, text: str) -> str:
        return text


class ParameterReader:
    """Reads tagged parameters, one JSON member each. `types` has the JSON types of those that are not just strings."""

    def __init__(self, form: TaggedParameters, types: Mapping[str, frozenset[str]]) -> None:
        self._form = form
        self._tag = regex.compile(form.tag)
        self._types = types
        self._key: str | None = None
        self._members = 0

    def read(self, text: str) -> Read:
        out = ""
        while True:
            if self._key is None:
                match = self._tag.match(text, partial=True)
                if match is None:
                    return Read(out + ("}" if self._members else "{}"), text, True)
                if match.partial:
                    return Read(out, text, False)
                self._key, text = match["key"], text[match.end() :]
            end = text.find(self._form.end, self._json_end(text))
            if end < 0:
                return Read(out, text, False)
            out += self._member(self._key, text[:end])
            self._key, text = None, text[end + len(self._form.end) :]

    def cut(self, text: str) -> str:
        if self._key is None:
            return ""
        end = self._form.end
        marker = next((n for n in range(min(len(text), len(end) - 1), 0, -1) if text.endswith(end[:n])), 0)
        value = text[: len(text) - marker]
        value = value.removeprefix("\n").removesuffix("\n") if self._form.padded else value
        is_text = "string" in self._types.get(self._key, _TEXT)
        return f"{self._start(self._key)}{_quoted(value)[:-1] if is_text else value.lstrip()}"

    def _start(self, key: str) -> str:
        return f"{', ' if self._members else '{'}{_quoted(key)}: "

    def _json_end(self, text: str) -> int:
        """Returns where an array or object ends, in whose strings the end marker is text; 0 for other values."""
        if "string" in self._types.get(self._key or "", _TEXT) or not text.lstrip().startswith(("{", "[")):
            return 0
        return len(JsonReader().read(text).arguments)

    def _member(self, key: str, value: str) -> str:
        if self._form.padded:
            value = value.removeprefix("\n").removesuffix("\n")
        start, self._members = self._start(key), self._members + 1
        return start + as_json(value, self._types.get(key, _TEXT))


_TEXT = frozenset(("string",))
_PYTHON = {"True": "true", "False": "false", "None": "null"}


def as_json(value: str, types: frozenset[str]) -> str:
    """Returns the JSON of a parameter's text: a value of one of `types` where it can be, else a string."""
    if types - _TEXT:
        text = _PYTHON.get(value.strip(), value.strip())
        with contextlib.suppress(ValueError, RecursionError):
            if types & json_types(json.loads(text, parse_constant=_refuse)) - _TEXT:
                return text
    return _quoted(value)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def json_types(value: object) -> frozenset[str]:
    """Returns the names that JSON Schema has for a value's type."""
    match value:
        case bool():
            return frozenset(("boolean",))
        case int():
            return frozenset(("integer", "number"))
        case float():
            return frozenset(("integer", "number") if value.is_integer() else ("number",))
        case str():
            return _TEXT
        case None:
            return frozenset(("null",))
        case list():
            return frozenset(("array",))
    return frozenset(("object",))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
