"""Prompts on a vLLM server that prefills: staged in pages of ours, computed there, shipped layer by layer (paper §4.1).

An attempt's life here: perhaps `LoadLeg` → `StartPrefill`: it gets a page for each block of the prompt, and the workers
are told of them (`Expect`). Three things then go on at once. Hit KV that the decode side has read is pulled into the
pages, layer by layer, and the workers are told how far it is (`LayersReady`). The prompt is posted to the server, whose
connector takes hit KV from the pages, and puts into them what each step has computed (`LayerSaved`); that is written
into the decode engine's pages at once. And the blocks that this side has read are shipped. When all that is done, the
pages are free, and `PrefillDone` goes out.

**When pages are free.** After a prompt that went well: every worker has said that the last step is over (`StepSaved`),
the server has answered, and every write is acknowledged. Otherwise: each worker has said `Quiet`, and transfers have
ended. A worker that does not say it ends its engine, whose whole buffer then goes.
"""

import asyncio
import time
from functools import partial

from dualpath.cluster import messages as m
from dualpath.cluster import vllm_attachment as v
from dualpath.cluster.agent.host import EngineHost
from dualpath.cluster.agent.layer_transfers import TRANSFER_DEADLINE_NS
from dualpath.cluster.agent.prefill_attempts import TRANSFER_ERRORS, PrefillAttempts
from dualpath.cluster.agent.vllm_attempt import VllmAttempt
from dualpath.cluster.agent.vllm_client import VllmAnswerError
from dualpath.cluster.agent.vllm_engine import VllmEngine
from dualpath.cluster.attachment import Owner
from dualpath.core.vocabulary import Side
from dualpath.spec import metrics
from dualpath.thread_names import named_threads
from dualpath.transfer.pool import Bytes
from dualpath.transfer.transport import PageRange, TransferCause, TransferError

MAX_MOVING = 32
"""Transfers of an engine that are in progress at once: half of what a channel takes."""
LAYERS_AHEAD = 3
"""Layers of a prompt that are pulled at once."""
SHIPPED_AT_ONCE_BYTES = 64 * 2**20
"""Of whole blocks."""
SAVED_S = 30.0
"""How long after the server's answer workers may take to say what they have saved."""
QUIET_S = 60.0
"""How long a worker may take to let go of an attempt's pages."""


class VllmPrefillWorker(PrefillAttempts[VllmAttempt]):
    """Of a vLLM server's engine."""

    def __init__(self, host: EngineHost, engine: VllmEngine) -> None:
        super().__init__(host)
        self._engine = engine
        self._copies = named_threads(1, "copies")
        """It waits for the CNIC, which lets hit KV through to the device."""
        self._slots = asyncio.Semaphore(MAX_MOVING)

    def _new(self, owner: Owner) -> VllmAttempt:
        return VllmAttempt(owner, len(self._engine.workers))

    def _interrupt(self, attempt: VllmAttempt) -> None:
        attempt.end()

    @property
    def _owed(self) -> bool:
        return self._engine.dropping

    async def _prefill(self, attempt: VllmAttempt, message: m.StartPrefill) -> None:
        error = await self._channels.open(message.decode_address)
        if error is None and not attempt.aborted:
            attempt.stage(self._host.pool.allocate(attempt.owner, attempt.blocks - len(attempt.pages)))
            error = await self._run(attempt)
            if error is None and not attempt.aborted:
                self._engine.drop(attempt.owner)
                self._host.counters[metrics.PREFILL_TOKENS()] += len(message.miss_token_ids)
                self._give_back(attempt)
                self._host.send(m.PrefillDone(*attempt.owner, None))
                return
        if error is not None and not attempt.aborted:
            self._fail(attempt, error)
        await self._let_go(attempt)
        attempt.busy = False
        if attempt.aborted:
            self._release(attempt)

    async def _run(self, attempt: VllmAttempt) -> Exception | None:
        """Bring in, compute and ship, all at once. Returns what has failed; None, too, when it was aborted."""
        prompt = attempt.prompt
        self._engine.tell(v.Expect(attempt.owner, attempt.pages, prompt.hit_tokens, attempt.prompt_tokens))
        parts = [
            asyncio.create_task(part)
            for part in (self._bring_in(attempt), self._ship_legs(attempt), self._compute(attempt))
        ]
        attempt.running = parts
        try:
            await asyncio.wait(parts, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for part in parts:
                part.cancel()
            outcomes = await asyncio.gather(*parts, return_exceptions=True)
        for error in outcomes:
            if isinstance(error, Exception):
                if not isinstance(error, (VllmAnswerError, *TRANSFER_ERRORS)):
                    raise error
                attempt.end(error)
        attempt.over = True
        return attempt.failure

    async def _let_go(self, attempt: VllmAttempt) -> None:
        """When this ends, nothing touches the attempt's pages, and nothing of it is on its way to the decode engine."""
        attempt.over = True
        if attempt.running:
            try:
                async with asyncio.timeout(QUIET_S):
                    await self._engine.drop(attempt.owner)
            except TimeoutError:  # an error of this member, and its end
                raise RuntimeError(f"a worker did not let go of pages within {QUIET_S:.0f} s") from None
        while moving := attempt.unfinished:
            await asyncio.wait(moving)

    # ── hit KV ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _bring_in(self, attempt: VllmAttempt) -> None:
        """Pull what the decode side has read, let the hit KV through the CNIC, and tell how many layers there are."""
        prompt, layout, loop = attempt.prompt, self._host.layout, asyncio.get_running_loop()
        pulled, hit_bytes = attempt.read_by(Side.DE), [prompt.hit_tokens * row for row in layout.row_bytes]
        if not prompt.hit_tokens:
            return
        at_once = 1 if pulled or self._host.config.cluster.cnic_rate is not None else layout.layers
        pulls: list[asyncio.Task[None]] = []
        try:
            for layer in range(0, layout.layers, at_once):
                pulls += [
                    asyncio.create_task(self._move_layer(attempt, ahead, pulled, write=False))
                    for ahead in range(len(pulls), min(layer + LAYERS_AHEAD, layout.layers) if pulled else 0)
                ]
                if pulls:
                    await pulls[layer]
                n_bytes = sum(hit_bytes[layer : layer + at_once])
                await loop.run_in_executor(self._copies, self._host.traffic.local_copy, n_bytes)
                self._engine.tell(v.LayersReady(attempt.owner, layer + at_once))
        finally:
            for pull in pulls:
                pull.cancel()
            await asyncio.gather(*pulls, return_exceptions=True)

    async def _ship_legs(self, attempt: VllmAttempt) -> None:
        """Write the blocks that this side has read into the decode engine's pages."""
        block_bytes = self._host.layout.full_block_bytes
        blocks, at_once = attempt.read_by(Side.PE), max(1, SHIPPED_AT_ONCE_BYTES // block_bytes)
        for first in range(0, len(blocks), at_once):
            await self._move(attempt, blocks[first : first + at_once], (0, block_bytes), write=True)

    # ── computing ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def _compute(self, attempt: VllmAttempt) -> None:
        """Have the prompt computed. Ends when its KV is at the decode engine. Raises VllmAnswerError."""
        await self._engine.server.prefill(attempt.owner, attempt.token_ids, attempt.prompt.hit_tokens)
        try:
            async with asyncio.timeout(SAVED_S):
                await attempt.computed.wait()
        except TimeoutError:
            raise VllmAnswerError(f"its workers did not save the prompt within {SAVED_S:.0f} s of the answer") from None
        unsaved = attempt.unsaved(self._host.layout.layers)
        if unsaved:
            layer, block = unsaved[0]
            raise VllmAnswerError(
                f"its workers did not save block {block} of layer {layer}: start it with --no-enable-prefix-caching"
            )
        await asyncio.gather(*attempt.ships.values())

    def on_told(self, rank: int, told: v.Told) -> None:
        """A worker has saved something. What it says of attempts that are over, or not of this kind, is dropped."""
        match told:
            case v.LayerSaved():
                for saved in told.saved:
                    self._on_saved(rank, told.layer, saved)
            case v.StepSaved():
                self._host.counters[metrics.PREFILL_BATCHES()] += not rank
                self._host.counters[metrics.PREFILL_CHUNKS()] += len(told.computed) * (not rank)
                for owner, tokens in told.computed:
                    attempt = self._attempts.get(owner)
                    if attempt is not None and attempt.running:
                        attempt.step_saved(rank, tokens)
            case _:
                self._host.counters[metrics.ENGINE_STALE_MESSAGES()] += 1

    def _on_saved(self, rank: int, layer: int, saved: v.Saved) -> None:
        attempt = self._attempts.get(saved.owner)
        if attempt is None or not attempt.running or attempt.over:
            return
        blocks = range(saved.first_block, saved.first_block + saved.blocks)
        if layer >= self._host.layout.layers or blocks.stop > attempt.blocks:
            attempt.end(
                VllmAnswerError(f"worker {rank} says it saved {saved} of layer {layer}, which is not the prompt's")
            )
        elif attempt.saved(rank, layer, blocks):
            shipping = self._ship(attempt, layer, list(blocks), attempt.ships.get(layer))
            attempt.ships[layer] = self._host.spawn(shipping)

    async def _ship(
        self, attempt: VllmAttempt, layer: int, blocks: list[int], before: "asyncio.Task[None] | None"
    ) -> None:
        if before is not None:
            await asyncio.wait([before])
        if attempt.over:
            return
        try:
            await self._move_layer(attempt, layer, blocks, write=True)
        except TRANSFER_ERRORS as error:
            attempt.end(error)

    # ── transfers ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def _move_layer(self, attempt: VllmAttempt, layer: int, blocks: list[int], *, write: bool) -> None:
        await self._move(attempt, blocks, self._host.layout.layer_range(layer), write=write)

    async def _move(self, attempt: VllmAttempt, blocks: list[int], part: tuple[int, int], *, write: bool) -> None:
        """Write a part of blocks, ``(first byte, end)``, from our pages into the decode engine's, or read them.

        Raises one of `TRANSFER_ERRORS`. A transfer can't be cancelled: `attempt.moving` has it until it has ended.
        """
        start, stop = part
        ranges = [PageRange(attempt.prompt.decode_pages[block], start, stop - start) for block in blocks]
        local: list[Bytes] = [self._host.pool.view(attempt.pages[block])[start:stop] for block in blocks]
        await self._slots.acquire()
        try:
            channel = self._channels.get(attempt.prompt.decode_address)
            if channel is None or attempt.over:
                raise ConnectionError("no channel to the decode engine")
            verb = channel.write if write else channel.read
            moved = asyncio.wrap_future(verb(ranges, local, time.monotonic_ns() + TRANSFER_DEADLINE_NS))
        except BaseException:
            self._slots.release()
            raise
        attempt.moving.add(moved)
        moved.add_done_callback(partial(self._moved, attempt, write))
        await asyncio.shield(moved)

    def _moved(self, attempt: VllmAttempt, write: bool, moved: "asyncio.Future[int]") -> None:
        attempt.moving.discard(moved)
        self._slots.release()
        error = moved.exception()
        # A connection that has ended delivers nothing more; over an open one the rest may still be on its way.
        if write and isinstance(error, TransferError) and error.cause is not TransferCause.PEER_CLOSED:
            attempt.quiet = False

    def close(self) -> None:
        """Blocks until transfers in progress have ended."""
        super().close()
        self._copies.shutdown(wait=True, cancel_futures=True)
