"""Threads for long work: decoding one at a time; short texts never wait behind long ones, and long ones are few.

What keeps the interpreter lock, as decoding does, is not faster in more threads: each of them takes turns with the loop
(seven bodies of 12 MB in seven threads stalled it for 1.8 s at a time on two busy cores; in one, for a turn of it).
A tokenizer needs about 130 bytes of memory for each character while it works (seven texts of 12 MB: 11 GB), and up to
a second for 500,000. So texts of different lengths have threads and budgets of their own.
"""

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from dualpath.server.budget import Budget
from dualpath.server.limits import ServerLimits
from dualpath.thread_names import named_threads

T = TypeVar("T")

_SHORT_CHARACTERS = 32_000
"""A few hundredths of a second at most."""


_DECODING = named_threads(1, "decode")


async def decoding(work: Callable[[], T]) -> T:
    """Returns the result of `work`, which keeps the interpreter lock. Its callers bound how much of it waits."""
    return await asyncio.get_running_loop().run_in_executor(_DECODING, work)


class Lanes:
    """One per application. Used from one event loop."""

    def __init__(self, limits: ServerLimits) -> None:
        cores = len(os.sched_getaffinity(0))
        self._short = _Lane(2, "tokenise-short", limits)
        self._long = _Lane(max(1, cores // 2), "tokenise-long", limits)

    async def run(self, characters: int, work: Callable[[], T]) -> T:
        """Returns the result of `work` on so many characters. Raises ApiError (429) when too much waits."""
        return await (self._short if characters <= _SHORT_CHARACTERS else self._long).run(characters, work)


class _Lane:
    def __init__(self, threads: int, name: str, limits: ServerLimits) -> None:
        self._threads = named_threads(threads, name)
        self._budget = Budget(
            limits.max_tokenising_characters, limits.max_waiting, limits.tokenise_timeout_s, "long prompts"
        )

    async def run(self, characters: int, work: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        claim = await self._budget.claim(characters)
        running = self._threads.submit(work)

        def ended(_: object) -> None:  # also when nobody waits any more: the thread can't be stopped
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._budget.give_back, claim)

        running.add_done_callback(ended)
        return await asyncio.wrap_future(running)
