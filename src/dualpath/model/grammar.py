"""Grammars that a sequence's tokens must follow, by llguidance: compiled once, one matcher per sequence.

The tokenizer is loaded at the first grammar, because most engines never see one. Compiling takes from a millisecond to
seconds and releases the interpreter lock, so engines do it on a thread of its own. A fresh matcher of each grammar is
kept, the most recently used ones; a sequence gets a copy. Any failure is that of one sequence: `GrammarError`.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits
from torch import Tensor

KEPT_GRAMMARS = 64
"""Compiled grammars kept. What grows while a sequence follows its grammar is in its own copy."""
_LIMITS = LLParserLimits(verbose_errors=False)


class GrammarError(ValueError):
    """A grammar that can't be compiled or followed; the message says why."""


class Matcher:
    """Where one sequence is in its grammar."""

    def __init__(self, matcher: Any, end_token_ids: Sequence[int]) -> None:
        self._matcher = matcher
        self._end_token_ids = list(end_token_ids)

    def allowed(self, vocabulary: int, unwanted: Sequence[int] = (), ending: bool = True) -> Tensor:
        """Returns the tokens that may come next, bool ``[vocabulary]``.

        `unwanted` tokens, and end tokens where `ending` is False, are among them only if nothing else is. Raises
        GrammarError.
        """
        self._check()
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        mask = np.zeros(vocabulary, np.bool_)
        known = np.unpackbits(bits, bitorder="little")[:vocabulary]
        mask[: known.size] = known
        held_back = [*unwanted, *(() if ending else self._end_token_ids)]
        if held_back:
            rest = mask.copy()
            rest[held_back] = False
            mask = rest if rest.any() else mask
        return torch.from_numpy(mask)

    def advance(self, token_ids: Sequence[int]) -> None:
        """Go on by tokens that were drawn. Raises GrammarError when the grammar does not allow them."""
        if not self._matcher.consume_tokens(list(token_ids)):
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            why = self._matcher.get_error().split("\n", 1)[0]
            raise GrammarError(f"the grammar can't be followed: {why}")


class Grammars:
    """The compiled grammars of one engine process. Any thread may ask; a slow grammar delays no other."""

    def __init__(self, path: str | Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._path, self._vocab_size, self._eos_token_ids = path, vocab_size, list(eos_token_ids)
        self._tokenizer: Any = None
        self._fresh: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._loading = threading.Lock()

    def matcher(self, grammar: str) -> Matcher:
        """Returns a matcher at the grammar's start. Raises GrammarError."""
        if not self._eos_token_ids:
            raise GrammarError("this model has no end-of-sequence token, so nothing could end a grammar's text")
        with self._lock:
            fresh = self._fresh.get(grammar)
        if fresh is None:
            fresh = self._compile(grammar)
        with self._lock:
            self._fresh[grammar] = fresh
            self._fresh.move_to_end(grammar)
            if len(self._fresh) > KEPT_GRAMMARS:
                self._fresh.popitem(last=False)
        return Matcher(fresh.deep_copy(), self._eos_token_ids)

    def _compile(self, grammar: str) -> Any:
        with self._loading:
            self._tokenizer = self._tokenizer or self._load_tokenizer()
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise GrammarError(f"the grammar can't be compiled: {matcher.get_error()}")
        return matcher

    def _load_tokenizer(self) -> Any:
        import llguidance.hf
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self._path, local_files_only=True)
            tokens = max(self._vocab_size, len(tokenizer))
            return llguidance.hf.from_tokenizer(tokenizer, n_vocab=tokens, eos_token=self._eos_token_ids)
        except (OSError, ValueError) as error:
            raise GrammarError(f"grammars need the model's tokenizer, and it can't be used: {error}") from error
