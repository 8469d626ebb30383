"""Makes what bends a sequence's draws, on threads of its own: a grammar may take seconds to compile."""

import asyncio

from dualpath.model import GrammarError, Grammars, LoadedModel, NoTokenError, ScoringError, TokenConstraints
from dualpath.spec.sampling import SamplingParams, TokenHistory
from dualpath.thread_names import named_threads

REFUSALS = (GrammarError, NoTokenError, ScoringError)
"""Failures of what a request asks for: no other engine or attempt would do better."""
GRAMMAR_THREADS = 2
"""So that a known grammar does not wait behind one that takes long."""


class Constrainer:
    """Makes the constraints of an engine's sequences."""

    def __init__(self, model: LoadedModel, path: str) -> None:
        self._grammars = Grammars(path, model.vocab_size, model.eos_token_ids)
        self._threads = named_threads(GRAMMAR_THREADS, "grammars")

    async def make(self, sampling: SamplingParams, history: TokenHistory | None) -> TokenConstraints | None:
        """Returns the constraints after `history`; None where the sampling has none. Raises GrammarError."""
        if not sampling.is_constrained:
            return None
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._make, sampling, history)

    def _make(self, sampling: SamplingParams, history: TokenHistory | None) -> TokenConstraints:
        matcher = self._grammars.matcher(sampling.grammar) if sampling.grammar else None
        return TokenConstraints(sampling, history, matcher)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
