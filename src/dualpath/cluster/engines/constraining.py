"""Makes what bends a sequence's draws, on threads of its own: a grammar may take seconds to compile."""

import threading
from collections.abc import Callable

from dualpath.cluster.attachment import Constrain, Forget, Owner, Reply
from dualpath.model import GrammarError, Grammars, LoadedModel, NoTokenError, ScoringError, TokenConstraints
from dualpath.thread_names import named_threads

REFUSALS = (GrammarError, NoTokenError, ScoringError)
"""Failures of what a request asks for: no other engine or attempt would do better."""
GRAMMAR_THREADS = 2
"""So that a known grammar does not wait behind one that takes long."""


class Constrainer:
    """Makes the constraints of an engine's attempts, and keeps each until it is used or forgotten."""

    def __init__(self, model: LoadedModel, path: str) -> None:
        self._grammars = Grammars(path, model.vocab_size, model.eos_token_ids)
        self._threads = named_threads(GRAMMAR_THREADS, "grammars")
        self._lock = threading.Lock()
        self._made: dict[Owner, TokenConstraints | None] = {}

    def make(self, asked: Constrain, answer: Callable[[Reply], None]) -> None:
        """Make what an attempt's draws are bent by, after its history; `answer` gets the reply, on another thread."""
        with self._lock:
            self._made[asked.owner] = None
        self._threads.submit(self._make, asked, answer)

    def made(self, owner: Owner) -> TokenConstraints | None:
        with self._lock:
            return self._made.get(owner)

    def take(self, owner: Owner) -> TokenConstraints | None:
        """As `made`, and forgets them."""
        with self._lock:
            return self._made.pop(owner, None)

    def forget(self, message: Forget) -> None:
        self.take(message.owner)

    def clear(self) -> None:
        with self._lock:
            self._made.clear()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _make(self, asked: Constrain, answer: Callable[[Reply], None]) -> None:
        try:
            matcher = self._grammars.matcher(asked.sampling.grammar) if asked.sampling.grammar else None
            constraints = TokenConstraints(asked.sampling, asked.history, matcher)
        except Exception as error:
            self.take(asked.owner)
            answer(Reply(asked.call, str(error) or repr(error), isinstance(error, REFUSALS)))
            return
        with self._lock:
            if asked.owner in self._made:  # else it was forgotten meanwhile
                self._made[asked.owner] = constraints
        answer(Reply(asked.call))
