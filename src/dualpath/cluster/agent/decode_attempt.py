"""A decode engine's record of one attempt, and how the attempt's new KV reaches storage (paper §4.1).

Prompt blocks are written from the DE buffer; generated blocks from a staging page, into which the engine copies each as
it fills. A block is reported as stored only when it is durable and verified, and after its parent.
"""

import asyncio
from concurrent.futures import Executor

import numpy as np

from dualpath.cluster import messages as m
from dualpath.cluster.agent.host import EngineHost
from dualpath.cluster.attachment import CopyOut, Owner
from dualpath.cluster.messages import PrepareDecode
from dualpath.core.vocabulary import BLOCK_TOKENS
from dualpath.kv import StoreError
from dualpath.kv.keys import BlockKey, Namespace, block_keys
from dualpath.spec import metrics


class DecodeAttempt:
    """The attempt's pages of the DE buffer, the keys of its blocks so far, and its progress."""

    def __init__(self, owner: Owner, sequence: int, message: PrepareDecode, pages: list[int]) -> None:
        self.owner = owner
        self.sequence = sequence
        self.prompt_tokens = message.prompt_tokens
        self.hit_blocks = message.hit_tokens // BLOCK_TOKENS
        self.space: Namespace = message.namespace
        self.keys: list[BlockKey] = list(message.keys)
        """Keys of all full blocks so far; grows as generated blocks fill."""
        self.block_token_ids: dict[int, list[int]] = {}
        """Tokens of generated blocks that are not stored yet."""
        self.tail_token_ids: list[int] = []
        """Tokens after the last full block, including the newest, whose KV does not exist yet."""
        self.pages: dict[int, int] = dict(enumerate(pages))
        """Block → page of the DE buffer, for the pages still held."""
        self.loading: asyncio.Task[None] | None = None
        self.entered: asyncio.Task[None] | None = None
        """The task that will free everything; set at `StartDecode`."""
        self.finish_reason: str | None = None
        self.aborted = False
        self.to_persist: asyncio.Queue[int | None] = asyncio.Queue()
        """Generated blocks that are full, then None at the end. Bounded by the attempt's device blocks."""
        self.storing = True
        """False once a write has failed, because later blocks could not be matched, or once the KV may be damaged."""

    def add_token(self, token_id: int) -> None:
        """Add a generated token. If its step has filled a block, that block is persisted at once (paper §4.1). The
        newest token's own KV does not exist yet.
        """
        self.tail_token_ids.append(token_id)
        while len(self.tail_token_ids) > BLOCK_TOKENS:
            parent = self.keys[-1] if self.keys else self.space.root
            token_ids, self.tail_token_ids = self.tail_token_ids[:BLOCK_TOKENS], self.tail_token_ids[BLOCK_TOKENS:]
            self.block_token_ids[len(self.keys)] = token_ids
            self.keys += block_keys(parent, token_ids)
            self.to_persist.put_nowait(len(self.keys) - 1)

    def end(self, reason: str) -> None:
        """End generation. The first reason given is kept."""
        if self.finish_reason is None:
            self.finish_reason = reason
            self.to_persist.put_nowait(None)


class Persister:
    """Writes each attempt's blocks in order, and several attempts concurrently."""

    def __init__(self, host: EngineHost, copies: Executor) -> None:
        self._host = host
        self._copies = copies

    async def block_in_buffer(self, attempt: DecodeAttempt, block: int) -> None:
        """Write a prompt block that the prefill engine computed, from its page of the DE buffer."""
        await self._write(attempt, block, attempt.pages[block])

    async def generated_blocks(self, attempt: DecodeAttempt) -> None:
        """Write each generated block as it fills, until the attempt has no more. Raises EngineGoneError."""
        while (block := await attempt.to_persist.get()) is not None:
            if not attempt.storing:
                continue
            page = await self._host.staging.get()
            try:
                if await self._copy_out(attempt, block, page):
                    await self._write(attempt, block, page)
            finally:
                self._host.staging.put_nowait(page)

    async def _copy_out(self, attempt: DecodeAttempt, block: int, page: int) -> bool:
        """Have the engine copy a block from the device into a page, through the CNIC. Returns False if it can't."""
        n_bytes = self._host.layout.full_block_bytes
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._copies, self._host.traffic.local_copy, n_bytes)
        reply = await self._host.attached.call(lambda call: CopyOut(call, attempt.sequence, block, page))
        if reply.error:
            attempt.storing = False
            self._host.log(f"block {block} of request {attempt.owner[0]} could not be copied: {reply.error}")
        return not reply.error

    async def _write(self, attempt: DecodeAttempt, block: int, page: int) -> None:
        if not attempt.storing:
            return
        key = attempt.keys[block]
        parent = attempt.keys[block - 1] if block else attempt.space.root
        payload: np.ndarray = self._host.pool.view(page)[: self._host.layout.full_block_bytes]
        try:
            physical_bytes = await self._host.blocks.write(attempt.space, key, parent, payload)
        except StoreError as error:
            # Serving continues without this prefix in storage; the counter and the log record it.
            attempt.storing = False
            self._host.counters[metrics.STORE_WRITE_ERRORS()] += 1
            self._host.log(f"block {key.hex()} could not be stored: {error}")
            return
        if attempt.storing:  # a step may have failed while this block was written
            token_ids = attempt.block_token_ids.pop(block, [])
            space = attempt.space
            stored = m.StoredBlock(space.root, key, parent, physical_bytes, space.salted, token_ids)
            self._host.send(m.Stored([stored]))
