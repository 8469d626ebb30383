"""Grammars as llguidance texts (Lark with ``%json``), for structured output and for tool calls.

A `Grammar` is rules and a body; `Writer.text` makes it one text, with the reasoning that may come before. Literal text
is written token by token where it must be: llguidance never matches a special token by its text, so a marker that is
one token of the vocabulary is written as that token.

White space in JSON is bounded, or a model may write it for ever. Arguments of calls are written as templates write
them back (``", "`` and ``": "``), so that the next turn's prompt goes on as the tokens that were generated.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import regex

from dualpath.server.chat.formats import CallFormat, ReasoningFormat, TaggedParameters
from dualpath.server.chat.schemas import inexact_number, resolved, types_of

_ANSWER_SPACE = {"whitespace_pattern": r"[ \n\t]{1,40}"}
_CALL_SPACE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_TAGGED_KEYS = frozenset(
    (
        "type",
        "properties",
        "required",
        "additionalProperties",
        "title",
        "description",
        "$defs",
        "definitions",
        "$schema",
    )
)
_ANNOTATIONS = frozenset(("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"))
_UNWRITABLE_IN_TEXT = frozenset(("anyOf", "oneOf", "allOf", "not", "if", "then", "else"))

SpecialTokens = Callable[[str], list[tuple[str, int | None]]]
"""Splits a text into parts: ordinary text with None, or one special token's text with its id."""


Tools = Mapping[str, Mapping[str, Any]]
"""The parameters of each function, a JSON schema, by its name."""


class UnwritableError(ValueError):
    """A tool's parameters can't be held to their schema in this model's format; the message says why."""


class GrammarWriter:
    """Collects the rules of one grammar."""

    def __init__(self, split: SpecialTokens) -> None:
        self._split = split
        self._rules: list[str] = []
        self._subgrammars: list[dict[str, Any]] = []

    def text(self, start: str) -> str:
        """Returns the grammar whose start rule is `start`."""
        lark = "\n".join((f"start: {start}", *self._rules))
        if not self._subgrammars:
            return lark
        return json.dumps({"grammars": [{"name": "answer", "lark_grammar": lark}, *self._subgrammars]})

    def rule(self, body: str, options: str = "", name: str = "r") -> str:
        """Add a rule; a capital `name` makes it a terminal. Returns its name."""
        name = f"{name}{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return name

    def literal(self, text: str) -> str:
        """Returns an expression of exactly `text`."""
        return " ".join(_quoted(part) if token is None else f"<[{token}]>" for part, token in self._split(text))

    def until(self, text: str, before: str = "(?s:.*)", never: str = "") -> str:
        """Returns an expression of what the regular expression `before` matches, then `text` for the first time.

        What is before `text` never contains `never`.
        """
        parts = self._split(text)
        special = next((i for i, (_, token) in enumerate(parts) if token is not None), None)
        if special is None:
            other = f" & ~/(?s:.*){_escaped(never)}(?s:.*)/" if never else ""
            terminal = self.rule(f"/{before}/{other}", name="T")
            return self.rule(terminal, f"[suffix={_quoted(text)}]")
        # Up to a special token any text may come, so what must stand before it is the end of that text.
        start = "".join(part for part, _ in parts[:special])
        return f"{self.rule(f'/{before}{_escaped(start)}/')} {self.literal(text[len(start) :])}"

    # ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def json(self, schema: Any, space: Mapping[str, Any] = _ANSWER_SPACE) -> str:
        """Returns an expression of JSON that is valid against `schema`."""
        if schema is False:
            raise UnwritableError("the schema false allows nothing")
        record = {} if schema is True else schema
        if why_not := inexact_number(record):
            raise UnwritableError(why_not)
        return self.rule("%json " + json.dumps({**record, "x-guidance": space}))

    def regex(self, pattern: str) -> str:
        from llguidance import regex_to_lark

        return self.rule(f"/{regex_to_lark(pattern)}/")

    def choice(self, texts: Sequence[str]) -> str:
        return self.rule(" | ".join(map(_quoted, texts)))

    def lark(self, grammar: str) -> str:
        """Returns an expression of a whole grammar of its own."""
        name = f"g{len(self._subgrammars)}"
        self._subgrammars.append({"name": name, "lark_grammar": grammar})
        return "@" + name

    # ── messages ────────────────────────────────────────────────────────────────────────────────────────────────────

    def after_reasoning(self, form: ReasoningFormat | None, opened: bool, body: str) -> str:
        """Returns `body` after reasoning: what is left of it where the prompt has `opened` it, else it is optional."""
        if form is None:
            return body
        after = self.literal(form.after) if form.after else '("\\n\\n" | "\\n")?'
        reasoning = f"{self.until(form.close)} {after}"
        return f"{reasoning} {body}" if opened else f"({self.literal(form.open)} {reasoning})? {body}"

    def content(self, form: ReasoningFormat | None, body: str) -> str:
        """Returns `body` as a message's content."""
        return self.rule(f"{self.literal(form.content)} {body}") if form and form.content else body

    def calls(self, form: CallFormat, tools: Tools, parallel: bool) -> str:
        """Returns an expression of one call or more; `tools` has each function's parameters by its name."""
        return f"{self.literal(form.begin)} {self._several(form, tools, parallel)}"

    def text_and_calls(self, form: CallFormat, reasoning: ReasoningFormat | None, tools: Tools, parallel: bool) -> str:
        """Returns an expression of free text in which every call that starts is held to its schema."""
        if form.instead:
            text = self.content(reasoning, self.rule("/[^{](?s:.*)/" if form.only_first else "/(?s:.*)/"))
            return self.rule(f"{self.calls(form, tools, parallel)} | {text}")
        trigger = form.begin or form.opening[: form.opening.index(">") + 1]
        rest = self._several(form, tools, parallel) if form.begin else self._any_call(form, tools, len(trigger))
        call, text = self.rule(f"{self.until(trigger)} {rest}"), self.rule("/(?s:.*)/")
        return self.rule(f"{call}* {text}" if parallel else f"{call} | {text}")

    def _several(self, form: CallFormat, tools: Tools, parallel: bool) -> str:
        call = self._any_call(form, tools)
        more = f"({self.literal(form.separator)} {call})*" if parallel and form.parallel else ""
        return f"{call} {more} {self.literal(form.end)}"

    def _any_call(self, form: CallFormat, tools: Tools, begun_characters: int = 0) -> str:
        opening = form.opening[begun_characters:]
        return self.rule(" | ".join(self._call(form, opening, name, schema) for name, schema in tools.items()))

    def _call(self, form: CallFormat, opening: str, name: str, schema: Mapping[str, Any]) -> str:
        arguments = self.json(schema, _CALL_SPACE) if form.parameters is None else self._tagged(form.parameters, schema)
        number = "/[0-9]{1,3}/" if form.indexed else ""
        start = self.literal(opening + name + (":" if form.indexed else ""))
        return f"{start} {number} {self.literal(form.naming)} {arguments} {self.literal(form.closing)}"

    def _tagged(self, form: TaggedParameters, schema: Mapping[str, Any]) -> str:
        if other := sorted(schema.keys() - _TAGGED_KEYS):
            raise UnwritableError(f"this model writes parameters one by one, which can't be held to {', '.join(other)}")
        members = []
        properties = schema.get("properties", {})
        if not isinstance(properties, dict):
            raise UnwritableError("properties must be an object")
        required = _list(schema, "required") if schema.get("required") else []
        if unknown := [name for name in required if name not in properties]:
            raise UnwritableError(f"required names {unknown[0]!r}, which is not among the properties")
        for name, value in properties.items():
            member = self._member(form, name, value, schema)
            members.append(member if name in required else f"({member})?")
        return self.rule(" ".join(members)) if members else ""

    def _member(self, form: TaggedParameters, name: str, schema: Any, root: Mapping[str, Any]) -> str:
        schema = resolved(schema, root)
        schema = schema if isinstance(schema, dict) else {}
        is_text = "string" in types_of(schema, root)
        before = self.literal(form.before + name + (form.as_text if is_text else form.as_json or form.as_text))
        if not is_text:
            definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
            return f"{before} {self.json({**definitions, **schema}, _CALL_SPACE)} {self.literal(form.after)}"
        for key in ("anyOf", "oneOf"):
            if key in schema and not schema.keys() - _ANNOTATIONS - {key}:
                return self.rule(" | ".join(self._member(form, name, one, root) for one in _list(schema, key)))
        if other := sorted(schema.keys() & _UNWRITABLE_IN_TEXT):
            raise UnwritableError(f"this model writes strings as they are, which can't be held to {', '.join(other)}")
        values = [schema["const"]] if "const" in schema else _list(schema, "enum") if "enum" in schema else None
        if values is not None:
            texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
            if marked := next((text for text in texts if form.end.strip() in text), None):
                raise UnwritableError(f"{marked!r} has this model's own mark {form.end.strip()!r} in it")
            return f"{before} {self.choice(texts)} {self.literal(form.after)}"
        return f"{before} {self.until(form.after, _text_pattern(schema), form.end)}"


def _list(schema: Mapping[str, Any], key: str) -> list[Any]:
    value = schema[key]
    if not isinstance(value, list) or not value:
        raise UnwritableError(f"{key} must be a list that is not empty")
    return value


def _text_pattern(schema: Mapping[str, Any]) -> str:
    """Returns the regular expression of a string's text. A `format` is an annotation, as in JSON Schema itself."""
    from llguidance import regex_to_lark

    least, most, pattern = schema.get("minLength", 0), schema.get("maxLength", ""), schema.get("pattern")
    if pattern is None:
        return f"(?s:.{{{least},{most}}})" if least or most != "" else "(?s:.*)"
    if least or most != "":
        raise UnwritableError("this model writes strings as they are: give a pattern or lengths, not both")
    start = "" if pattern.startswith("^") else "(?s:.*)"
    end = "" if pattern.endswith("$") and not pattern.endswith("\\$") else "(?s:.*)"
    inner = pattern[not start : len(pattern) - (not end)]
    return f"{start}(?:{regex_to_lark(inner)}){end}"


def _escaped(text: str) -> str:
    return str(regex.escape(text, literal_spaces=True)).replace("/", r"\/")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
