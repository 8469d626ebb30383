"""Text and tokens: uses the model's tokenizer such that a long prompt does not delay other clients' streams.

It calls a fast tokenizer's backend directly. The backend's `encode` keeps the interpreter lock for the whole text.
`encode_batch_fast` releases it and skips the offsets, which are not needed (measured on 900 kB: 0.5 against 2.4 M
characters per second). So it is used for a single text too, in a thread when the text is long.

Tokens can't be decoded one by one: a character may be spread over several tokens (its decoding ends in U+FFFD until the
last one comes), and a token may decode differently at the start of a text (SentencePiece drops the leading space). So
`IncrementalDetokenizer` decodes a short *window* of recent tokens, which starts with the end of the prompt as context.
It remembers how much of the window's text it has returned, and withholds the end that may still change. It cuts the
front of a long window, only where both sides provably decode as they did together.

`StopMatcher` then withholds text that may still be the start of a stop string. The stop string that is *complete first*
ends the text (the longer of two that end together), however the text is split.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from dualpath.server.errors import ApiError, bad_parameter
from dualpath.server.token_bytes import TokenBytes

_INLINE_CHARACTERS = 2000
"""Shorter texts take less than about a millisecond; moving them to a thread would cost more than it saves."""


def load_tokenizer(path: str) -> Any:
    """Returns the tokenizer at `path` (a directory or a model's name). Imports Transformers, and so torch, only now."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


class TextCodec:
    """Encodes, decodes and renders chats with one Transformers tokenizer, fast or slow."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._token_texts: dict[int, str] = {}
        self._token_bytes = TokenBytes(tokenizer, lambda ids: self.decode(ids, skip_special_tokens=False))
        if self._backend is not None:  # never truncate or pad a prompt silently
            self._backend.no_truncation()
            self._backend.no_padding()

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if len(text) <= _INLINE_CHARACTERS:
            return self._encode(text, add_special_tokens)
        return await asyncio.to_thread(self._encode, text, add_special_tokens)

    async def encode_all(self, texts: list[str]) -> list[list[int]]:
        """Returns the tokens of each text, without special ones."""
        return await asyncio.to_thread(lambda: [self._encode(text, add_special_tokens=False) for text in texts])

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
            text: str = self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
            return text
        return str(
            self._tokenizer.decode(
                token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )

    def token_text(self, token_id: int) -> str:
        """Returns one token's text, as log-probabilities show it: U+FFFD for parts of a character. Cached; the
        vocabulary bounds the cache.
        """
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._token_texts[token_id] = self.token_bytes(token_id).decode(errors="replace")
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """Returns one token's own bytes, also where they are a part of a character."""
        return self._token_bytes(token_id)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if self._backend is None:
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))
        return list(self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def _encode_chat(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> list[int]:
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except ApiError:
            raise
        except Exception as error:  # templates are the model authors' programs and may raise anything
            raise bad_parameter("messages", f"the model's chat template refuses these messages: {error}") from error
        return self._encode(text, add_special_tokens=False)


_REPLACEMENT = "\ufffd"
_MISSING_BYTES = 3
"""An incomplete UTF-8 character lacks at most three bytes, hence three tokens, each decoded as at most one U+FFFD."""
_CONTEXT_TOKENS = 6
_WINDOW_TOKENS = 32
_KEPT_TOKENS = range(6, 14)


class IncrementalDetokenizer:
    """Decodes a growing list of tokens. The joined pieces equal the decoded whole, however the tokens arrive.

    For byte-fallback vocabularies this holds only for valid UTF-8: there an invalid byte changes the text before it.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt_token_ids: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(prompt_token_ids[-_CONTEXT_TOKENS:])
        self._text = decode(self._window) if self._window else ""
        if self._text.endswith(_REPLACEMENT):  # the prompt ends inside a character: start without context
            self._window, self._text = [], ""
        self._given = len(self._text)
        self._unsure_tokens = 0

    def push(self, token_id: int) -> str:
        """Add one token. Returns the text that is now final."""
        self._window.append(token_id)
        text = self._text = self._decode(self._window)
        unsure = len(text) - len(text.rstrip(_REPLACEMENT)) if text.endswith(_REPLACEMENT) else 0
        self._unsure_tokens = self._unsure_tokens + 1 if unsure else 0
        junk = self._unsure_tokens > _MISSING_BYTES  # no valid character needs so many tokens
        if junk:
            unsure = min(unsure, _MISSING_BYTES)
        final = len(text) - unsure
        piece = text[self._given : final]
        if final > self._given:
            self._given = final
        if len(self._window) > _WINDOW_TOKENS and (junk or not unsure):
            self._cut()
        return piece

    def finish(self) -> str:
        """Returns the rest: characters that no later token will complete."""
        piece = self._text[self._given :]
        self._given = len(self._text)
        return piece

    def _cut(self) -> None:
        """Cut the front of the window at the first place near its end where that changes no text."""
        for kept in _KEPT_TOKENS:
            head, tail = self._decode(self._window[:-kept]), self._decode(self._window[-kept:])
            clean = self._text.startswith(head) and not head.endswith(_REPLACEMENT) and self._text.endswith(tail)
            dropped = len(self._text) - len(tail)
            if (clean or head + tail == self._text) and dropped <= self._given:
                self._window, self._text = self._window[-kept:], tail
                self._given -= dropped
                return


class StopMatcher:
    """Passes text on until a stop string is complete; `matched` is then that string, and the text ends before it, or
    with it if that is to be shown.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Add text. Returns the text that may be shown now."""
        if not self._stops:
            return text
        held = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := held.find(stop)) >= 0]
        if found:
            end, start, self.matched = min(found)
            self._held = ""
            return held[: end if self._include else start]
        keep = max(self._overlap(held, stop) for stop in self._stops)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """End the text. Returns what was withheld."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Returns the length of the longest suffix of `text` that is a prefix of `stop`."""
        longest = min(len(stop) - 1, len(text))
        return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
