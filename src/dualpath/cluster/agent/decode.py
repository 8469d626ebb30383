"""A decode engine's requests: the DE buffer, device memory taken late, tokens, persisting as blocks fill (paper §4.1).

An attempt's life here: `PrepareDecode` (pages for the whole prompt) → perhaps `LoadLeg` (the node's SNIC reads hit
blocks) → the prefill engine pulls and puts layers through the data server → `StartDecode`: the engine takes device
blocks and copies every Full Block in, the pages that need no persisting are freed, and it generates → computed prompt
blocks are written to storage from the buffer, generated ones through a staging page as each fills → after the last
token and write, `Finished`.

`AbortAttempt` stops generation but lets complete blocks reach storage, so that an agent which stopped reading early
still finds its prefix next turn. Only one task frees an attempt's pages: `_decode` once it runs, `_abort` before.
"""

import asyncio

from dualpath.cluster import messages as m
from dualpath.cluster.agent.admission import Admission
from dualpath.cluster.agent.attached import EngineGoneError
from dualpath.cluster.agent.decode_attempt import DecodeAttempt, Persister
from dualpath.cluster.agent.host import ABANDON_POLL_S, EngineHost
from dualpath.cluster.agent.vllm_engine import VllmEngine
from dualpath.cluster.attachment import (
    Begin,
    Owner,
    Release,
    Reply,
    SequenceStep,
    Steps,
    Stop,
)
from dualpath.cluster.vllm_attachment import Generated, Told
from dualpath.core.vocabulary import BLOCK_TOKENS, Cause, EngineId, Side
from dualpath.kv import StoreError
from dualpath.spec import metrics
from dualpath.spec.metrics import Figures
from dualpath.thread_names import named_threads

QUIET_TIMEOUT_S = 5.0
"""How long the proof may take that a lost peer is quiet, before the pages that it could touch are quarantined."""


class DecodeWorker:
    """Handles the coordinator's messages to one decode engine, on the agent's main thread."""

    def __init__(self, host: EngineHost) -> None:
        self._host = host
        self._copies = named_threads(1, "copies")
        """It waits for the CNIC, which lets the engine's copies through."""
        self._persister = Persister(host, self._copies)
        self._admission = Admission(host, self._copies)
        self._attempts: dict[Owner, DecodeAttempt] = {}
        self._by_sequence: dict[int, DecodeAttempt] = {}
        self._next_sequence = 0
        self._joined: set[int] = set()
        """Sequences that are still generating."""
        self._awaits_admission = isinstance(host.attached, VllmEngine)
        """Whether the engine admits a sequence only when a client has asked it, and so perhaps never."""
        self._peers: set[EngineId] = set()
        """Prefill engines of this epoch: who may touch the buffer."""
        host.gauge_sources.append(self._gauges)

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
            case m.PeerJoined():
                self._peers.add(message.engine)
            case m.PeerLost():
                self._host.server.quiesce(self._host.link.tag(message.engine))
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
            faults = await self._host.blocks.read_leg(message, pages, lambda: attempt.aborted)
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
        """Decode an attempt whose DE buffer is complete: fill the device, generate, persist, then `Finished`."""
        attempt.tail_token_ids = list(message.tail_token_ids)
        if message.draw is not None:
            attempt.add_token(message.draw.token_id)
        self._by_sequence[attempt.sequence] = attempt
        computed = range(attempt.hit_blocks, len(attempt.keys))  # of the prompt: from here on generated ones may follow
        try:
            refusal = await self._enter(attempt, message)
            self._free_pages(attempt, [block for block in attempt.pages if block not in computed])
            if refusal is not None and not attempt.aborted:
                self._fail(attempt, refusal)
            for block in computed:
                await self._persister.block_in_buffer(attempt, block)
                self._free_pages(attempt, [block])
            await self._persister.generated_blocks(attempt)
            await self._call(Release, attempt)
        except EngineGoneError:
            return  # the whole buffer ends with its engine
        self._finish(attempt)

    async def _enter(self, attempt: DecodeAttempt, message: m.StartDecode) -> Reply | None:
        """Have the engine decode the attempt. Returns a reply that says why it can't."""
        failed = await self._admission.admit(attempt, message)
        if failed is None and not attempt.aborted:
            self._joined.add(attempt.sequence)
            self._begun(attempt, await self._call(Begin, attempt))
        return failed

    def _begun(self, attempt: DecodeAttempt, reply: Reply) -> None:
        if reply.finish_reason is not None:  # the first token was the last
            self._joined.discard(attempt.sequence)
            attempt.end(reply.finish_reason)

    async def _call(self, kind: type[Begin] | type[Release], attempt: DecodeAttempt) -> Reply:
        return await self._host.attached.call(lambda call: kind(call, attempt.sequence))

    def on_steps(self, message: Steps) -> None:
        """The engine has made a step."""
        self._host.counters[metrics.DECODE_STEPS()] += 1
        step = []
        for one in message.steps:
            if one.sequence not in self._joined:
                continue  # it ended, failed or was released while the step ran
            attempt = self._by_sequence[one.sequence]
            if one.draw is None:
                self._fail(attempt, one)
                continue
            step.append(m.StepTokens(*attempt.owner, one.draw))
            attempt.add_token(one.draw.token_id)
            if one.finish_reason is not None:
                self._joined.discard(one.sequence)
                attempt.end(one.finish_reason)
        self._host.counters[metrics.DECODE_TOKENS()] += len(step)
        if step:
            self._host.send(m.Tokens(step))

    def on_told(self, _rank: int, told: Told) -> None:
        """A vLLM server has generated tokens, which it tells its client itself; here they name blocks."""
        attempt = self._by_sequence.get(told.sequence) if isinstance(told, Generated) else None
        if attempt is None or attempt.finish_reason is not None:
            self._host.counters[metrics.ENGINE_STALE_MESSAGES()] += 1
            return
        assert isinstance(told, Generated)
        self._host.counters[metrics.DECODE_TOKENS()] += len(told.token_ids)
        for token_id in told.token_ids:
            attempt.add_token(token_id)
        if told.finish_reason is not None:
            self._joined.discard(attempt.sequence)
            # vLLM's front end finds stop strings, and then aborts the request in its engine. Ours end by `_end`.
            attempt.end("stop" if told.finish_reason == "abort" else told.finish_reason)

    def _fail(self, attempt: DecodeAttempt, failed: Reply | SequenceStep) -> None:
        """Stop the attempt's generation; it keeps its pages and blocks until it is aborted."""
        self._stop(attempt)
        if failed.refused:
            self._host.send(m.Refused(*attempt.owner, failed.error))
            return
        attempt.storing = False  # KV that fails a step may be damaged, and a checksum would make the damage look valid
        self._host.log(f"request {attempt.owner[0]} attempt {attempt.owner[1]} failed: {failed.error}")
        self._host.send(m.AttemptFailed(*attempt.owner, Cause.COMPUTE_FAILED, failed.error))

    def _stop(self, attempt: DecodeAttempt) -> None:
        if attempt.sequence in self._joined or self._awaits_admission:
            self._joined.discard(attempt.sequence)
            self._host.attached.tell(Stop(attempt.sequence))

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
            self._end(attempt)
        else:
            attempt.aborted = True
            lost = [] if message.lost_peer is None else [message.lost_peer]
            self._host.spawn(self._withdraw(attempt, lost))

    async def abandon(self) -> None:
        """The coordinator is lost: abort every attempt. Ends when all is free: no peer is proven quiet by anybody else.

        An attempt that is decoding has its prompt's KV already; it ends as if its client had gone.
        """
        lost = sorted(self._peers)
        self._peers.clear()
        for attempt in list(self._attempts.values()):
            if attempt.entered is not None:
                self._end(attempt)
            elif not attempt.aborted:
                attempt.aborted = True
                self._host.spawn(self._withdraw(attempt, lost))
        for peer in lost:
            self._host.server.quiesce(self._host.link.tag(peer))
        while self._attempts:
            await asyncio.sleep(ABANDON_POLL_S)

    def _end(self, attempt: DecodeAttempt) -> None:
        """`_decode` goes on to persist what is complete, and then releases."""
        attempt.aborted = True
        self._stop(attempt)
        attempt.end("abort")

    async def _withdraw(self, attempt: DecodeAttempt, lost: list[EngineId]) -> None:
        """Free the pages once neither our own reads nor a lost peer can write into them."""
        if attempt.loading is not None:
            await asyncio.wait([attempt.loading])
        for peer in lost:
            await self._prove_quiet(attempt, peer)
        self._host.pool.release_quarantine(attempt.owner)
        self._host.pool.free(attempt.owner, list(attempt.pages.values()))
        del self._attempts[attempt.owner]
        self._host.send(m.Released(*attempt.owner))

    async def _prove_quiet(self, attempt: DecodeAttempt, peer: EngineId) -> None:
        """Disconnect the peer and wait for the proof that it no longer touches our pages.

        A peer that hangs with our memory mapped gives no proof until it dies; until then the pages stay quarantined.
        `Released` waits too, so core still counts the blocks as held.
        """
        quiet = asyncio.wrap_future(self._host.server.quiesce(self._host.link.tag(peer)))
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

    def _gauges(self) -> Figures:
        return {
            metrics.ENGINE_ATTEMPTS(): float(len(self._attempts)),
            metrics.DECODE_RUNNING_REQUESTS(): float(len(self._joined)),
        }

    def close(self) -> None:
        self._copies.shutdown(wait=True, cancel_futures=True)
