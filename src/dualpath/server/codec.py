"""Text and tokens: the model's tokenizer, used so that a long prompt does not hold up everybody's streams.

A fast tokenizer's backend is called directly. Its `encode` keeps the interpreter lock for the whole text, while
`encode_batch_fast` gives it up and skips the offsets nobody asked for (measured on 900 kB: 0.5 against 2.4 M characters
a second), so the latter is used for one text too, in a thread when the text is long.

Decoding is not token by token: a character may be spread over several tokens (its decoding ends in U+FFFD until the
last one comes), and a token may look different at the beginning of a text (SentencePiece drops the leading space). So
`IncrementalDetokenizer` decodes a short *window* of recent tokens, seeded with the end of the prompt for context,
remembers how much of the window's text it has given out, and withholds the end that may still change. When the window
is long its front is cut, only where both sides provably decode as they did together.

`StopMatcher` then withholds the text that could still be the beginning of a stop string. The stop string that is
*complete first* ends the text (of two that end together, the longer), which does not depend on how text is split.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from dualpath.server.errors import ApiError, bad_parameter

_INLINE_CHARACTERS = 2000
"""Shorter texts take less than about a millisecond; moving them to a thread would cost more than it spares."""


def load_tokenizer(path: str) -> Any:
    """The tokenizer at `path` (a directory, or a model's name). Imports Transformers only now, which loads torch."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


class TextCodec:
    """Encode, decode and render chats with one Transformers tokenizer, fast or slow."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._token_texts: dict[int, str] = {}
        if self._backend is not None:  # a prompt is never cut or filled up behind the client's back
            self._backend.no_truncation()
            self._backend.no_padding()

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if len(text) <= _INLINE_CHARACTERS:
            return self._encode(text, add_special_tokens)
        return await asyncio.to_thread(self._encode, text, add_special_tokens)

    async def encode_chat(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> list[int]:
        """Render `messages` with the model's chat template, then encode.

        Raises ApiError (400) when there is no template or it refuses the messages.
        """
        if not getattr(self._tokenizer, "chat_template", None):
            raise bad_parameter(
                "messages", "this model's tokenizer has no chat template; use /v1/completions", code="no_chat_template"
            )
        if sum(len(str(message.get("content"))) for message in messages) <= _INLINE_CHARACTERS:
            return self._encode_chat(messages, options)
        return await asyncio.to_thread(self._encode_chat, messages, options)

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        if self._backend is not None:
            return str(self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens))
        return str(
            self._tokenizer.decode(
                token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )

    def token_text(self, token_id: int) -> str:
        """The token alone, as log-probabilities name it. Remembered: the vocabulary bounds the memory."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._token_texts[token_id] = self.decode([token_id], skip_special_tokens=False)
        return text

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if self._backend is None:
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))
        return list(self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def _encode_chat(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> list[int]:
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except ApiError:
            raise
        except Exception as error:  # templates are programs of the model's authors and raise what they like
            raise bad_parameter("messages", f"the model's chat template refuses these messages: {error}") from error
        return self._encode(text, add_special_tokens=False)


_REPLACEMENT = "\ufffd"
_MISSING_BYTES = 3
"""A character of UTF-8 lacks at most three bytes, hence three tokens, each shown as at most one U+FFFD."""
_CONTEXT_TOKENS = 6
_WINDOW_TOKENS = 32
_KEPT_TOKENS = range(6, 14)


class IncrementalDetokenizer:
    """Text of a growing list of tokens; the pieces joined are the text of the whole, however they were split.

    For byte-fallback vocabularies that holds for valid UTF-8 only: there an invalid byte changes the text before it.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt_token_ids: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(prompt_token_ids[-_CONTEXT_TOKENS:])
        self._text = decode(self._window) if self._window else ""
        if self._text.endswith(_REPLACEMENT):  # the prompt ends inside a character: no context is better than half
            self._window, self._text = [], ""
        self._given = len(self._text)
        self._unsure_tokens = 0

    def push(self, token_id: int) -> str:
        """Take one token; return the text that is final now."""
        self._window.append(token_id)
        self._text = self._decode(self._window)
        unsure = len(self._text) - len(self._text.rstrip(_REPLACEMENT))
        self._unsure_tokens = self._unsure_tokens + 1 if unsure else 0
        junk = self._unsure_tokens > _MISSING_BYTES  # no character on its way takes so long
        if junk:
            unsure = min(unsure, _MISSING_BYTES)
        final = len(self._text) - unsure
        piece = self._text[self._given : final]
        self._given = max(self._given, final)
        if len(self._window) > _WINDOW_TOKENS and (junk or not unsure):
            self._cut()
        return piece

    def finish(self) -> str:
        """The rest: characters that no later token will complete."""
        piece = self._text[self._given :]
        self._given = len(self._text)
        return piece

    def _cut(self) -> None:
        """Drop the front of the window at the first place near its end where that changes nothing."""
        for kept in _KEPT_TOKENS:
            head, tail = self._decode(self._window[:-kept]), self._decode(self._window[-kept:])
            clean = self._text.startswith(head) and not head.endswith(_REPLACEMENT) and self._text.endswith(tail)
            dropped = len(self._text) - len(tail)
            if (clean or head + tail == self._text) and dropped <= self._given:
                self._window, self._text = self._window[-kept:], tail
                self._given -= dropped
                return


class StopMatcher:
    """Gives text out until a stop string is complete; `matched` is then that string and the text ends before it."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Take more text; return what may be shown now."""
        if not self._stops:
            return text
        held = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := held.find(stop)) >= 0]
        if found:
            _, start, self.matched = min(found)
            self._held = ""
            return held[:start]
        keep = max(self._overlap(held, stop) for stop in self._stops)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """No more text will come: what was withheld is text after all."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that begins `stop`."""
        longest = min(len(stop) - 1, len(text))
        return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
