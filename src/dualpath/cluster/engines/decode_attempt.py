"""What a decode engine holds of one attempt."""

import asyncio

from dualpath.cluster.engines.host import Owner
from dualpath.cluster.messages import PrepareDecode
from dualpath.core.vocabulary import BLOCK_TOKENS
from dualpath.kv.keys import BlockKey, Namespace, block_keys


class DecodeAttempt:
    """Pages of the DE buffer, keys of the blocks so far, and how far the attempt has come."""

    def __init__(self, owner: Owner, sequence: int, message: PrepareDecode, pages: list[int]) -> None:
        self.owner = owner
        self.sequence = sequence
        self.prompt_tokens = message.prompt_tokens
        self.hit_blocks = message.hit_tokens // BLOCK_TOKENS
        self.space: Namespace = message.namespace
        self.keys: list[BlockKey] = list(message.keys)
        """Of every full block so far; grows as generated blocks fill."""
        self.tail_token_ids: list[int] = []
        """Tokens after the last full block, KV known or about to be."""
        self.pages: dict[int, int] = dict(enumerate(pages))
        """Block → page of the DE buffer, while held."""
        self.loading: asyncio.Task[None] | None = None
        self.entered: asyncio.Task[None] | None = None
        """From `StartDecode` on: the task that will give everything back."""
        self.finish_reason: str | None = None
        self.aborted = False
        self.to_persist: asyncio.Queue[int | None] = asyncio.Queue()
        """Generated blocks that are full, then None. Bounded by the attempt's device blocks."""
        self.storing = True
        """False once a write has failed, as later blocks could not be reached, or once the KV is in doubt."""

    def add_token(self, token_id: int) -> None:
        """A token was generated. The block it completes the step for is persisted at once (paper §4.1); the newest
        token's own KV does not exist yet.
        """
        self.tail_token_ids.append(token_id)
        while len(self.tail_token_ids) > BLOCK_TOKENS:
            parent = self.keys[-1] if self.keys else self.space.root
            self.keys += block_keys(parent, self.tail_token_ids[:BLOCK_TOKENS])
            del self.tail_token_ids[:BLOCK_TOKENS]
            self.to_persist.put_nowait(len(self.keys) - 1)

    def end(self, reason: str) -> None:
        """Nothing more is generated. The first reason stays."""
        if self.finish_reason is None:
            self.finish_reason = reason
            self.to_persist.put_nowait(None)
