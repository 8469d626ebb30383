"""Text and tokens: uses the model's tokenizer such that a long prompt does not delay other clients' streams.

It calls a fast tokenizer's backend directly. The backend's `encode` keeps the interpreter lock for the whole text.
`encode_batch_fast` releases it and skips the offsets, which are not needed (measured on 900 kB: 0.5 against 2.4 M
characters per second). So it is used for a single text too, in a thread when the text is long (`lanes`). A text that
can't fit the context is refused by its length alone, or after the part of it that is too long already.

Tokens can't be decoded one by one: a character may be spread over several tokens (its decoding ends in U+FFFD until the
last one comes), and a token may decode differently at the start of a text (SentencePiece drops the leading space). So
`IncrementalDetokenizer` decodes a short *window* of recent tokens, which starts with the end of the prompt as context.
It remembers how much of the window's text it has returned, and withholds the end that may still change. It cuts the
front of a long window, only where both sides provably decode as they did together.

`StopMatcher` then withholds text that may still be the start of a stop string. The stop string that is *complete first*
ends the text (the longer of two that end together), however the text is split.
"""

from collections.abc import Callable, Sequence
from typing import Any

from dualpath.server.errors import ApiError, bad_parameter, context_exceeded
from dualpath.server.lanes import Lanes
from dualpath.server.limits import ServerLimits
from dualpath.server.token_bytes import TokenBytes

_INLINE_CHARACTERS = 2000
"""Shorter texts take less than about a millisecond; moving them to a thread would cost more than it saves."""
_INLINE_MESSAGES = 16
_PART_CHARACTERS = 2**16
_PART_CHARACTERS_PER_TOKEN = 8
"""Text with more characters than this for each token of the context seldom fits: its parts are counted first."""
_CUT_TOKENS = 256
"""How many more tokens a text may have in two parts than as a whole."""


def load_tokenizer(path: str) -> Any:
    """Returns the tokenizer at `path` (a directory or a model's name). Imports Transformers, and so torch, only now."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


class TextCodec:
    """Encodes, decodes and renders chats with one Transformers tokenizer, fast or slow.

    Text that must have more than `most_tokens` tokens, the model's context, is refused before it is tokenised as a
    whole (ApiError 400, `context_length_exceeded`).
    """

    def __init__(self, tokenizer: Any, most_tokens: int = 2**63, limits: ServerLimits | None = None) -> None:
        self._tokenizer = tokenizer
        self._most_tokens = most_tokens
        self._lanes = Lanes(limits or ServerLimits())
        self._most_characters = most_tokens * _longest_token_characters(tokenizer)
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._token_texts: dict[int, str] = {}
        self._token_bytes = TokenBytes(tokenizer, lambda ids: self.decode(ids, skip_special_tokens=False))
        if self._backend is not None:  # never truncate or pad a prompt silently
            self._backend.no_truncation()
            self._backend.no_padding()

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return (await self.encode_all([text], add_special_tokens=add_special_tokens))[0]

    async def encode_all(self, texts: list[str], *, add_special_tokens: bool, contexts: int = 1) -> list[list[int]]:
        """Returns the tokens of each text, which may have as many as that many contexts."""

        def work() -> list[list[int]]:
            for text in texts:
                self._refuse_giant(text, "prompt", contexts)
            return [self._encode(text, add_special_tokens) for text in texts]

        characters = sum(map(len, texts))
        return work() if characters <= _INLINE_CHARACTERS else await self._lanes.run(characters, work)

    async def encode_chat(
        self, messages: list[dict[str, Any]], options: dict[str, Any], contexts: int = 1
    ) -> list[int]:
        """Render `messages` with the model's chat template, then encode.

        Raises ApiError (400) when there is no template or it refuses the messages.
        """
        if not getattr(self._tokenizer, "chat_template", None):
            raise bad_parameter(
                "messages", "this model's tokenizer has no chat template; use /v1/completions", code="no_chat_template"
            )
        characters = sum(_characters(message) for message in messages)
        plain = all(isinstance(value, (bool, str, int, type(None))) for value in options.values())
        if plain and characters <= _INLINE_CHARACTERS and len(messages) <= _INLINE_MESSAGES:
            return self._encode_chat(messages, options, contexts)
        return await self._lanes.run(characters, lambda: self._encode_chat(messages, options, contexts))

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

    def _refuse_giant(self, text: str, param: str, contexts: int) -> None:
        """Raise ApiError when `text` must have too many tokens, at the cost of no more of it than shows that."""
        context = self._most_tokens
        part, tokens = max(_PART_CHARACTERS, context * _PART_CHARACTERS_PER_TOKEN), 0
        if len(text) > self._most_characters * contexts:
            raise context_exceeded(context, context * contexts + 1, None, param)
        if self._backend is None or len(text) <= part:
            return
        for start in range(0, len(text), part):
            pieces = self._backend.encode_batch_fast([text[start : start + part]], add_special_tokens=False)
            tokens += len(pieces[0].ids) - _CUT_TOKENS
            if tokens > context * contexts:
                raise context_exceeded(context, tokens, None, param)

    def _encode_chat(self, messages: list[dict[str, Any]], options: dict[str, Any], contexts: int) -> list[int]:
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except ApiError:
            raise
        except Exception as error:  # templates are the model authors' programs and may raise anything
            raise bad_parameter("messages", f"the model's chat template refuses these messages: {error}") from error
        self._refuse_giant(text, "messages", contexts)
        return self._encode(text, add_special_tokens=False)


def _longest_token_characters(tokenizer: Any) -> int:
    """No text has more characters than its tokens times this. (Tokens of bytes are written with a character each.)"""
    vocabulary: dict[str, int] = getattr(tokenizer, "get_vocab", dict)()
    return max(map(len, vocabulary), default=2**31)


def _characters(message: dict[str, Any]) -> int:
    return sum(len(value if isinstance(value, str) else str(value)) for value in message.values())


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
