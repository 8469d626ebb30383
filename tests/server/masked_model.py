"""A model that knows nothing but its grammar: it draws among the tokens that are allowed, and ends what it can.

`ENDS` and `STARTS` are tried now and then, for a random draw would hardly ever write a marker.
"""

import random
from collections.abc import Sequence
from typing import Any

from llguidance import LLMatcher
from llguidance.hf import from_tokenizer

from dualpath.server.chat.formats import CALL_FORMATS

ENDS = (
    '"',
    "}",
    "]",
    "\n</parameter>\n",
    "</arg_value>",
    "</arg_value>\n",
    "</｜DSML｜parameter>\n",
    "</think>",
    "<|end|>",
)
STARTS = tuple(form.begin or form.opening for form in CALL_FORMATS)


class MaskedModel:
    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = from_tokenizer(tokenizer, n_vocab=vocab_size)
        self._closers = [
            tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids for text in ENDS + STARTS
        ]

    def draw(self, grammar: str, seed: int, start: str = "", most_tokens: int = 3000) -> list[int]:
        """Returns tokens that match `grammar` whole, from `start` on. Raises AssertionError where there are none."""
        drawn = random.Random(seed)
        matcher = LLMatcher(self._vocabulary, grammar)
        assert not matcher.is_error(), matcher.get_error()
        tokens = list(self._tokenizer.backend_tokenizer.encode(start, add_special_tokens=False).ids)
        assert matcher.consume_tokens(tokens), matcher.get_error()
        while not matcher.is_stopped() and len(tokens) < most_tokens:
            if matcher.is_accepting() and (drawn.random() < 0.3 or len(tokens) > most_tokens // 2):
                return tokens
            step = self._closer(matcher, drawn, 0.3 if len(tokens) < 400 else 0.9) or [self._any(matcher, drawn)]
            assert matcher.consume_tokens(step), matcher.get_error()
            tokens += step
        assert matcher.is_accepting() or matcher.is_stopped(), self._tokenizer.decode(tokens)[-200:]
        return [token for token in tokens if token != self._tokenizer.eos_token_id]

    def _closer(self, matcher: LLMatcher, drawn: random.Random, often: float) -> Sequence[int] | None:
        if drawn.random() > often:
            return None
        whole = [closer for closer in self._closers if matcher.validate_tokens(closer) == len(closer)]
        return drawn.choice(whole) if whole else None

    def _any(self, matcher: LLMatcher, drawn: random.Random) -> int:
        allowed = [token for token, bias in enumerate(matcher.compute_logit_bias()) if bias]
        assert allowed, "the grammar allows no token"
        end = self._tokenizer.eos_token_id
        return drawn.choice([token for token in allowed if token != end] or allowed)
