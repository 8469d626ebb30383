"""Checks grammars before they reach an engine, off the event loop, and remembers the last ones.

Compiling is bounded by llguidance's own limits, and by the length of what a client may send.
"""

import asyncio
import functools
import re
from typing import Any

MAX_GRAMMAR_CHARACTERS = 2**18
_REMEMBERED = 128
_AT_ONCE = 2
_REASON = re.compile(r"(?:.*failed to compile JSON schema: |.*?\): )?(.*)")


class GrammarError(ValueError):
    """A grammar that can't be compiled; the message says why."""


class GrammarChecker:
    """Knows the model's vocabulary as llguidance does. It is built at the first grammar (up to a second)."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._why_not = functools.lru_cache(_REMEMBERED)(self._compile)

    async def check(self, grammar: str) -> None:
        """Raises GrammarError."""
        if len(grammar) > MAX_GRAMMAR_CHARACTERS:
            raise GrammarError(f"it is longer than {MAX_GRAMMAR_CHARACTERS} characters")
        async with self._turns:
            why_not = await asyncio.to_thread(self._why_not, grammar)
        if why_not:
            raise GrammarError(why_not)

    def split(self, text: str) -> list[tuple[str, int | None]]:
        """Splits `text` into ordinary text and special tokens (`grammars.SpecialTokens`)."""
        parts = self._special_texts.split(text) if self.special_tokens else [text]
        return [(part, self.special_tokens.get(part)) for part in parts if part]

    @functools.cached_property
    def special_tokens(self) -> dict[str, int]:
        """The tokens that llguidance never matches by their text."""
        added = self._tokenizer.get_added_vocab()
        return {text: token for text, token in added.items() if self._vocabulary.is_special_token(token)}

    @functools.cached_property
    def _special_texts(self) -> re.Pattern[str]:
        return re.compile("(" + "|".join(map(re.escape, sorted(self.special_tokens, key=len, reverse=True))) + ")")

    @functools.cached_property
    def _vocabulary(self) -> Any:
        from llguidance.hf import from_tokenizer

        return from_tokenizer(self._tokenizer, n_vocab=max(self._vocab_size, len(self._tokenizer)))

    def _compile(self, grammar: str) -> str:
        """Returns why `grammar` can't be compiled, or nothing."""
        from llguidance import LLMatcher, LLParserLimits

        message = LLMatcher.validate_grammar(grammar, self._vocabulary, limits=LLParserLimits(verbose_errors=False))
        first = message.strip().split("\n", 1)[0]
        match = _REASON.fullmatch(first)
        return match[1] if match else first
