"""Requests from submission to their last event: clients' requests, engines' reports, core's commands.

Every input goes through the driver to core's scheduler. Each command that follows comes back to `_carry_out`, which
makes it a control message (`live_request.order`) or a client's last event. There is no policy in this file.

An answer's last event is sent after `Finished`, when its blocks are durable: the agent's next turn will hit them.
"""

import time

from dualpath.cluster import messages as m
from dualpath.cluster.coordinator.driver import SchedulerDriver
from dualpath.cluster.coordinator.links import EngineLinks, UnencodableMessageError
from dualpath.cluster.coordinator.live_request import LiveRequest, order
from dualpath.cluster.coordinator.prefixes import Prefixes
from dualpath.cluster.generator import GenerateRequest, ModelFacts, RequestError, overflow_message
from dualpath.core.scheduler import Scheduler
from dualpath.core.vocabulary import (
    BLOCK_TOKENS,
    Abort,
    Cancelled,
    Cause,
    Command,
    Decode,
    EngineId,
    Fail,
    Finish,
    Load,
    Prefill,
    Prepare,
    RequestFacts,
    RequestId,
    Resubmit,
)
from dualpath.kv import BlockKey
from dualpath.spec import metrics
from dualpath.spec.metrics import Figures

_OF_ATTEMPTS = (
    m.Prepared, m.Loaded, m.LoadFailed, m.PromptLogprobs, m.PrefillDone, m.AttemptFailed, m.Refused, m.Finished
)  # fmt: skip


class Serving:
    """Every live request of a founded cluster. Used from one asyncio thread."""

    def __init__(
        self,
        model: ModelFacts,
        prefixes: Prefixes,
        links: EngineLinks,
        driver: SchedulerDriver,
        scheduler: Scheduler,
        prefix_cache: bool,
    ) -> None:
        self.model = model
        self.prefixes = prefixes
        self._links = links
        self._driver = driver
        self._prefix_cache = prefix_cache
        self._requests: dict[RequestId, LiveRequest] = {}
        self._next_request: RequestId = 0
        self._unquiet: dict[tuple[RequestId, int], EngineId] = {}
        """PEs whose transfers for an aborted attempt failed half-way; an entry is removed when the DE is told."""
        self._ended: RequestError | None = None
        self.stale_messages = 0
        driver.begin(scheduler, self._carry_out)

    # ── what clients ask ────────────────────────────────────────────────────────────────────────────────────────────

    async def submit(self, asked: GenerateRequest) -> LiveRequest:
        arrived_ns = time.monotonic_ns()
        self._check(asked)
        space = await self.prefixes.open(asked.tenant)
        keys = self.prefixes.keys(space, asked.prompt_token_ids)
        if self._prefix_cache:
            await self.prefixes.look_beyond(space, keys[: _most_hit_blocks(asked.prompt_token_ids)])
        if self._ended is not None:
            raise self._ended
        live = LiveRequest(self._next_request, asked, space, arrived_ns)
        self._next_request += 1
        facts = self._begin(live, 0, keys)
        self._requests[live.request] = live
        self._driver.input(lambda s, now: s.submit(now, facts))
        return live

    def cancel(self, live: LiveRequest) -> None:
        """Cancel a request whose client has gone; nothing happens if it has ended already."""
        if self._requests.get(live.request) is live:
            self._driver.input(lambda s, now: s.cancel(now, live.request))

    def end_all(self, error: RequestError) -> None:
        """End every request with `error`, later ones too."""
        self._ended = error
        for live in list(self._requests.values()):
            self._end(live, error)

    def _check(self, asked: GenerateRequest) -> None:
        """Check what would harm other requests; the server has checked the rest. Raises RequestError."""
        prompt_tokens, max_tokens = len(asked.prompt_token_ids), asked.sampling.max_tokens
        if prompt_tokens < 1 or max_tokens < 1:
            raise RequestError(
                400, "empty_request", f"{prompt_tokens} prompt tokens and {max_tokens} to generate: both must be ≥ 1"
            )
        if not 0 <= min(asked.prompt_token_ids) <= max(asked.prompt_token_ids) < self.model.vocab_size:
            raise RequestError(400, "invalid_token", f"token ids must be from 0 to {self.model.vocab_size - 1}")
        # The last token is never computed on, so it needs no place in the context.
        if prompt_tokens + max_tokens - 1 > self.model.max_model_len_tokens:
            raise RequestError(
                400,
                "context_length_exceeded",
                overflow_message(self.model.max_model_len_tokens, prompt_tokens, max_tokens),
            )

    def _begin(self, live: LiveRequest, attempt: int, keys: list[BlockKey] | None = None) -> RequestFacts:
        """Match the prompt, plus generated tokens, against storage, and pin the hit blocks for this attempt."""
        prompt = live.asked.prompt_token_ids + live.generated
        if keys is None:
            keys = self.prefixes.keys(live.namespace, prompt)
        self.prefixes.unpin(live.request)
        hit_blocks = 0
        # A hit gives KV and no logits, so a prompt that is scored is computed.
        if self._prefix_cache and not live.recompute and not live.scores_prompt:
            hit_blocks = self.prefixes.match_and_pin(live.request, keys, _most_hit_blocks(prompt))
        return live.begin(attempt, prompt, keys, hit_blocks)

    # ── what engines report ─────────────────────────────────────────────────────────────────────────────────────────

    def on_message(self, engine: EngineId, message: m.FromEngine) -> None:
        """Handle one report. A report about a request or an attempt that is over is dropped and counted."""
        match message:
            case m.Tokens():
                for step in message.step:
                    live = self._live(step.request, step.attempt)
                    if live is not None:
                        live.emit(step.draw)
            case m.Stored():
                self.prefixes.publish(message.blocks)
            case m.Released():
                self._on_released(engine, message)
            case m.BufferFreed():
                self._driver.input(lambda s, now: s.buffer_freed(now, message.request, message.attempt, message.blocks))
            case _ if isinstance(message, _OF_ATTEMPTS):
                live = self._live(message.request, message.attempt)
                if live is not None:
                    self._on_attempt_message(engine, live, message)
            case _:
                self.stale_messages += 1

    def _live(self, request: RequestId, attempt: int) -> LiveRequest | None:
        live = self._requests.get(request)
        if live is None or not live.is_current(attempt):
            self.stale_messages += 1
            return None
        return live

    def _on_released(self, engine: EngineId, message: m.Released) -> None:
        if not message.quiet:
            self._unquiet[message.request, message.attempt] = engine
        self._driver.input(lambda s, now: s.released(now, message.request, message.attempt, engine))
        self._unquiet.pop((message.request, message.attempt), None)

    def _on_attempt_message(self, engine: EngineId, live: LiveRequest, message: m.FromEngine) -> None:
        attempt = live.current
        assert attempt is not None
        ids = (live.request, attempt.attempt)
        match message:
            case m.Prepared():
                attempt.decode_pages = message.pages
                attempt.stages.allocated()
                self._driver.input(lambda s, now: s.prepared(now, *ids))
            case m.Loaded():
                attempt.stages.loaded()
                self._driver.input(lambda s, now: s.loaded(now, *ids, message.side))
            case m.LoadFailed():
                self.prefixes.report_faults(message.faults)
                live.recompute |= not message.faults
                self._driver.input(lambda s, now: s.load_failed(now, *ids, message.side))
            case m.PrefillDone():
                attempt.first_draw = message.draw
                if live.cached_tokens is None:
                    live.cached_tokens = attempt.hit_tokens
                live.emit(message.draw)
                self._driver.input(lambda s, now: s.prefill_done(now, *ids))
            case m.PromptLogprobs():
                live.note_scores(message)
            case m.Refused():
                self._give_up(live, RequestError(400, "invalid_value", message.detail))
            case m.AttemptFailed():
                self._driver.input(lambda s, now: s.attempt_failed(now, *ids, engine, message.cause))
            case m.Finished():
                self._driver.input(lambda s, now: s.finished(now, *ids))

    # ── carrying out commands ───────────────────────────────────────────────────────────────────────────────────────

    def _carry_out(self, command: Command) -> None:
        live = self._requests.get(command.request)
        match command:
            case Abort():
                ids = (command.request, command.attempt)
                peer = self._unquiet.get(ids) if command.lost_peer is None else command.lost_peer
                self._links.send(command.engine, m.AbortAttempt(*ids, peer))
            case _ if live is None:
                if not isinstance(command, Cancelled):
                    raise RuntimeError(f"core commands {command} for a request that has ended")
            case Finish():
                self._end(live, live.reason or "stop")
            case Fail():
                self._end(live, request_error(command.cause, live.asked, self.model.max_model_len_tokens))
            case Cancelled():
                self._end(live, RequestError(499, "cancelled", "the client closed the request"))
            case Resubmit():
                self._resubmit(live, command.attempt)
            case Prepare() | Load() | Prefill() | Decode():
                self._instruct(live, command)

    def _instruct(self, live: LiveRequest, command: Prepare | Load | Prefill | Decode) -> None:
        assert live.current is not None
        stages, decode_address = live.current.stages, ""
        match command:
            case Prepare():
                stages.told()
            case Load():
                stages.allocated()
            case Prefill():
                # Every hit block is in a buffer now, so this attempt no longer needs the files.
                self.prefixes.unpin(live.request)
                decode = self._links.by_engine[command.decode_engine]
                decode_address = decode.join.data_address
                stages.decode_engine, stages.prefill_engine = decode.name, self._links.by_engine[command.engine].name
        try:
            self._links.send(command.engine, order(live, command, decode_address))
        except UnencodableMessageError as error:  # of the request's own values: it fails, and nothing else
            self._give_up(live, RequestError(400, "invalid_value", f"the request can't be sent to an engine: {error}"))

    def _resubmit(self, live: LiveRequest, attempt: int) -> None:
        """Start a new attempt, unless the failed one had generated everything: then only its persisting was lost."""
        if live.reason is not None:
            self._give_up(live, live.reason)
            return
        facts = self._begin(live, attempt)
        self._driver.input(lambda s, now: s.resubmit(now, facts))

    def _give_up(self, live: LiveRequest, outcome: str | RequestError) -> None:
        """End a request that core has not ended: core then takes it off the engines."""
        self._end(live, outcome)
        self._driver.input(lambda s, now: s.cancel(now, live.request))

    def _end(self, live: LiveRequest, outcome: str | RequestError) -> None:
        if self._requests.pop(live.request, None) is None:
            return
        self.prefixes.unpin(live.request)
        live.end(outcome)

    def gauges(self) -> Figures:
        return {
            metrics.REQUESTS_LIVE(): float(len(self._requests)),
            metrics.STALE_MESSAGES(): float(self.stale_messages),
            **self.prefixes.gauges(),
        }


def _most_hit_blocks(prompt: list[int]) -> int:
    """Returns the most blocks that may hit: one prompt token or more is computed, for the first token's logits."""
    return (len(prompt) - 1) // BLOCK_TOKENS


def request_error(cause: Cause, asked: GenerateRequest, context_tokens: int) -> RequestError:
    """Returns the HTTP status, code and message for a request that core has failed."""
    match cause:
        case Cause.OVERLOADED:
            return RequestError(429, "overloaded", "too many requests are waiting; try again shortly", 1.0)
        case Cause.NO_ENGINE:
            return RequestError(
                503, "no_engine", "no prefill engine or no decode engine is left to serve this request", 5.0
            )
        case Cause.TOO_LARGE:
            return RequestError(
                400,
                "context_length_exceeded",
                overflow_message(context_tokens, len(asked.prompt_token_ids), asked.sampling.max_tokens)
                + " The KV-cache of so many fits no engine of this cluster; a larger --buffer and --hbm would take it.",
            )
        case Cause.TIMEOUT:
            return RequestError(504, "deadline_exceeded", "the request was not served within its deadline", 5.0)
        case _:
            return RequestError(
                503, cause.value, f"the request failed on every attempt, last because of {cause.value}", 1.0
            )
