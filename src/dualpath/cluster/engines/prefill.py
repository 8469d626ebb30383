"""The prefill engine: reads its legs, packs batches under the compute quota, runs them layer by layer (paper §4.1,
§6.2).

An attempt's life here: `LoadLeg` (PE side only) → blocks are read from storage into the PE buffer → `StartPrefill` → a
wait in core's `PrefillQueue` → one or more chunks → the PE buffer pages are freed, `PrefillDone`. `AbortAttempt` may
come at any point: reads and computation in progress end as soon as they can, then the engine answers `Released`.
"""

import asyncio
import time

from dualpath.cluster import messages as m
from dualpath.cluster.engines.constraining import REFUSALS, Constrainer
from dualpath.cluster.engines.data_channels import DataChannels
from dualpath.cluster.engines.host import EngineHost, Owner
from dualpath.cluster.engines.layer_transfers import BatchTransfers, ItemTransfers, Rows
from dualpath.cluster.engines.prefill_attempt import PrefillAttempt, prefill_item
from dualpath.core.batching import AttentionCost, Chunk, PrefillQueue
from dualpath.core.load_plan import chunk_plan
from dualpath.core.vocabulary import Cause, Leg, Side
from dualpath.kv import StoreError
from dualpath.model import (
    GrammarError,
    LayerIOTimeoutError,
    LayerwisePrefill,
    LoadedModel,
    PrefillItem,
    PrefillOutput,
    ScoringError,
)
from dualpath.spec import metrics
from dualpath.spec.metrics import Figures
from dualpath.transfer.transport import ChannelBusy, TransferCause, TransferError

PROBE_HIT_TOKENS = 2048
PROBE_NEW_TOKENS = 64
TRANSFER_ERRORS = (TransferError, ChannelBusy, ConnectionError)


class NoTransfers:
    """A `LayerIO` that moves no bytes, to measure compute alone."""

    def load_layer(self, _layer: int, destinations: list[Rows | None]) -> list[Exception | None]:
        return [None] * len(destinations)

    def ship_layer(self, _layer: int, rows: list[Rows | None]) -> list[Exception | None]:
        return [None] * len(rows)


class PrefillWorker:
    """Handles the coordinator's messages on the main thread; computes on the host's compute thread."""

    def __init__(self, host: EngineHost, model: LoadedModel, cost: AttentionCost) -> None:
        cluster = host.config.cluster
        self._host = host
        self._model = model
        self._prefill = LayerwisePrefill(
            model,
            device_layers=cluster.device_layers,
            layerwise=cluster.policy.layerwise,
            max_batch_tokens=max(model.max_length_tokens, cluster.max_batch_kv_tokens),
        )
        self._queue = PrefillQueue(
            cost, cluster.quota_ns, cluster.max_batch_tokens, cluster.max_batch_requests, cluster.max_batch_kv_tokens
        )
        self._peak_device_kv_bytes = 0
        self._attempts: dict[Owner, PrefillAttempt] = {}
        self._channels = DataChannels(host)
        self._constrainer = Constrainer(model, cluster.model)
        self._work = asyncio.Event()
        host.gauge_sources.append(self._gauges)
        host.spawn(self._run_batches())

    def measure_tokens_per_s(self) -> float:
        """Returns prompt tokens per second, hits included, of a typical agent turn: the second, warm run of two."""
        new_tokens = min(PROBE_NEW_TOKENS, self._model.max_length_tokens)
        hit_tokens = min(PROBE_HIT_TOKENS, self._model.max_length_tokens - new_tokens)
        item = PrefillItem(token_ids=[0] * new_tokens, past_tokens=hit_tokens)
        elapsed_ns = 0
        for _ in range(2):
            started_ns = time.monotonic_ns()
            self._prefill.run([item], NoTransfers())
            elapsed_ns = time.monotonic_ns() - started_ns
        return (hit_tokens + new_tokens) * 1e9 / elapsed_ns

    def handle(self, message: m.ToEngine) -> None:
        match message:
            case m.LoadLeg():
                attempt = self._hold((message.request, message.attempt), message.leg)
                self._host.spawn(self._load(attempt, message))
            case m.StartPrefill():
                self._start(message)
            case m.AbortAttempt():
                self._abort((message.request, message.attempt))
            case m.PeerJoined():
                self._host.spawn(self._meet(message))
            case m.PeerLost():
                self._host.spawn(self._channels.drop(message.data_address))
            case _:
                raise TypeError(f"a prefill engine was sent {type(message).__name__}")

    async def _meet(self, message: m.PeerJoined) -> None:
        """Connect to a new decode engine now: mapping its buffer is slow and would delay a first token."""
        error = await self._channels.open(message.data_address)
        if error is not None:
            self._host.log(f"can't connect to engine {message.engine}: {error}; its first prompt will try again")

    # ── loading ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _hold(self, owner: Owner, leg: Leg) -> PrefillAttempt:
        """Record the attempt at once, not in the loading task, so that an abort right after finds it."""
        attempt = self._attempts[owner] = PrefillAttempt(owner)
        attempt.leg = leg
        attempt.pages = self._host.pool.allocate(owner, leg.blocks)
        attempt.busy = True
        return attempt

    async def _load(self, attempt: PrefillAttempt, message: m.LoadLeg) -> None:
        faults: list[m.BlockFaultReport] | None = None
        try:
            faults = await self._host.blocks.read_leg(
                message.namespace, message.keys, attempt.pages, lambda: attempt.aborted
            )
        except StoreError as error:
            self._host.log(f"request {message.request} can't be loaded: {error}")
        attempt.busy = False
        if attempt.aborted:
            self._release(attempt)
        elif faults is None or faults:
            self._host.send(m.LoadFailed(*attempt.owner, Side.PE, faults or []))
        else:
            self._host.send(m.Loaded(*attempt.owner, Side.PE))

    # ── computing ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _start(self, message: m.StartPrefill) -> None:
        owner = (message.request, message.attempt)
        attempt = self._attempts.get(owner)
        loads_here = any(leg.side is Side.PE for leg in message.legs)
        if loads_here != (attempt is not None) or (attempt is not None and (attempt.aborted or attempt.start)):
            self._host.counters[metrics.ENGINE_STALE_MESSAGES()] += 1
            return
        if attempt is None:
            attempt = self._attempts[owner] = PrefillAttempt(owner)
        attempt.start = message
        attempt.busy = True
        self._host.spawn(self._enqueue(attempt, message))

    async def _enqueue(self, attempt: PrefillAttempt, message: m.StartPrefill) -> None:
        """Connect to the decode engine, and compile the grammar, before the prompt joins a batch: neither may delay
        others.
        """
        error: Exception | None = await self._channels.open(message.decode_address)
        try:
            attempt.constraints = await self._constrainer.make(message.sampling, message.history)
            if message.sampling.prompt_logprobs is not None and not self._model.scores_prompts:
                error = ScoringError(
                    "prompt_logprobs: this model changes what its output head gives, and can't be scored"
                )
        except GrammarError as failure:
            error = failure
        attempt.busy = False
        if attempt.aborted:
            self._release(attempt)
        elif error is not None:
            self._fail(attempt, error)
        else:
            self._queue.push(*attempt.owner, message.hit_tokens, len(message.miss_token_ids))
            self._work.set()

    async def _run_batches(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._work.wait()
            chunks = self._queue.next_batch()
            if not chunks:
                self._work.clear()
                continue
            attempts = [self._attempts[chunk.request, chunk.attempt] for chunk in chunks]
            for attempt in attempts:
                attempt.busy = True
            try:
                outputs = await loop.run_in_executor(self._host.compute, self._compute, chunks, attempts)
            except LayerIOTimeoutError as error:
                # A thread hangs in a transfer: only the end of this process proves that it is quiet.
                self._host.leave(f"internal error: {error}")
                return
            except Exception as error:  # the batch failed: fail each of its requests
                outputs = [PrefillOutput(error=error)] * len(chunks)
            self._note_batch()
            for chunk, attempt, output in zip(chunks, attempts, outputs, strict=True):
                self._on_chunk(chunk, attempt, output)

    def _compute(self, chunks: tuple[Chunk, ...], attempts: list[PrefillAttempt]) -> list[PrefillOutput]:
        """On the compute thread: compute one batch, all layers."""
        items, transfers = [], []
        for chunk, attempt in zip(chunks, attempts, strict=True):
            start = attempt.start
            assert start is not None
            items.append(prefill_item(chunk, start, attempt.constraints))
            plan = chunk_plan(tuple(start.legs), start.hit_tokens, chunk.past_tokens, chunk.new_tokens)
            transfers.append(
                ItemTransfers(
                    plan,
                    attempt.pages,
                    attempt.leg.first_block if attempt.leg is not None else 0,
                    start.decode_pages,
                    self._channels.get(start.decode_address),
                    lambda attempt=attempt: attempt.aborted,  # type: ignore[misc]
                )
            )
        io = BatchTransfers(self._host.layout, self._host.pool, self._host.traffic, transfers)
        return self._prefill.run(items, io)

    def _note_batch(self) -> None:
        self._host.counters[metrics.PREFILL_BATCHES()] += 1
        statistics = self._prefill.statistics
        if statistics is not None:
            self._peak_device_kv_bytes = max(self._peak_device_kv_bytes, statistics.peak_device_kv_bytes)

    def _on_chunk(self, chunk: Chunk, attempt: PrefillAttempt, output: PrefillOutput) -> None:
        attempt.busy = False
        self._queue.chunk_done(*attempt.owner)
        self._host.counters[metrics.PREFILL_CHUNKS()] += 1
        self._host.counters[metrics.PREFILL_TOKENS()] += chunk.new_tokens
        # A connection that has ended delivers nothing more; over an open one the rest may still be on its way.
        error = output.error
        attempt.quiet &= not isinstance(error, TransferError) or error.cause is TransferCause.PEER_CLOSED
        if output.scores is not None:
            scores = output.scores
            self._host.send(
                m.PromptLogprobs(
                    *attempt.owner, scores.token_ids.tolist(), scores.logprobs.tolist(), scores.ranks.tolist()
                )
            )
        if attempt.aborted:
            self._queue.remove(*attempt.owner)
            self._release(attempt)
        elif output.error is not None:
            self._queue.remove(*attempt.owner)
            self._fail(attempt, output.error)
        elif chunk.last:
            assert output.token is not None
            self._give_back(attempt)
            self._host.send(m.PrefillDone(*attempt.owner, m.Draw(output.token.token_id, output.token.logprobs)))

    def _fail(self, attempt: PrefillAttempt, error: Exception) -> None:
        """Stop the attempt; it keeps its pages until it is aborted."""
        if isinstance(error, REFUSALS):
            self._host.send(m.Refused(*attempt.owner, str(error)))
            return
        cause = Cause.TRANSFER_FAILED if isinstance(error, TRANSFER_ERRORS) else Cause.COMPUTE_FAILED
        self._host.log(f"request {attempt.owner[0]} attempt {attempt.owner[1]} failed: {error!r}")
        self._host.send(m.AttemptFailed(*attempt.owner, cause, repr(error)))

    # ── giving back ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _abort(self, owner: Owner) -> None:
        attempt = self._attempts.get(owner)
        if attempt is None:
            self._host.send(m.Released(*owner))
            return
        attempt.aborted = True
        if not attempt.busy:
            self._queue.remove(*owner)
            self._release(attempt)

    def _release(self, attempt: PrefillAttempt) -> None:
        self._give_back(attempt)
        self._host.send(m.Released(*attempt.owner, attempt.quiet))

    def _give_back(self, attempt: PrefillAttempt) -> None:
        if attempt.pages:
            self._host.pool.free(attempt.owner, attempt.pages)
        del self._attempts[attempt.owner]

    def release_memory(self) -> None:
        """On the compute thread, with no attempt in hand."""
        self._prefill.release_memory()

    def restore_memory(self) -> None:
        """Nothing to do: the next batch takes its buffers."""

    def _gauges(self) -> Figures:
        return {
            metrics.ENGINE_ATTEMPTS(): float(len(self._attempts)),
            metrics.PREFILL_WAITING_TOKENS(): float(self._queue.waiting_tokens),
            metrics.PREFILL_PEAK_KV_BYTES(): float(self._peak_device_kv_bytes),
        }

    def close(self) -> None:
        self._constrainer.close()
        self._channels.close()
        self._prefill.close()
