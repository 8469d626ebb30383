"""Turns recorded texts into tokens and rounds, for the readers of formats with text.

A `tokenizers` tokenizer counts the tokens; without one they are UTF-8 bytes over four. The marks that a chat template
puts around messages are not counted.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from dualpath.traces.reading import CountTokens, TraceError
from dualpath.traces.trajectory import Round


def load_tokenizer(path: Path) -> CountTokens:
    """Loads the token counter of a ``tokenizer.json``. Raises TraceError."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise TraceError(f"{path}: not a tokenizer.json: {error}") from error

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    return count


class _Part(msgspec.Struct):
    text: str | None = None


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | dict[str, Any] | None = None

    @property
    def text(self) -> str:
        given = self.arguments
        return (self.name or "") + (given if isinstance(given, str) else msgspec.json.encode(given or {}).decode())


class _ToolCall(msgspec.Struct):
    function: _Function | None = None


class Message(msgspec.Struct, kw_only=True):
    """A message of an OpenAI chat. Its text is its content, then the names and arguments of the calls it makes."""

    role: str | None = None
    content: str | list[_Part] | None = None
    tool_calls: list[_ToolCall] | None = None
    function_call: _Function | None = None

    @property
    def text(self) -> str:
        content = self.content or ""
        texts = [content] if isinstance(content, str) else [part.text or "" for part in content]
        calls = [call.function for call in self.tool_calls or ()] + [self.function_call]
        return "".join(texts + [call.text for call in calls if call is not None])


def rounds_of_conversation(said: Iterable[tuple[bool, str]], count_tokens: CountTokens) -> tuple[Round, ...]:
    """Makes rounds of texts, each given with whether the model said it. What others say before an answer is its append.

    The model's own text at the very beginning is context, because no prompt precedes it. Others' text at the end is a
    request whose answer was not recorded: a round of one generated token.
    """
    rounds: list[Round] = []
    asked = ""
    by_model = True
    for by_model, text in said:
        if by_model and (rounds or asked):
            rounds.append(_round(asked, count_tokens(text), count_tokens, first=not rounds))
            asked = ""
        else:
            asked += text
    if asked and not by_model:
        rounds.append(_round(asked, 1, count_tokens, first=not rounds))
    return tuple(rounds)


def _round(asked: str, generate_tokens: int, count_tokens: CountTokens, first: bool) -> Round:
    # A tokenizer may find no token in a text of spaces; a prompt still has at least one.
    return Round(append_tokens=max(int(first), count_tokens(asked)), generate_tokens=max(1, generate_tokens))
