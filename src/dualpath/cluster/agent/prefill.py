"""A prefill engine's batches: prompts are packed under the compute quota, their layers moved (paper §4.1, §6.2).

An attempt's life here: `LoadLeg` (PE side only) → blocks are read from storage into the PE buffer → `StartPrefill` → a
wait in core's `PrefillQueue` → one or more chunks, computed by the engine → the PE buffer pages are freed,
`PrefillDone`. What has nothing to do with batches is in `prefill_attempts`.
"""

import asyncio

from dualpath.cluster import messages as m
from dualpath.cluster.agent.attached import AttachedEngine, EngineGoneError
from dualpath.cluster.agent.host import EngineHost
from dualpath.cluster.agent.layer_threads import LayerThreads
from dualpath.cluster.agent.layer_transfers import BatchTransfers, ItemTransfers
from dualpath.cluster.agent.prefill_attempt import PrefillAttempt, chunk_item
from dualpath.cluster.agent.prefill_attempts import PrefillAttempts
from dualpath.cluster.attachment import ChunkResult, Constrain, Forget, Owner, Steps
from dualpath.core.batching import AttentionCost, Chunk, PrefillQueue
from dualpath.core.load_plan import chunk_plan
from dualpath.spec import metrics
from dualpath.spec.metrics import Figures
from dualpath.transfer.transport import TransferCause, TransferError


class PrefillWorker(PrefillAttempts[PrefillAttempt]):
    """Of an engine of our own."""

    def __init__(self, host: EngineHost, engine: AttachedEngine, layers: LayerThreads) -> None:
        super().__init__(host)
        cluster = host.config.cluster
        self._engine = engine
        self._layers = layers
        self._queue = PrefillQueue(
            _attention_cost(engine),
            cluster.quota_ns,
            cluster.max_batch_tokens,
            cluster.max_batch_requests,
            cluster.max_batch_kv_tokens,
        )
        self._work = asyncio.Event()
        host.spawn(self._run_batches())

    def _new(self, owner: Owner) -> PrefillAttempt:
        return PrefillAttempt(owner)

    async def _prefill(self, attempt: PrefillAttempt, message: m.StartPrefill) -> None:
        """Connect to the decode engine, and have the grammar compiled, before the prompt joins a batch: neither may
        delay others.
        """
        error = await self._channels.open(message.decode_address)
        refusal = "" if error is not None else await self._refusal(attempt, message)
        attempt.busy = False
        if attempt.aborted:
            self._release(attempt)
        elif refusal:
            self._host.send(m.Refused(*attempt.owner, refusal))
        elif error is not None:
            self._fail(attempt, error)
        else:
            self._queue.push(*attempt.owner, message.hit_tokens, len(message.miss_token_ids))
            self._work.set()

    async def _refusal(self, attempt: PrefillAttempt, message: m.StartPrefill) -> str:
        """Returns why this prompt can't be computed as it asks; empty when it can."""
        engine, sampling = self._engine, message.sampling
        if sampling.prompt_logprobs is not None and not engine.facts.scores_prompts:
            return "prompt_logprobs: this model changes what its output head gives, and can't be scored"
        if not sampling.is_constrained:
            return ""
        try:
            return (await engine.call(lambda call: Constrain(call, attempt.owner, sampling, message.history))).error
        except EngineGoneError:
            return ""  # and so is this engine's part of the agent, in a moment

    async def _run_batches(self) -> None:
        while True:
            await self._work.wait()
            chunks = self._queue.next_batch()
            if not chunks:
                self._work.clear()
                continue
            attempts = [self._attempts[chunk.request, chunk.attempt] for chunk in chunks]
            for attempt in attempts:
                attempt.busy = True
            transfers = self._transfers(chunks, attempts)
            try:
                results = await self._compute(chunks, attempts, transfers)
            except EngineGoneError:
                return  # transfers may go on, so every page stays held until `close` has seen their end
            self._host.counters[metrics.PREFILL_BATCHES()] += 1
            for chunk, attempt, result, error in zip(chunks, attempts, results, transfers.errors, strict=True):
                self._on_chunk(chunk, attempt, result, error)

    def _transfers(self, chunks: tuple[Chunk, ...], attempts: list[PrefillAttempt]) -> BatchTransfers:
        items = []
        windows = {kind.window_tokens for kind in self._host.layout.kinds}
        for chunk, attempt in zip(chunks, attempts, strict=True):
            start = attempt.start
            assert start is not None
            items.append(
                ItemTransfers(
                    chunk_plan(tuple(start.legs), start.hit_tokens, chunk.past_tokens, chunk.new_tokens),
                    attempt.pages,
                    attempt.leg.first_block if attempt.leg is not None else 0,
                    start.decode_pages,
                    self._channels.get(start.decode_address),
                    lambda attempt=attempt: attempt.aborted,  # type: ignore[misc]
                    windows,
                )
            )
        return BatchTransfers(self._host.layout, self._host.pool, self._host.traffic, items)

    async def _compute(
        self, chunks: tuple[Chunk, ...], attempts: list[PrefillAttempt], transfers: BatchTransfers
    ) -> list[ChunkResult]:
        """Have the engine compute one batch, all layers. Returns a result for each chunk. Raises EngineGoneError."""
        items = []
        for chunk, attempt in zip(chunks, attempts, strict=True):
            assert attempt.start is not None
            items.append(chunk_item(chunk, attempt.start))
        self._layers.batch = transfers
        try:
            done = await self._engine.run_batch(items)
        finally:
            self._layers.batch = None
        return done.results if not done.error else [ChunkResult(error=done.error)] * len(chunks)

    def _on_chunk(self, chunk: Chunk, attempt: PrefillAttempt, result: ChunkResult, error: Exception | None) -> None:
        """`error` is that of the chunk's transfers."""
        attempt.busy = False
        self._queue.chunk_done(*attempt.owner)
        self._host.counters[metrics.PREFILL_CHUNKS()] += 1
        self._host.counters[metrics.PREFILL_TOKENS()] += chunk.new_tokens
        # A connection that has ended delivers nothing more; over an open one the rest may still be on its way.
        attempt.quiet &= not isinstance(error, TransferError) or error.cause is TransferCause.PEER_CLOSED
        if result.scores is not None:
            scores = result.scores
            self._host.send(m.PromptLogprobs(*attempt.owner, scores.token_ids, scores.logprobs, scores.ranks))
        if attempt.aborted:
            self._release(attempt)
        elif error is not None or result.error:
            self._queue.remove(*attempt.owner)
            if result.refused:
                self._host.send(m.Refused(*attempt.owner, result.error))
            else:
                self._fail(attempt, error or RuntimeError(result.error))
        elif chunk.last:
            assert result.draw is not None
            self._give_back(attempt)
            self._host.send(m.PrefillDone(*attempt.owner, result.draw))

    def on_steps(self, _message: Steps) -> None:
        """A prefill engine makes none."""

    # ── giving back ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _release(self, attempt: PrefillAttempt) -> None:
        self._queue.remove(*attempt.owner)
        super()._release(attempt)

    def _give_back(self, attempt: PrefillAttempt) -> None:
        super()._give_back(attempt)
        if attempt.start is not None and attempt.start.sampling.is_constrained:
            self._engine.tell(Forget(attempt.owner))

    def _gauges(self) -> Figures:
        return super()._gauges() | {metrics.PREFILL_WAITING_TOKENS(): float(self._queue.waiting_tokens)}

    def close(self) -> None:
        """Blocks until transfers in progress have ended."""
        super().close()
        self._layers.close()


def _attention_cost(engine: AttachedEngine) -> AttentionCost:
    measured = engine.facts.attention
    assert measured is not None, "a prefill engine says how long its attention takes"
    return AttentionCost(
        fixed_ns=measured.fixed_ns,
        ns_per_flop=measured.ns_per_flop,
        flops_per_token=measured.flops_per_token,
        flops_per_pair=measured.flops_per_pair,
    )
