"""Checks grammars before they reach an engine, in a process of their own, and remembers the last ones."""

import asyncio
import functools
import json
import re
import select
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from dualpath.server.errors import ApiError
from dualpath.thread_names import named_threads

T = TypeVar("T")

MAX_GRAMMAR_CHARACTERS = 2**18
_REMEMBERED = 128
_ANSWER_TIMEOUT_S = 60.0
"""The process ends itself long before, unless it gets no CPU."""
_TURN_TIMEOUT_S = 30.0
_WAITING = 4
"""Threads: one compiles, others answer for grammars that are known. They are nobody else's, who would wait too."""
_WORKER = Path(__file__).parent / "grammar_worker.py"
_MAX_REASON_CHARACTERS = 500
_PLACE = re.compile(r"\A.*failed to compile JSON schema: |\A[^\n]*?\d+\(\d+\): ")
_NOT_FOR_CLIENTS = re.compile(r"\n +\d+ \| .*|\n\s*\^+(?=\n)|<non-verbose/>", re.DOTALL)
"""The listing of our grammar's text, the marks under a pattern, llguidance's own marks."""


class GrammarError(ValueError):
    """A grammar that can't be compiled; the message says why."""


def readable(message: str) -> str:
    """Returns what llguidance says in one bounded line, without the places in a text that the client never saw."""
    line = " ".join(_PLACE.sub("", _NOT_FOR_CLIENTS.sub("", message)).split())
    return line if len(line) <= _MAX_REASON_CHARACTERS else f"{line[:_MAX_REASON_CHARACTERS]}…"


class GrammarChecker:
    """Compiles grammars for one model's vocabulary, one at a time, in a process that starts at the first one."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._process: subprocess.Popen[str] | None = None
        self._end: Callable[[], Any] = lambda: None
        self._turn = threading.Lock()
        self._threads = named_threads(_WAITING, "grammars")
        self._why_not = functools.lru_cache(_REMEMBERED)(self._compile)
        self._special_tokens: dict[str, int] = {}

    async def start(self) -> None:
        """Learn the special tokens, which `split` needs. Raises GrammarError where the model can have no grammars."""
        if not self._special_tokens:
            await self._beside(self._in_turn, lambda: None)

    async def check(self, grammar: str) -> None:
        """Raises GrammarError, or ApiError (429) when many others are being checked."""
        if len(grammar) > MAX_GRAMMAR_CHARACTERS:
            raise GrammarError(f"it is longer than {MAX_GRAMMAR_CHARACTERS} characters")
        if why_not := await self._beside(self._why_not, grammar):
            raise GrammarError(why_not)

    def split(self, text: str) -> list[tuple[str, int | None]]:
        """Splits `text` into ordinary text and special tokens (`grammars.SpecialTokens`)."""
        special = self._special_tokens
        pattern = "(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")"
        return [(part, special.get(part)) for part in (re.split(pattern, text) if special else [text]) if part]

    def close(self) -> None:
        """End the process. A grammar that is being compiled is then too much."""
        self._end()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _beside(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    # ── the process; a thread at a time ─────────────────────────────────────────────────────────────────────────────

    def _compile(self, grammar: str) -> str:
        """Returns why `grammar` can't be compiled, or nothing."""
        message = self._in_turn(lambda: self._answer(grammar))
        if message is None:
            return "it takes too much time or memory to compile; make it simpler"
        return readable(message)

    def _in_turn(self, work: Callable[[], Any]) -> Any:
        if not self._turn.acquire(timeout=_TURN_TIMEOUT_S):
            raise ApiError(429, "too many grammars are being compiled; try again", code="overloaded", retry_after_s=5)
        try:
            if self._process is None or self._process.poll() is not None:
                self._start()
            return work()
        finally:
            self._turn.release()

    def _start(self) -> None:
        if getattr(self._tokenizer, "backend_tokenizer", None) is None:
            raise GrammarError("this model's tokenizer has no fast form, which grammars need")
        self._process = subprocess.Popen(
            [sys.executable, str(_WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        self._end = weakref.finalize(self, _end, self._process)
        added = self._tokenizer.get_added_vocab()
        given = {
            "tokenizer": self._tokenizer.backend_tokenizer.to_str(),
            "vocab_size": max(self._vocab_size, len(self._tokenizer)),
            "added": list(added.values()),
        }
        special = self._answer(given)
        if special is None:
            raise ApiError(503, "grammars can't be compiled; the server's log says why", code="grammars_unavailable")
        self._special_tokens = {text: token for text, token in added.items() if token in special}

    def _answer(self, question: Any) -> Any:
        """Returns the process's answer; None: it is gone."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], _ANSWER_TIMEOUT_S)
            line = process.stdout.readline() if ready else ""
        except (BrokenPipeError, ValueError):  # it has ended, or is being ended
            line = ""
        if not line:
            self._process = None
            self._end()
            return None
        return json.loads(line)


def _end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate()
