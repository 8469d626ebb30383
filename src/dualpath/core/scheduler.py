"""The scheduler: who prefills, who decodes, who reads, and what happens when something goes wrong.

Theory of operation. The scheduler is a synchronous state machine without a clock. A driver calls one method for each
event and passes the time; the call appends commands to an outbox, which `take_commands` drains. `next_wake` says when
to call `wake` if nothing happens earlier. The same inputs in the same order give the same commands.

```
 submit ──> QUEUED ──> ALLOCATING ──> LOADING ──> PREFILLING ──> DECODING ──> FINISHED
            waiting    ledger: DE     Prepare,    Prefill        Decode       Finish
            room       buffer, then   Load(s)
                       PE buffer
```

A request waits for a PE and a DE (`waiting`, `placement`), then gets its read path (`read_path`). A command that makes
an engine allocate is issued only when the `ledger` has room. Every answer of an engine is checked against the request's
attempt and state; stale answers are dropped and counted. So an exception raised here means a bug in the driver or core.

An attempt fails when an engine reports a failure, an engine is lost, or the deadline of its state passes. Engines that
were told of it get an Abort, and their blocks stay held until they answer. The driver then gets a Resubmit or a Fail.

A fetch places requests. Fetches run at most every `fetch_interval_ns`, and only after something has changed.

This file is the public face: it decides which inputs are stale. Read `lifecycle` next, then `withdrawal`.
"""

from dualpath.core import withdrawal
from dualpath.core.gauges import EngineLoad, load_of, statistics
from dualpath.core.ledger import Holding
from dualpath.core.lifecycle import Lifecycle
from dualpath.core.policy import Constants, Limits, Policy
from dualpath.core.request import Event, Request, State, check_facts
from dualpath.core.vocabulary import (
    Cause,
    Command,
    EngineFacts,
    EngineId,
    RequestFacts,
    RequestId,
    Side,
)


class Scheduler:
    """One cluster's scheduler. Every input takes `now` in nanoseconds and raises ValueError if `now` goes back."""

    def __init__(self, policy: Policy, constants: Constants, limits: Limits | None = None) -> None:
        self.life = Lifecycle(policy, constants, limits if limits is not None else Limits())
        """All books, for those who look: `audit`, gauges, tests."""

    @property
    def policy(self) -> Policy:
        return self.life.policy

    @property
    def constants(self) -> Constants:
        return self.life.constants

    @property
    def limits(self) -> Limits:
        return self.life.limits

    @property
    def now(self) -> int:
        """Time of the last input, 0 before the first."""
        return self.life.now

    # ── engines ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def engine_joined(self, now: int, facts: EngineFacts) -> None:
        """Add an engine. Raises ValueError when its facts are invalid or contradict those of other engines."""
        life = self.life
        life.begin(now)
        life.fleet.add(facts)
        life.ledger.open(facts)
        if life.vacant_until_ns and life.fleet.has_both_roles:
            life.vacant_until_ns = 0
            withdrawal.refuse_waiting(life)
        life.changed = True
        life.settle()

    def engine_lost(self, now: int, engine: EngineId) -> None:
        """The engine is gone for good, and the driver has made sure that it no longer touches other engines' memory."""
        life = self.life
        life.begin(now)
        if engine not in life.fleet.facts:
            life.counts["dropped_engine_lost"] += 1
            return
        withdrawal.lose(life, engine)
        life.settle()

    def engine_draining(self, now: int, engine: EngineId, draining: bool) -> None:
        """From now on the engine gets no more requests, or gets them again. What it has in hand goes on."""
        life = self.life
        life.begin(now)
        if engine not in life.fleet.facts:
            life.counts["dropped_engine_draining"] += 1
            return
        life.waiting.start_over()  # a request that waits for its other engine may have been promised this one
        life.fleet.drain(engine, draining)
        life.changed = True
        life.settle()

    # ── the driver's requests ───────────────────────────────────────────────────────────────────────────────────────

    def submit(self, now: int, facts: RequestFacts) -> None:
        """Start a new request at attempt 0. Raises ValueError when the facts are invalid or the id is in use."""
        life = self.life
        life.begin(now)
        check_facts(facts)
        if facts.attempt != 0 or facts.request in life.requests:
            raise ValueError(f"{facts}: a new request has attempt 0 and an id never used before")
        life.counts["submitted"] += 1
        request = life.requests[facts.request] = Request(facts)
        refusal = life.refusal(request)
        if refusal is None and len(life.waiting.requests) >= life.limits.max_waiting:
            refusal = Cause.OVERLOADED
        if refusal is not None:
            withdrawal.fail(life, request, refusal)
            return
        life.enqueue(request)
        life.settle()

    def resubmit(self, now: int, facts: RequestFacts) -> None:
        """The driver answers a `Resubmit`: `facts` is the next attempt, matched against storage again."""
        life = self.life
        life.begin(now)
        check_facts(facts)
        request = life.requests.get(facts.request)
        if request is None or request.state is not State.RETRYING or facts.attempt != request.attempt + 1:
            life.counts["dropped_resubmit"] += 1
            return
        request.begin_attempt(facts)
        refusal = life.refusal(request)
        if refusal is not None:
            withdrawal.fail(life, request, refusal)
            return
        request.move(Event.RESUBMIT)
        life.enqueue(request)
        life.settle()

    def cancel(self, now: int, request: RequestId) -> None:
        """The client went away: end the request."""
        life = self.life
        life.begin(now)
        live = life.requests.get(request)
        if live is None:
            life.counts["dropped_cancel"] += 1
            return
        withdrawal.cancel(life, live)
        life.settle()

    # ── what engines answer ─────────────────────────────────────────────────────────────────────────────────────────

    def prepared(self, now: int, request: RequestId, attempt: int) -> None:
        """The DE has reserved the attempt's buffer blocks."""
        life = self.life
        live = life.accept(now, "prepared", request, attempt)
        if live is None:
            return
        if live.prepared or live.decode_engine not in live.commanded:
            life.counts["dropped_prepared"] += 1
            return
        live.prepared = True
        life.prefill_if_ready(live)
        life.settle()

    def loaded(self, now: int, request: RequestId, attempt: int, side: Side) -> None:
        """The leg of `side` is in that side's buffer, and its checksums are verified."""
        life = self.life
        found = life.accept_leg(now, "loaded", request, attempt, side)
        if found is not None:
            life.leg_loaded(*found)
            life.settle()

    def load_failed(self, now: int, request: RequestId, attempt: int, side: Side) -> None:
        """A block of the leg is missing or fails its checksum; the driver will not offer it as a hit again."""
        life = self.life
        found = life.accept_leg(now, "load_failed", request, attempt, side)
        if found is not None:
            withdrawal.fail_attempt(life, found[0], Cause.LOAD_FAILED)
            life.settle()

    def prefill_done(self, now: int, request: RequestId, attempt: int) -> None:
        """The prompt's KV is in the DE buffer, the first token is sent, and the PE holds nothing of the attempt."""
        life = self.life
        live = life.accept(now, "prefill_done", request, attempt)
        if live is None:
            return
        life.prefilled(live)
        life.settle()

    def buffer_freed(self, now: int, request: RequestId, attempt: int, blocks: int) -> None:
        """The DE has freed `blocks` more of the attempt's buffer blocks.

        A duplicate is caught only when the attempt holds fewer blocks than that: the channel must not repeat messages.
        """
        life = self.life
        live = life.accept(now, "buffer_freed", request, attempt)
        if live is None:
            return
        assert live.decode_engine is not None
        if not life.ledger.free_buffer(live.decode_engine, live.key, blocks):
            life.counts["dropped_buffer_freed"] += 1
            return
        life.freed(live.decode_engine)
        life.settle()

    def finished(self, now: int, request: RequestId, attempt: int) -> None:
        """The DE has sent all tokens, persisted all full blocks, and holds nothing of the attempt."""
        life = self.life
        live = life.accept(now, "finished", request, attempt)
        if live is None:
            return
        life.finished(live)
        life.settle()

    def attempt_failed(self, now: int, request: RequestId, attempt: int, engine: EngineId, cause: Cause) -> None:
        """`engine` cannot continue the attempt; it keeps the attempt's blocks until it gets an Abort."""
        life = self.life
        live = life.accept(now, "attempt_failed", request, attempt)
        if live is None:
            return
        if engine not in live.commanded:
            life.counts["dropped_attempt_failed"] += 1
            return
        withdrawal.fail_attempt(life, live, cause, engine)
        life.settle()

    def released(self, now: int, request: RequestId, attempt: int, engine: EngineId) -> None:
        """The engine answers an Abort: nothing can touch the attempt's blocks any more, and they are free."""
        life = self.life
        life.begin(now)
        at = (engine, request, attempt)
        if not life.aborts.awaited(at):
            life.counts["dropped_released"] += 1
            return
        withdrawal.abort_answered(life, at)
        life.settle()

    # ── time and commands ───────────────────────────────────────────────────────────────────────────────────────────

    def wake(self, now: int) -> None:
        """Act on deadlines that have passed, and fetch if a fetch is due. Early or repeated calls are harmless."""
        life = self.life
        life.begin(now)
        for request in life.deadlines.pop_due(now):
            withdrawal.expire(life, request)
        life.aborts.expire(now)
        if 0 < life.vacant_until_ns <= now:
            life.vacant_until_ns = 0
            withdrawal.refuse_waiting(life)
        life.settle()

    def next_wake(self) -> int | None:
        """Returns the latest time at which `wake` must be called; None while there is nothing to wait for."""
        life = self.life
        at_ns = life.deadlines.earliest()
        if life.aborts.in_time:
            release_ns = life.aborts.earliest()
            at_ns = release_ns if at_ns is None else min(at_ns, release_ns)
        if life.waiting.requests:
            fetch_ns = life.next_fetch_ns if life.changed and life.fleet.has_both_roles else None
            for wanted_ns in (fetch_ns, life.vacant_until_ns or None):
                if wanted_ns is not None and (at_ns is None or wanted_ns < at_ns):
                    at_ns = wanted_ns
        return at_ns

    def take_commands(self) -> list[Command]:
        """Returns the commands since the last call; the driver must carry them out in this order."""
        life = self.life
        if not life.outbox:
            return []
        commands, life.outbox = life.outbox, []
        return commands

    # ── what to look at ─────────────────────────────────────────────────────────────────────────────────────────────

    def statistics(self) -> dict[str, int]:
        """Returns counts since the start (``dropped_…`` are stale inputs), then the current gauges."""
        return statistics(self.life)

    def load_of(self, engine: EngineId) -> EngineLoad:
        """Returns one engine's load. Raises KeyError when the engine is not in the cluster."""
        return load_of(self.life, engine)

    def engines(self) -> tuple[EngineFacts, ...]:
        """Returns the cluster's engines, in the order they joined."""
        return tuple(self.life.fleet.facts.values())

    def held(self) -> tuple[Holding, ...]:
        """Returns what every attempt holds at every engine; empty when the cluster is idle."""
        return tuple(self.life.ledger.holdings())
