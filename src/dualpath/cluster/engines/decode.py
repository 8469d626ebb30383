"""The decode engine: DE buffer, device memory taken late, continuous batching, persisting as blocks fill (paper §4.1).

An attempt's life here: `PrepareDecode` (pages for the whole prompt) → perhaps `LoadLeg` (its SNIC reads hit blocks) →
the prefill engine pulls and puts layers through the data server → `StartDecode`: the engine takes device blocks, copies
every Full Block in, frees the pages that need no persisting, and generates → it writes computed prompt blocks to
storage from the buffer, generated ones from the device as each fills → after the last token and write, `Finished`.

`AbortAttempt` stops generation but lets complete blocks reach storage, so that an agent which stopped reading early
still finds its prefix next turn. Only one task frees an attempt's pages: `_decode` once it runs, `_abort` before.
"""

import asyncio

from dualpath.cluster import messages as m
from dualpath.cluster.engines.constraining import REFUSALS, Constrainer
from dualpath.cluster.engines.decode_attempt import DecodeAttempt, Persister
from dualpath.cluster.engines.host import EngineHost, Owner
from dualpath.core.vocabulary import BLOCK_TOKENS, Cause, EngineId, Side
from dualpath.kv import StoreError
from dualpath.model import GrammarError, LoadedModel, PagedDecode, StepOutput
from dualpath.spec import metrics
from dualpath.spec.metrics import Figures
from dualpath.spec.sampling import SamplingParams
from dualpath.thread_names import named_threads

QUIET_TIMEOUT_S = 5.0
"""How long the proof may take that a lost peer is quiet, before the pages that it could touch are quarantined."""


class DecodeWorker:
    """Handles the coordinator's messages on the main thread; it steps on the compute thread and copies on another."""

    def __init__(self, host: EngineHost, model: LoadedModel, hbm_blocks: int) -> None:
        self._host = host
        self._engine = PagedDecode(model, hbm_blocks)
        self._copies = named_threads(1, "copies")
        self._constrainer = Constrainer(model, host.config.cluster.model)
        self._persister = Persister(host, self._engine, self._copies)
        self._attempts: dict[Owner, DecodeAttempt] = {}
        self._by_sequence: dict[int, DecodeAttempt] = {}
        self._next_sequence = 0
        self._joined: set[int] = set()
        """Sequences that are still generating."""
        self._work = asyncio.Event()
        host.gauge_sources.append(self._gauges)
        host.spawn(self._run_steps())

    def warm_up(self) -> None:
        """Run a step on the compute thread before the first request."""
        warming = self._next_sequence
        self._next_sequence += 1
        self._engine.admit(warming, 1, 0, SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))
        self._engine.join(warming)
        self._engine.step()
        self._engine.release(warming)

    def handle(self, message: m.ToEngine) -> None:
        """Carry out one message. A message about an attempt that this engine does not have is dropped and counted."""
        match message:
            case m.PrepareDecode():
                self._prepare(message)
            case m.LoadLeg() | m.StartDecode():
                attempt = self._attempts.get((message.request, message.attempt))
                if attempt is None or attempt.aborted or attempt.entered is not None:
                    self._host.counters[metrics.ENGINE_STALE_MESSAGES()] += 1
                elif isinstance(message, m.LoadLeg):
                    attempt.loading = self._host.spawn(self._load(attempt, message))
                else:
                    attempt.entered = self._host.spawn(self._decode(attempt, message))
            case m.AbortAttempt():
                self._abort(message)
            case m.PeerLost():
                self._host.server.quiesce(str(message.engine))
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

    async def _load(self, attempt: DecodeAttempt, message: m.LoadLeg) -> None:
        leg = message.leg
        pages = [attempt.pages[block] for block in range(leg.first_block, leg.first_block + leg.blocks)]
        try:
            faults = await self._host.blocks.read_leg(message.namespace, message.keys, pages, lambda: attempt.aborted)
        except StoreError as error:
            self._host.log(f"request {message.request} can't be loaded: {error}")
            self._host.send(m.LoadFailed(*attempt.owner, Side.DE, []))
            return
        if attempt.aborted:
            return
        if faults:
            self._host.send(m.LoadFailed(*attempt.owner, Side.DE, faults))
        else:
            self._host.send(m.Loaded(*attempt.owner, Side.DE))

    # ── decoding ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _decode(self, attempt: DecodeAttempt, message: m.StartDecode) -> None:
        """Decode an attempt whose DE buffer is complete: copy to the device, generate, persist, then `Finished`."""
        loop = asyncio.get_running_loop()
        refusal, constraints = None, None
        try:
            constraints = await self._constrainer.make(message.sampling, message.history)
        except GrammarError as error:
            refusal = error
        attempt.tail_token_ids = [*message.tail_token_ids, message.draw.token_id]
        self._engine.admit(
            attempt.sequence,
            prompt_tokens=attempt.prompt_tokens,
            first_token=message.draw.token_id,
            sampling=message.sampling,
            generated_so_far=message.generated_tokens,
            constraints=constraints,
        )
        self._by_sequence[attempt.sequence] = attempt
        await loop.run_in_executor(self._copies, self._fill, attempt)
        computed = range(attempt.hit_blocks, len(attempt.keys))
        self._free_pages(attempt, [block for block in attempt.pages if block not in computed])
        if refusal is not None:
            self._fail(attempt, refusal)
        elif not attempt.aborted:
            self._join(attempt)
        for block in computed:
            await self._persister.block_in_buffer(attempt, block)
            self._free_pages(attempt, [block])
        await self._persister.generated_blocks(attempt)
        await loop.run_in_executor(self._copies, self._engine.release, attempt.sequence)
        self._finish(attempt)

    def _fill(self, attempt: DecodeAttempt) -> None:
        """On the copying thread: copy the DE buffer to the device through the CNIC, one Full Block at a time."""
        layout = self._host.layout
        for block, page in attempt.pages.items():
            if attempt.aborted:
                return
            tokens = min(BLOCK_TOKENS, attempt.prompt_tokens - block * BLOCK_TOKENS)
            self._host.traffic.local_copy(layout.layers * tokens * layout.token_bytes)
            view = self._host.pool.view(page)[: layout.full_block_bytes]
            self._engine.fill_block(attempt.sequence, block, view, tokens)

    def _join(self, attempt: DecodeAttempt) -> None:
        reason = self._engine.join(attempt.sequence)
        if reason is not None:
            attempt.end(reason)  # the first token was the last
        else:
            self._joined.add(attempt.sequence)
            self._work.set()

    async def _run_steps(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._work.wait()
            if not self._joined:
                self._work.clear()
                continue
            try:
                outputs = await loop.run_in_executor(self._host.compute, self._engine.step)
            except Exception as error:  # the batch failed: fail each of its requests
                for sequence in sorted(self._joined):
                    self._fail(self._by_sequence[sequence], error)
            else:
                self._on_step(outputs)

    def _on_step(self, outputs: list[StepOutput]) -> None:
        self._host.counters[metrics.DECODE_STEPS()] += 1
        step = []
        for output in outputs:
            if output.sequence not in self._joined:
                continue  # it ended, failed or was released while the step ran
            attempt = self._by_sequence[output.sequence]
            if output.draw is None:
                self._fail(attempt, output.error)
                continue
            step.append(m.StepTokens(*attempt.owner, m.Draw(output.draw.token_id, output.draw.logprobs)))
            attempt.add_token(output.draw.token_id)
            if output.finish_reason is not None:
                self._joined.discard(output.sequence)
                attempt.end(output.finish_reason)
        self._host.counters[metrics.DECODE_TOKENS()] += len(step)
        if step:
            self._host.send(m.Tokens(step))

    def _fail(self, attempt: DecodeAttempt, error: Exception | None) -> None:
        """Stop the attempt's generation; it keeps its pages and blocks until it is aborted."""
        self._joined.discard(attempt.sequence)
        if isinstance(error, REFUSALS):
            self._host.send(m.Refused(*attempt.owner, str(error)))
            return
        attempt.storing = False  # KV that fails a step may be damaged, and a checksum would make the damage look valid
        self._host.log(f"request {attempt.owner[0]} attempt {attempt.owner[1]} failed: {error!r}")
        self._host.send(m.AttemptFailed(*attempt.owner, Cause.COMPUTE_FAILED, repr(error)))

    # ── giving back ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _finish(self, attempt: DecodeAttempt) -> None:
        del self._by_sequence[attempt.sequence]
        del self._attempts[attempt.owner]
        if attempt.aborted:
            self._host.send(m.Released(*attempt.owner))
        else:
            assert attempt.finish_reason is not None
            self._host.send(m.Finished(*attempt.owner, attempt.finish_reason))

    def _abort(self, message: m.AbortAttempt) -> None:
        """Abort an attempt. Core sends this message only after the prefill engine has stopped or is dead."""
        owner = (message.request, message.attempt)
        attempt = self._attempts.get(owner)
        if attempt is None:
            self._host.send(m.Released(*owner))
        elif attempt.aborted:
            self._host.counters[metrics.ENGINE_STALE_MESSAGES()] += 1
        elif attempt.entered is not None:
            attempt.aborted = True
            self._joined.discard(attempt.sequence)
            attempt.end("abort")  # `_decode` goes on to persist what is complete and then releases
        else:
            attempt.aborted = True
            self._host.spawn(self._withdraw(attempt, message.lost_peer))

    async def _withdraw(self, attempt: DecodeAttempt, lost_peer: EngineId | None) -> None:
        """Free the pages once neither our own reads nor a lost peer can write into them."""
        if attempt.loading is not None:
            await asyncio.wait([attempt.loading])
        if lost_peer is not None:
            await self._prove_quiet(attempt, lost_peer)
        self._host.pool.release_quarantine(attempt.owner)
        self._host.pool.free(attempt.owner, list(attempt.pages.values()))
        del self._attempts[attempt.owner]
        self._host.send(m.Released(*attempt.owner))

    async def _prove_quiet(self, attempt: DecodeAttempt, peer: EngineId) -> None:
        """Disconnect the peer and wait for the proof that it no longer touches our pages.

        A peer that hangs with our memory mapped gives no proof until it dies; until then the pages stay quarantined.
        `Released` waits too, so core still counts the blocks as held.
        """
        quiet = asyncio.wrap_future(self._host.server.quiesce(str(peer)))
        if not (await asyncio.wait([quiet], timeout=QUIET_TIMEOUT_S))[0]:
            self._host.pool.quarantine(attempt.owner, list(attempt.pages.values()))
            self._host.log(f"{len(attempt.pages)} pages are quarantined: engine {peer} may still write into them")
            attempt.pages.clear()
        await quiet

    def _free_pages(self, attempt: DecodeAttempt, blocks: list[int]) -> None:
        if not blocks:
            return
        self._host.pool.free(attempt.owner, [attempt.pages.pop(block) for block in blocks])
        self._host.send(m.BufferFreed(*attempt.owner, len(blocks)))

    def release_memory(self) -> None:
        """On the compute thread, with no attempt in hand."""
        self._engine.release_memory()

    def restore_memory(self) -> None:
        self._engine.restore_memory()

    def _gauges(self) -> Figures:
        return {
            metrics.ENGINE_ATTEMPTS(): float(len(self._attempts)),
            metrics.HBM_FREE_BLOCKS(): float(self._engine.free_blocks),
            metrics.DECODE_RUNNING_REQUESTS(): float(len(self._joined)),
        }

    def close(self) -> None:
        self._constrainer.close()
        self._copies.shutdown(wait=True, cancel_futures=True)
