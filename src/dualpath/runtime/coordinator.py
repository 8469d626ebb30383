"""The coordinator: drives core's scheduler with what clients and engines say, and carries out its commands.

Theory of operation. Everything here runs on one asyncio thread. An input (a new request, an engine's report, a timer)
calls one method of the scheduler with the current time; `_drive` then takes the commands that call produced and turns
each into a control message, adding the payload core knows nothing of (tokens, block keys, page numbers). There is no
policy in this file: which engine, which path, when to retry and when to give up are core's. What the coordinator owns
is the client's stream (`LiveRequest`), the prefix index (`Prefixes`) and the proof that an engine is gone.

An answer's last event waits for `Finished`, that is, until its blocks are durable: the agent's next turn will hit
them.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from dualpath.core.ledger import Holding
from dualpath.core.replay import JournaledScheduler
from dualpath.core.scheduler import Scheduler
from dualpath.core.vocabulary import (
    Abort,
    Cancelled,
    Command,
    Decode,
    EngineFacts,
    Fail,
    Finish,
    Load,
    Prefill,
    Prepare,
    RequestFacts,
    RequestId,
    Resubmit,
)
from dualpath.kv.keys import BlockKey
from dualpath.kv.layout import KVLayout
from dualpath.runtime import messages as m
from dualpath.runtime.api import GeneratedTokens, GenerateRequest, ModelFacts, RequestError
from dualpath.runtime.config import ClusterConfig
from dualpath.runtime.constants import scheduler_constants, scheduler_limits
from dualpath.runtime.failures import request_error
from dualpath.runtime.links import EngineLink, EngineLinks
from dualpath.runtime.live_request import LiveRequest
from dualpath.runtime.membership import Membership
from dualpath.runtime.prefixes import Prefixes


class Coordinator:
    """A cluster's head. Implements `runtime.api.Generator`.

    `kill_engine(pid)` is given by whoever started local engines: it must end the process and return once it is dead, so
    that an engine declared lost can't touch memory any more.
    """

    def __init__(self, config: ClusterConfig, kill_engine: Callable[[int], None] | None = None) -> None:
        self._config = config
        self._links = EngineLinks()
        self.membership = Membership(config, self._links, self, kill_engine)
        self.control_address = self._links.bind(config.control_address)
        self._journal = open(config.journal, "wb") if config.journal else None  # noqa: SIM115 (closed in stop)
        self._scheduler: Scheduler | JournaledScheduler | None = None
        self._prefixes: Prefixes | None = None
        self._model: ModelFacts | None = None
        self.layout: KVLayout | None = None
        self._requests: dict[RequestId, LiveRequest] = {}
        self._next_request: RequestId = 0
        self._driving = False
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Ends, with the exception, when the coordinator itself breaks."""
        self.stale_messages = 0

    # ── life ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def start(self) -> None:
        """Begin to listen. Returns at once; `joined` waits for the engines of the configured topology."""
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self.membership.watch_leases())]
        for task in self._tasks:
            task.add_done_callback(self._on_task_done)

    async def stop(self) -> None:
        """Tell engines to leave, end open requests, close."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._timer is not None:
            self._timer.cancel()
        for engine in list(self._links.by_engine):
            self._links.send(engine, m.Shutdown("the cluster stops"))
        for live in list(self._requests.values()):
            self._end(live, RequestError(503, "shutting_down", "the server is shutting down; try again later", 5.0))
        await asyncio.sleep(0.05)
        self._links.close()
        if self._prefixes is not None:
            self._prefixes.close()
        if self._journal is not None:
            self._journal.close()

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None and not self.failure.done():
            # A bug in the driver or in core: stopping loudly beats serving from a state nobody understands.
            self.failure.set_exception(task.exception() or RuntimeError("unreachable"))

    # ── the server's face ───────────────────────────────────────────────────────────────────────────────────────────

    @property
    def model(self) -> ModelFacts:
        assert self._model is not None, "no engine has joined yet"
        return self._model

    async def generate(self, request: GenerateRequest) -> AsyncIterator[GeneratedTokens]:
        """See `runtime.api.Generator.generate`."""
        live = self._submit(request)
        try:
            while True:
                event = await live.events.get()
                if isinstance(event, RequestError):
                    raise event
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            if self._requests.get(live.request) is live:
                self._input(lambda s, now: s.cancel(now, live.request))

    def _submit(self, asked: GenerateRequest) -> LiveRequest:
        if self._prefixes is None:
            raise RequestError(503, "no_engine", "no engine has joined yet; try again in a moment", 1.0)
        total = len(asked.prompt_token_ids) + asked.sampling.max_tokens
        if total > self.model.max_model_len_tokens:
            raise RequestError(
                400,
                "context_length_exceeded",
                f"{len(asked.prompt_token_ids)} prompt tokens and {asked.sampling.max_tokens} to generate exceed the "
                f"model's {self.model.max_model_len_tokens}; shorten the prompt or lower max_tokens",
            )
        live = LiveRequest(self._next_request, asked, self._prefixes.namespace_of(asked.tenant))
        self._next_request += 1
        self._requests[live.request] = live
        facts = self._begin(live, 0)
        self._input(lambda s, now: s.submit(now, facts))
        return live

    def _begin(self, live: LiveRequest, attempt: int) -> RequestFacts:
        """Match the prompt plus what was generated against storage and pin what was found for this attempt."""
        assert self._prefixes is not None
        prompt = live.asked.prompt_token_ids + live.generated
        keys = self._prefixes.keys(live.namespace, prompt)
        self._prefixes.unpin(live.request)
        hit_blocks = 0
        if self._config.prefix_cache:
            hit_blocks = self._prefixes.match_and_pin(live.request, keys, (len(prompt) - 1) // 64)
        return live.begin(attempt, prompt, keys, hit_blocks)

    # ── for those who look inside (tests, tools) ────────────────────────────────────────────────────────────────────

    def scheduler_holdings(self) -> tuple[Holding, ...]:
        """What core's ledger says is held; empty when the cluster is idle."""
        return self._scheduler.held() if self._scheduler is not None else ()

    def block_key(self, prompt_token_ids: list[int], block: int, tenant: str = "") -> BlockKey:
        """Key of a prompt's full block `block`."""
        assert self._prefixes is not None
        return self._prefixes.keys(self._prefixes.namespace_of(tenant), prompt_token_ids)[block]

    async def settle(self) -> None:
        """Wait until file work queued so far is done."""
        if self._prefixes is not None:
            await self._prefixes.settle()

    def health(self) -> dict[str, object]:
        """See `runtime.api.Generator.health`."""
        engines = [
            {"engine": link.engine, "role": link.join.role.value, "pid": link.join.pid, "host": link.join.host}
            for link in self._links.by_engine.values()
        ]
        return {"status": self.membership.status, "engines": engines}

    def gauges(self) -> dict[str, float]:
        """See `runtime.api.Generator.gauges`."""
        figures: dict[str, float] = {
            "dualpath_requests_live": float(len(self._requests)),
            "dualpath_stale_messages_total": float(self.stale_messages),
            "dualpath_malformed_messages_total": float(self._links.malformed_messages),
        }
        if self._scheduler is not None:
            for name, value in self._scheduler.statistics().items():
                figures[f"dualpath_scheduler_{name}"] = float(value)
        if self._prefixes is not None:
            figures |= self._prefixes.gauges()
        for link in self._links.by_engine.values():
            labels = f'engine="{link.engine}",role="{link.join.role.value}"'
            for name, figure in link.gauges.items():
                metric, _, more = name.partition("{")
                figures[f"{metric}{{{labels}{',' + more[:-1] if more else ''}}}"] = figure
        return figures

    # ── membership ──────────────────────────────────────────────────────────────────────────────────────────────────

    def founded(self, join: m.Join, prefill_tokens_per_s: float) -> None:
        """The first prefill engine tells the model and its speed: the scheduler and the index begin here."""
        config = self._config
        self._model = ModelFacts(
            name=config.served_model_name or Path(config.model).name,
            path=config.model,
            max_model_len_tokens=join.max_model_len_tokens,
            vocab_size=join.vocab_size,
            eos_token_ids=join.eos_token_ids,
        )
        self.layout = join.layout
        self._prefixes = Prefixes(
            config.store, join.layout, join.model_fingerprint, config.weights_version, config.store_quota_bytes
        )
        constants = scheduler_constants(config, join.layout, prefill_tokens_per_s)
        limits = scheduler_limits(config)
        scheduler = Scheduler(config.policy, constants, limits)
        self._scheduler = scheduler if self._journal is None else JournaledScheduler(scheduler, self._journal.write)

    def engine_joined(self, facts: EngineFacts) -> None:
        self._input(lambda s, now: s.engine_joined(now, facts))

    def engine_lost(self, link: EngineLink) -> None:
        self._input(lambda s, now: s.engine_lost(now, link.engine))

    async def _listen(self) -> None:
        async for identity, message in self._links.messages():
            link = self._links.link_of(identity)
            if isinstance(message, m.Join):
                if link is None:
                    self.membership.join(identity, message)
            elif link is None:
                self.stale_messages += 1
            else:
                self._on_message(link, message)

    # ── what engines report ─────────────────────────────────────────────────────────────────────────────────────────

    def _on_message(self, link: EngineLink, message: m.FromEngine) -> None:
        match message:
            case m.Tokens():
                for step in message.step:
                    live = self._live(step.request, step.attempt)
                    if live is not None:
                        live.emit(step.draw)
            case m.Stored():
                self._on_stored(message)
            case m.Leave():
                self.membership.lost(link.engine, message.reason)
            case m.Released():
                self._input(lambda s, now: s.released(now, message.request, message.attempt, link.engine))
            case m.BufferFreed():
                self._input(lambda s, now: s.buffer_freed(now, message.request, message.attempt, message.blocks))
            case m.Prepared() | m.Loaded() | m.LoadFailed() | m.PrefillDone() | m.AttemptFailed() | m.Finished():
                live = self._live(message.request, message.attempt)
                if live is not None:
                    self._on_attempt_message(link, live, message)
            case _:
                self.stale_messages += 1

    def _live(self, request: RequestId, attempt: int) -> LiveRequest | None:
        live = self._requests.get(request)
        if live is None or not live.is_current(attempt):
            self.stale_messages += 1
            return None
        return live

    def _on_attempt_message(self, link: EngineLink, live: LiveRequest, message: m.FromEngine) -> None:
        attempt = live.current
        assert attempt is not None
        ids = (live.request, attempt.attempt)
        match message:
            case m.Prepared():
                attempt.decode_pages = message.pages
                self._input(lambda s, now: s.prepared(now, *ids))
            case m.Loaded():
                self._input(lambda s, now: s.loaded(now, *ids, message.side))
            case m.LoadFailed():
                assert self._prefixes is not None
                self._prefixes.report_faults(live.namespace, message.faults)
                self._input(lambda s, now: s.load_failed(now, *ids, message.side))
            case m.PrefillDone():
                attempt.first_draw = message.draw
                if live.cached_tokens is None:
                    live.cached_tokens = attempt.hit_tokens
                live.emit(message.draw)
                self._input(lambda s, now: s.prefill_done(now, *ids))
            case m.AttemptFailed():
                self._input(lambda s, now: s.attempt_failed(now, *ids, link.engine, message.cause))
            case m.Finished():
                self._input(lambda s, now: s.finished(now, *ids))

    def _on_stored(self, message: m.Stored) -> None:
        assert self._prefixes is not None
        self._prefixes.publish(message.blocks)

    # ── driving core ────────────────────────────────────────────────────────────────────────────────────────────────

    def _input(self, call: Callable[[Scheduler | JournaledScheduler, int], None]) -> None:
        """One scheduler input, then all the commands that follow from it, then the next timer."""
        assert self._scheduler is not None
        call(self._scheduler, time.monotonic_ns())
        if self._driving:
            return  # an input made while carrying out a command: its own commands follow those before it
        self._driving = True
        try:
            self._drive()
        finally:
            self._driving = False

    def _drive(self) -> None:
        assert self._scheduler is not None
        while commands := self._scheduler.take_commands():
            for command in commands:
                self._carry_out(command)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        wake_ns = self._scheduler.next_wake()
        if wake_ns is not None:
            delay_s = max(0.0, (wake_ns - time.monotonic_ns()) / 1e9)
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._wake)

    def _wake(self) -> None:
        self._input(lambda s, now: s.wake(now))

    def _carry_out(self, command: Command) -> None:
        live = self._requests.get(command.request)
        match command:
            case Abort():
                message = m.AbortAttempt(command.request, command.attempt, command.lost_peer)
                self._links.send(command.engine, message)
            case _ if live is None:
                if not isinstance(command, Cancelled):
                    raise RuntimeError(f"core commands {command} for a request that has ended")
            case Finish():
                self._end(live, live.reason or "stop")
            case Fail():
                self._end(live, request_error(command.cause, len(live.asked.prompt_token_ids)))
            case Cancelled():
                self._end(live, RequestError(499, "cancelled", "the client closed the request"))
            case Resubmit():
                self._resubmit(live, command.attempt)
            case Prepare() | Load() | Prefill() | Decode():
                self._instruct(live, command)

    def _instruct(self, live: LiveRequest, command: Prepare | Load | Prefill | Decode) -> None:
        attempt = live.current
        assert attempt is not None and attempt.attempt == command.attempt
        ids = (live.request, attempt.attempt)
        match command:
            case Prepare():
                attempt.decode_engine = command.engine
                message: m.ToEngine = m.PrepareDecode(
                    *ids, len(attempt.prompt_token_ids), attempt.hit_tokens, live.namespace, attempt.keys
                )
            case Load():
                attempt.legs.append(command.leg)
                leg = command.leg
                keys = attempt.keys[leg.first_block : leg.first_block + leg.blocks]
                message = m.LoadLeg(*ids, leg, live.namespace, keys)
            case Prefill():
                message = self._start_prefill(live, command)
            case Decode():
                assert attempt.first_draw is not None
                tail = attempt.prompt_token_ids[len(attempt.keys) * 64 :]
                message = m.StartDecode(*ids, attempt.first_draw, tail, live.asked.sampling, live.generated_before)
        self._links.send(command.engine, message)

    def _start_prefill(self, live: LiveRequest, command: Prefill) -> m.StartPrefill:
        attempt = live.current
        assert attempt is not None and attempt.decode_pages is not None and self._prefixes is not None
        attempt.prefill_engine = command.engine
        # Every hit block is in a buffer now: what happens to its file no longer matters to this attempt.
        self._prefixes.unpin(live.request)
        peer = self._links.by_engine.get(command.decode_engine)
        return m.StartPrefill(
            live.request,
            attempt.attempt,
            attempt.hit_tokens,
            attempt.prompt_token_ids[attempt.hit_tokens :],
            attempt.legs,
            command.decode_engine,
            peer.join.data_address if peer is not None else "",
            attempt.decode_pages,
            live.asked.sampling,
            live.generated_before,
        )

    def _resubmit(self, live: LiveRequest, attempt: int) -> None:
        """A new attempt, unless the lost one had already generated everything: then only its persisting was lost."""
        if live.reason is not None:
            reason = live.reason
            self._end(live, reason)
            self._input(lambda s, now: s.cancel(now, live.request))
            return
        facts = self._begin(live, attempt)
        self._input(lambda s, now: s.resubmit(now, facts))

    def _end(self, live: LiveRequest, outcome: str | RequestError) -> None:
        if self._requests.pop(live.request, None) is None:
            return
        if self._prefixes is not None:
            self._prefixes.unpin(live.request)
        live.end(outcome)
