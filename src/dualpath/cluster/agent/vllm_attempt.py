"""An agent's record of one attempt on a vLLM server that prefills: its pages, what is computed, what moves."""

import asyncio
from collections import Counter, defaultdict
from typing import Any

from dualpath.cluster import messages as m
from dualpath.cluster.agent.prefill_attempt import PrefillAttempt
from dualpath.cluster.attachment import Owner
from dualpath.core.vocabulary import BLOCK_TOKENS, Side


class VllmAttempt(PrefillAttempt):
    """`pages` has one for each block of the prompt once it has started; before, those of its leg alone."""

    def __init__(self, owner: Owner, workers: int) -> None:
        super().__init__(owner)
        self.over = False
        """True once it is aborted or has failed: from then on nothing of it begins to move."""
        self.failure: Exception | None = None
        self.running: list[asyncio.Task[None]] = []
        """What brings in, ships and computes; empty before the workers have heard of it."""
        self.moving: set[asyncio.Future[int]] = set()
        """Transfers in progress."""
        self.ships: dict[int, asyncio.Task[None]] = {}
        """The newest of each layer; each waits for the one before, because two must not write the same range."""
        self.computed = asyncio.Event()
        """Set while all workers have computed the whole prompt."""
        self._computed = [0] * workers
        """Tokens by worker; it goes back when vLLM preempts a prompt and computes it again."""
        self._said: Counter[tuple[int, int]] = Counter()
        """How often a worker has saved blocks of a layer."""
        self._saving: Counter[tuple[int, int]] = Counter()
        """Workers that have saved, by layer and number of the time; without those that all have."""
        self._saved: defaultdict[int, set[int]] = defaultdict(set)
        """Blocks by layer."""

    @property
    def prompt(self) -> m.StartPrefill:
        assert self.start is not None
        return self.start

    @property
    def token_ids(self) -> list[int]:
        return self.prompt.hit_token_ids + self.prompt.miss_token_ids

    @property
    def prompt_tokens(self) -> int:
        return self.prompt.hit_tokens + len(self.prompt.miss_token_ids)

    @property
    def blocks(self) -> int:
        return -(-self.prompt_tokens // BLOCK_TOKENS)

    def read_by(self, side: Side) -> list[int]:
        """Returns the blocks that a side has read."""
        legs = [leg for leg in self.prompt.legs if leg.side is side]
        return [block for leg in legs for block in range(leg.first_block, leg.first_block + leg.blocks)]

    def stage(self, more: list[int]) -> None:
        """From now on it has a page for each block: those of its leg, and `more`."""
        first = self.leg.first_block if self.leg is not None else 0
        held, rest = dict(enumerate(self.pages, first)), iter(more)
        self.pages = [held[block] if block in held else next(rest) for block in range(self.blocks)]

    @property
    def unfinished(self) -> set[asyncio.Future[Any]]:
        """Transfers, and what ships, that have not ended."""
        found: set[asyncio.Future[Any]] = {*self.moving}
        return found | {ship for ship in self.ships.values() if not ship.done()}

    def end(self, failure: Exception | None = None) -> None:
        """It is aborted, or has failed; the first failure is kept."""
        if self.over:
            return
        self.over, self.failure = True, failure
        for part in self.running:
            part.cancel()

    def saved(self, rank: int, layer: int, blocks: range) -> bool:
        """A worker has saved its part of blocks. Returns True when all have: each does so equally often, in order."""
        time = (layer, self._said[rank, layer])
        self._said[rank, layer] += 1
        self._saving[time] += 1
        if self._saving[time] < len(self._computed):
            return False
        del self._saving[time]
        self._saved[layer].update(blocks)
        return True

    def unsaved(self, layers: int) -> list[tuple[int, int]]:
        """Returns a layer and a block for each block that the engine should have saved there, and has not."""
        computed = range(self.prompt.hit_tokens // BLOCK_TOKENS, self.blocks)
        return [(layer, block) for layer in range(layers) for block in computed if block not in self._saved[layer]]

    def step_saved(self, rank: int, tokens: int) -> None:
        self._computed[rank] = tokens
        if min(self._computed) >= self.prompt_tokens:
            self.computed.set()
        else:
            self.computed.clear()
