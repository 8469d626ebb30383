"""Requests on engines: what engines report of them, and core's commands.

Every input goes through the driver to core's scheduler. Each command that follows comes back to `_carry_out`, which
makes it a control message (`live_request.order`) or a client's last event. There is no policy in this file.

An answer's last event is sent after `Finished`, when its blocks are durable: the agent's next turn will hit them.
"""

import logging
from collections.abc import AsyncGenerator
from typing import Any
from weakref import WeakValueDictionary

from dualpath.cluster import messages as m
from dualpath.cluster.coordinator.driver import SchedulerDriver
from dualpath.cluster.coordinator.links import EngineLinks, UnencodableMessageError
from dualpath.cluster.coordinator.live_request import LiveRequest, order
from dualpath.cluster.coordinator.open_requests import OpenRequests
from dualpath.cluster.coordinator.refusals import request_error
from dualpath.cluster.coordinator.report_checks import can_report
from dualpath.cluster.generator import GeneratedTokens, GenerateRequest, RequestError
from dualpath.core.scheduler import Scheduler
from dualpath.core.vocabulary import (
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
    RequestId,
    Resubmit,
    Role,
)
from dualpath.spec import metrics
from dualpath.spec.log import ROOT
from dualpath.spec.metrics import Figures
from dualpath.spec.timings import Timings

logger = logging.getLogger(f"{ROOT}.cluster")

_OF_ATTEMPTS = (
    m.Prepared, m.Loaded, m.LoadFailed, m.PromptLogprobs, m.PrefillDone, m.AttemptFailed, m.Refused, m.Finished
)  # fmt: skip
Report = (
    m.Prepared | m.Loaded | m.LoadFailed | m.PromptLogprobs | m.PrefillDone | m.AttemptFailed | m.Refused | m.Finished
    | m.BufferFreed | m.StepTokens
)  # fmt: skip


class Serving:
    """Between a founded cluster's engines and core. Used from one asyncio thread."""

    def __init__(
        self, requests: OpenRequests, links: EngineLinks, driver: SchedulerDriver, scheduler: Scheduler
    ) -> None:
        self.requests = requests
        self._prefixes = requests.prefixes
        self._links = links
        self._driver = driver
        self._unquiet: dict[tuple[RequestId, int], EngineId] = {}
        """PEs whose transfers for an aborted attempt failed half-way; an entry is removed when the DE is told."""
        self._handed_off: WeakValueDictionary[RequestId, LiveRequest] = WeakValueDictionary()
        """Requests that a router may ask about: while it listens to them, also when they have ended."""
        self.stale_messages = 0
        self.foreign_messages = 0
        """Reports that their engine can't make."""
        driver.begin(scheduler, self._carry_out)

    # ── what clients, and the router of vLLM servers, ask ───────────────────────────────────────────────────────────

    async def stream(self, request: GenerateRequest, routed: bool) -> AsyncGenerator[Any, None]:
        """See `cluster.generator.Generator.generate`, and `Router.route` where the request is `routed`."""
        live = await self.requests.submit(request, routed)
        try:
            while True:
                event = await live.events.get()
                if isinstance(event, RequestError):
                    raise event
                yield event
                if isinstance(event, GeneratedTokens) and event.finish_reason is not None:
                    return
        finally:
            live.owner = None
            self.requests.cancel(live)

    def hand_off_failed(self, owner: tuple[int, int], why: str) -> None:
        """See `cluster.generator.Router.hand_off_failed`."""
        live = self.requests.running.get(owner[0])
        if live is not None and live.owner == owner and live.current is not None:
            engine = live.current.decode_engine
            assert engine is not None
            logger.warning("%s does not answer request %d: %s", self._links.by_engine[engine].name, owner[0], why)
            self._driver.input(lambda s, now: s.attempt_failed(now, *owner, engine, Cause.COMPUTE_FAILED))

    def answered(self, owner: tuple[int, int]) -> Timings | None:
        """See `cluster.generator.Router.answered`."""
        live = self._handed_off.get(owner[0])
        return live.stamp() if live is not None and live.owner == owner else None

    # ── what engines report ─────────────────────────────────────────────────────────────────────────────────────────

    def on_message(self, engine: EngineId, message: m.FromEngine) -> None:
        """Handle one report. A report about a request or an attempt that is over is dropped and counted."""
        match message:
            case m.Tokens():
                for step in message.step:
                    live = self._live(engine, step)
                    if live is not None:
                        live.emit(step.draw)
            case m.Stored():
                if self._links.by_engine[engine].join.role is Role.DECODE:
                    self._prefixes.publish(message.blocks)
                else:
                    self.foreign_messages += 1
            case m.Released():
                self._on_released(engine, message)
            case m.BufferFreed() if self._is_foreign(engine, message):
                self.foreign_messages += 1
            case m.BufferFreed():
                self._driver.input(lambda s, now: s.buffer_freed(now, message.request, message.attempt, message.blocks))
            case _ if isinstance(message, _OF_ATTEMPTS):
                live = self._live(engine, message)
                if live is not None:
                    self._on_attempt_message(engine, live, message)
            case _:
                self.stale_messages += 1

    def _live(self, engine: EngineId, report: Report) -> LiveRequest | None:
        """Returns the request that `engine` can report so about; None, and it is counted, when there is none."""
        live = self.requests.running.get(report.request)
        if live is None or not live.is_current(report.attempt):
            self.stale_messages += 1
            return None
        if self._is_foreign(engine, report):
            self.foreign_messages += 1
            return None
        return live

    def _is_foreign(self, engine: EngineId, report: Report) -> bool:
        live = self.requests.running.get(report.request)
        if live is None or live.current is None or not live.is_current(report.attempt):
            return False
        too_many = isinstance(report, m.StepTokens) and live.reason is not None
        vocab_size = self.requests.model.vocab_size
        return too_many or not can_report(engine, live.current, report, vocab_size, live.routed)

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
                attempt.loaded_legs += 1
                self._driver.input(lambda s, now: s.loaded(now, *ids, message.side))
            case m.LoadFailed():
                self._prefixes.report_faults(message.faults)
                live.recompute |= not message.faults
                self._driver.input(lambda s, now: s.load_failed(now, *ids, message.side))
            case m.PrefillDone():
                attempt.prefilled, attempt.first_draw = True, message.draw
                if live.cached_tokens is None or live.routed:
                    live.cached_tokens = attempt.hit_tokens
                if message.draw is not None:
                    live.emit(message.draw)
                self._driver.input(lambda s, now: s.prefill_done(now, *ids))
            case m.PromptLogprobs():
                live.note_scores(message)
            case m.Refused():
                self.requests.give_up(live, RequestError(400, "invalid_value", message.detail))
            case m.AttemptFailed():
                self._driver.input(lambda s, now: s.attempt_failed(now, *ids, engine, message.cause))
            case m.Finished():
                live.ended_as = message.finish_reason if live.routed else None
                self._driver.input(lambda s, now: s.finished(now, *ids))

    # ── carrying out commands ───────────────────────────────────────────────────────────────────────────────────────

    def _carry_out(self, command: Command) -> None:
        live = self.requests.running.get(command.request)
        match command:
            case Abort():
                ids = (command.request, command.attempt)
                peer = self._unquiet.get(ids) if command.lost_peer is None else command.lost_peer
                self._links.send(command.engine, m.AbortAttempt(*ids, peer))
            case _ if live is None:
                if not isinstance(command, Cancelled):
                    raise RuntimeError(f"core commands {command} for a request that has ended")
            case Finish():
                self.requests.end(live, live.reason or "stop")
            case Fail():
                context_tokens = self.requests.model.max_model_len_tokens
                self.requests.end(live, request_error(command.cause, live.asked, context_tokens))
            case Cancelled():
                self.requests.end(live, RequestError(499, "cancelled", "the client closed the request"))
            case Resubmit():
                self._resubmit(live, command)
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
                self._prefixes.unpin(live.request)
                decode = self._links.by_engine[command.decode_engine]
                decode_address = decode.join.data_address
                stages.decode_engine, stages.prefill_engine = decode.name, self._links.by_engine[command.engine].name
        try:
            self._links.send(command.engine, order(live, command, decode_address))
        except UnencodableMessageError as error:  # of the request's own values: it fails, and nothing else
            self.requests.give_up(
                live, RequestError(400, "invalid_value", f"the request can't be sent to an engine: {error}")
            )
            return
        if live.routed and isinstance(command, Decode):
            join = self._links.by_engine[command.engine].join
            self._handed_off[live.request] = live
            live.hand_off(join.url, join.model, join.dp_rank)

    def _resubmit(self, live: LiveRequest, command: Resubmit) -> None:
        """Start a new attempt, unless the failed one had generated everything: then only its persisting was lost.

        A routed request that a client has got a part of can't go on elsewhere.
        """
        # A store that has not brought a prefix until the deadline is too slow for it.
        live.recompute |= command.cause is Cause.TIMEOUT and live.reads
        if live.reason is not None:
            self.requests.give_up(live, live.reason)
            return
        if live.routed and live.answered:
            context_tokens = self.requests.model.max_model_len_tokens
            self.requests.give_up(live, request_error(command.cause, live.asked, context_tokens))
            return
        facts = self.requests.begin(live, command.attempt)
        self._driver.input(lambda s, now: s.resubmit(now, facts))

    def gauges(self) -> Figures:
        return {
            metrics.REQUESTS_LIVE(): float(len(self.requests)),
            metrics.REQUESTS_PARKED(): float(len(self.requests.parking)),
            metrics.STALE_MESSAGES(): float(self.stale_messages),
            metrics.FOREIGN_MESSAGES(): float(self.foreign_messages),
            **self._prefixes.gauges(),
        }
