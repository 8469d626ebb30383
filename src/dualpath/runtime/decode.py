"""The decode engine: DE buffer, device memory taken late, continuous batching, persisting as blocks fill (paper §4.1).

An attempt's life here: `PrepareDecode` (pages for the whole prompt) → perhaps `LoadLeg` (its SNIC reads hit blocks) →
the prefill engine pulls and puts layers through the data server → `StartDecode`: device blocks are taken, every Full
Block is copied in, pages that hold nothing new are given back, generation begins → prompt blocks that were computed
are written to storage from the buffer, generated ones from the device as each fills → when tokens and writes are done,
`Finished`.

`AbortAttempt` stops generation but lets complete blocks reach storage, so that an agent which stopped reading early
still finds its prefix next turn.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dualpath.core.vocabulary import BLOCK_TOKENS, Cause, Side
from dualpath.engine import DecodeEngine, LoadedModel, StepOutput
from dualpath.kv.keys import BlockKey, Namespace, block_keys
from dualpath.kv.store import StoreWriteError
from dualpath.runtime import messages as m
from dualpath.runtime.draws import draw_message
from dualpath.runtime.engine_host import EngineHost, Owner


class DecodeAttempt:
    """What the DE holds of one attempt."""

    def __init__(self, owner: Owner, sequence: int, message: m.PrepareDecode, pages: list[int]) -> None:
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
        self.reading = False
        self.entered: asyncio.Task[None] | None = None
        self.admitted = False
        self.finish_reason: str | None = None
        self.aborted = False
        self.to_persist: asyncio.Queue[int | None] = asyncio.Queue()
        """Generated blocks that are full, then None. Bounded by the attempt's device blocks."""
        self.queued_blocks = 0
        self.storing = True
        """False once a write has failed: later blocks could not be reached anyway."""


class DecodeWorker:
    """Handles the coordinator's messages on the main thread; steps on the compute thread, copies on another."""

    def __init__(self, host: EngineHost, model: LoadedModel, hbm_blocks: int) -> None:
        self._host = host
        self._engine = DecodeEngine(model, hbm_blocks)
        self._copies = ThreadPoolExecutor(1, thread_name_prefix="copies")
        self._attempts: dict[Owner, DecodeAttempt] = {}
        self._by_sequence: dict[int, DecodeAttempt] = {}
        self._next_sequence = 0
        self._joined: set[int] = set()
        self._work = asyncio.Event()
        host.gauge_sources.append(self._gauges)
        host.spawn(self._run_steps())

    def handle(self, message: m.ToEngine) -> None:
        match message:
            case m.PrepareDecode():
                self._prepare(message)
            case m.LoadLeg():
                self._host.spawn(self._load(message))
            case m.StartDecode():
                attempt = self._attempts[message.request, message.attempt]
                attempt.entered = self._host.spawn(self._decode(attempt, message))
            case m.AbortAttempt():
                self._host.spawn(self._abort(message))
            case m.PeerLost():
                self._host.server.quiesce(str(message.engine), disconnect=True)
            case _:
                raise TypeError(f"a decode engine was sent {type(message).__name__}")

    # ── before decoding ─────────────────────────────────────────────────────────────────────────────────────────────

    def _prepare(self, message: m.PrepareDecode) -> None:
        owner = (message.request, message.attempt)
        pages = self._host.pool.allocate(owner, -(-message.prompt_tokens // BLOCK_TOKENS))
        attempt = DecodeAttempt(owner, self._next_sequence, message, pages)
        self._next_sequence += 1
        self._attempts[owner] = attempt
        self._host.send(m.Prepared(*owner, pages))

    async def _load(self, message: m.LoadLeg) -> None:
        attempt = self._attempts[message.request, message.attempt]
        leg = message.leg
        pages = [attempt.pages[block] for block in range(leg.first_block, leg.first_block + leg.blocks)]
        attempt.reading = True
        faults = await self._host.read_leg(message.namespace, message.keys, pages, lambda: attempt.aborted)
        attempt.reading = False
        if attempt.aborted:
            self._release(attempt)
        elif faults:
            self._host.send(m.LoadFailed(*attempt.owner, Side.DE, faults))
        else:
            self._host.send(m.Loaded(*attempt.owner, Side.DE))

    # ── decoding ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _decode(self, attempt: DecodeAttempt, message: m.StartDecode) -> None:
        """From a complete DE buffer to nothing held: device copy, generation and persisting, then `Finished`."""
        loop = asyncio.get_running_loop()
        attempt.tail_token_ids = [*message.tail_token_ids, message.draw.token_id]
        self._by_sequence[attempt.sequence] = attempt
        self._engine.admit(
            attempt.sequence,
            prompt_tokens=attempt.prompt_tokens,
            first_token=message.draw.token_id,
            sampling=message.sampling,
            generated_so_far=message.generated_tokens,
        )
        attempt.admitted = True
        await loop.run_in_executor(self._copies, self._fill, attempt)
        computed = range(attempt.hit_blocks, len(attempt.keys))
        self._free_pages(attempt, [block for block in attempt.pages if block not in computed])
        if not attempt.aborted:
            reason = self._engine.join(attempt.sequence)
            if reason is not None:
                self._end(attempt, reason)
            else:
                self._joined.add(attempt.sequence)
                self._work.set()
        await self._persist_prompt(attempt, computed)
        await self._persist_generated(attempt)
        await loop.run_in_executor(self._copies, self._engine.release, attempt.sequence)
        self._finish(attempt)

    def _fill(self, attempt: DecodeAttempt) -> None:
        """On the copying thread: DE buffer → device, one Full Block after the other, through the CNIC."""
        layout = self._host.layout
        for block, page in attempt.pages.items():
            tokens = min(BLOCK_TOKENS, attempt.prompt_tokens - block * BLOCK_TOKENS)
            self._host.traffic.local_copy(layout.layers * tokens * layout.token_bytes)
            self._engine.fill_block(attempt.sequence, block, self._page(page), tokens)

    def _page(self, page: int) -> np.ndarray:
        return self._host.pool.view(page)[: self._host.layout.full_block_bytes]

    async def _run_steps(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._work.wait()
            if not self._joined:
                self._work.clear()
                continue
            try:
                outputs = await loop.run_in_executor(self._host.compute, self._engine.step)
            except Exception as error:  # the batch's own failure: each of its requests learns of it
                for sequence in sorted(self._joined):
                    self._fail(self._by_sequence[sequence], error)
            else:
                self._on_step(outputs)

    def _on_step(self, outputs: list[StepOutput]) -> None:
        self._host.counters["decode_steps"] += 1
        step = []
        for output in outputs:
            attempt = self._by_sequence[output.sequence]
            if attempt.finish_reason is not None:
                continue  # ended while the step ran
            if output.draw is None:
                self._fail(attempt, output.error)
                continue
            step.append(m.StepTokens(*attempt.owner, draw_message(output.draw)))
            attempt.tail_token_ids.append(output.draw.token_id)
            self._queue_full_blocks(attempt)
            if output.finish_reason is not None:
                self._end(attempt, output.finish_reason)
        self._host.counters["decode_tokens"] += len(step)
        if step:
            self._host.send(m.Tokens(step))

    def _fail(self, attempt: DecodeAttempt, error: Exception | None) -> None:
        """The attempt generates nothing more; what it holds stays until it is aborted."""
        self._joined.discard(attempt.sequence)
        self._host.log(f"request {attempt.owner[0]} attempt {attempt.owner[1]} failed: {error!r}")
        self._host.send(m.AttemptFailed(*attempt.owner, Cause.COMPUTE_FAILED, repr(error)))

    def _queue_full_blocks(self, attempt: DecodeAttempt) -> None:
        """Blocks that this step filled are persisted at once (paper §4.1). The newest token's KV does not exist yet."""
        while len(attempt.tail_token_ids) > BLOCK_TOKENS:
            parent = attempt.keys[-1] if attempt.keys else attempt.space.root
            attempt.keys += block_keys(parent, attempt.tail_token_ids[:BLOCK_TOKENS])
            del attempt.tail_token_ids[:BLOCK_TOKENS]
            attempt.to_persist.put_nowait(len(attempt.keys) - 1)

    def _end(self, attempt: DecodeAttempt, reason: str) -> None:
        if attempt.finish_reason is None:
            attempt.finish_reason = reason
            self._joined.discard(attempt.sequence)
            attempt.to_persist.put_nowait(None)

    # ── persisting ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def _persist_prompt(self, attempt: DecodeAttempt, computed: range) -> None:
        """Prompt blocks computed by the prefill engine: from the DE buffer, in order, each page freed when written."""
        for block in computed:
            await self._write(attempt, block, self._page(attempt.pages[block]))
            self._free_pages(attempt, [block])

    async def _persist_generated(self, attempt: DecodeAttempt) -> None:
        staging = np.empty(self._host.layout.full_block_bytes, dtype=np.uint8)
        loop = asyncio.get_running_loop()
        while (block := await attempt.to_persist.get()) is not None:
            await loop.run_in_executor(self._copies, self._engine.copy_block, attempt.sequence, block, staging)
            self._host.traffic.local_copy(staging.nbytes)
            await self._write(attempt, block, staging)

    async def _write(self, attempt: DecodeAttempt, block: int, payload: np.ndarray) -> None:
        """Buffer → storage over this engine's SNIC; reported as stored only when durable and verified."""
        if not attempt.storing:
            return
        key = attempt.keys[block]
        parent = attempt.keys[block - 1] if block else attempt.space.root
        store = self._host.store(attempt.space)
        loop = asyncio.get_running_loop()
        try:
            physical_bytes = await loop.run_in_executor(
                self._host.block_writes, store.write, key, parent, payload, self._host.pace_write
            )
        except StoreWriteError as error:
            # Serving goes on without this prefix in storage; the counter and the log say so.
            attempt.storing = False
            self._host.counters["store_write_errors"] += 1
            self._host.log(f"block {key.hex()} could not be stored: {error}")
            return
        self._host.send(m.Stored([m.StoredBlock(key, parent, physical_bytes)]))

    # ── giving back ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _finish(self, attempt: DecodeAttempt) -> None:
        del self._by_sequence[attempt.sequence]
        del self._attempts[attempt.owner]
        if attempt.aborted:
            self._host.send(m.Released(*attempt.owner))
        else:
            assert attempt.finish_reason is not None
            self._host.send(m.Finished(*attempt.owner, attempt.finish_reason))

    async def _abort(self, message: m.AbortAttempt) -> None:
        """The prefill engine has stopped (its word, or its death) before this message is sent."""
        owner = (message.request, message.attempt)
        attempt = self._attempts.get(owner)
        if attempt is None:
            self._host.send(m.Released(*owner))
            return
        attempt.aborted = True
        if attempt.entered is not None:
            self._end(attempt, "abort")  # `_decode` goes on to persist what is complete and then releases
            return
        if message.lost_peer is not None:
            await asyncio.wrap_future(self._host.server.quiesce(str(message.lost_peer), disconnect=True))
        if not attempt.reading:
            self._release(attempt)

    def _release(self, attempt: DecodeAttempt) -> None:
        self._host.pool.free(attempt.owner, list(attempt.pages.values()))
        del self._attempts[attempt.owner]
        self._host.send(m.Released(*attempt.owner))

    def _free_pages(self, attempt: DecodeAttempt, blocks: list[int]) -> None:
        if not blocks:
            return
        self._host.pool.free(attempt.owner, [attempt.pages.pop(block) for block in blocks])
        self._host.send(m.BufferFreed(*attempt.owner, len(blocks)))

    def _gauges(self) -> dict[str, float]:
        return {
            "dualpath_engine_attempts": float(len(self._attempts)),
            "dualpath_hbm_free_blocks": float(self._engine.free_blocks),
            "dualpath_decode_running_requests": float(len(self._joined)),
        }

    def close(self) -> None:
        self._copies.shutdown(wait=True, cancel_futures=True)
