"""How a request moves through its life: the steps that `scheduler` takes once it has decided that an input is news.

Every step keeps four books together: the fleet's columns (load and read queues), the ledger (blocks), the waiting room
(lines) and the deadlines; and it says what must be done by appending commands to the outbox. Freed blocks and changed
loads are only noted; `settle`, the end of every input, serves the buffer lines and runs a fetch if one is due, so that
older requests get freed blocks before newer ones are placed.
"""

from dualpath.core.deadlines import Deadlines
from dualpath.core.engines import Fleet
from dualpath.core.ledger import Ledger
from dualpath.core.policy import Constants, Limits, Policy
from dualpath.core.read_path import choose_legs, least_pe_blocks
from dualpath.core.request import ACCEPTS, Event, Request, State, hbm_blocks, hit_blocks, prompt_blocks
from dualpath.core.vocabulary import (
    Abort,
    Cause,
    Command,
    EngineId,
    Fail,
    Leg,
    Load,
    Prefill,
    Prepare,
    RequestFacts,
    RequestId,
    Resubmit,
    Side,
)
from dualpath.core.waiting import WaitingRoom


class Lifecycle:
    """All that is known of engines and requests, and the steps that change it."""

    def __init__(self, policy: Policy, constants: Constants, limits: Limits) -> None:
        self.policy = policy
        self.constants = constants
        self.limits = limits
        self.fleet = Fleet()
        self.ledger = Ledger(self.fleet.decode)
        self.waiting = WaitingRoom(policy, constants, self.fleet, self.ledger)
        self.requests: dict[RequestId, Request] = {}
        self.deadlines: Deadlines[RequestId] = Deadlines()
        self.releases: Deadlines[tuple[int, int, int]] = Deadlines()
        """Unanswered Aborts in time, by (engine, request, attempt)."""
        self.overdue: dict[tuple[int, int, int], None] = {}
        """Unanswered Aborts out of time."""
        self.behind: dict[tuple[int, int, int], EngineId] = {}
        """DEs whose Abort waits for their PE's answer, by the PE's (engine, request, attempt)."""
        self.outbox: list[Command] = []
        self.counts: dict[str, int] = {}
        self.now = 0
        self.next_fetch_ns = 0
        self.changed = False
        """Something happened since the last fetch that may let it place more."""
        self._freed: list[EngineId] = []
        self._turn = 0
        self._stay_ns = {
            State.QUEUED: limits.queue_ns,
            State.ALLOCATING: limits.queue_ns,
            State.LOADING: limits.load_ns,
            State.PREFILLING: limits.prefill_ns,
            State.DECODING: limits.decode_ns,
            State.RETRYING: limits.queue_ns,
        }

    def begin(self, now: int) -> None:
        """Every input starts here. Raises ValueError where time goes back."""
        if now < self.now:
            raise ValueError(f"now is {now} ns after {self.now} ns: a driver's clock must be monotonic")
        self.now = now

    def count(self, name: str, n: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + n

    def accept(self, name: str, request: RequestId, attempt: int) -> Request | None:
        """The request, if input `name` is news for this attempt of it; else None, counted as dropped."""
        live = self.requests.get(request)
        if live is not None and live.facts.attempt == attempt and live.state in ACCEPTS[name]:
            return live
        self.count(f"dropped_{name}")
        return None

    def accept_leg(self, name: str, request: RequestId, attempt: int, side: Side) -> tuple[Request, Leg] | None:
        """Like `accept`, for a leg that was commanded and has not arrived."""
        live = self.accept(name, request, attempt)
        if live is None:
            return None
        for leg in live.unloaded:
            if leg.side is side and live.engine_of(side) in live.commanded:
                return live, leg
        self.count(f"dropped_{name}")
        return None

    # ── forward ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def refusal(self, facts: RequestFacts) -> Cause | None:
        """Why no engine could ever take the request; None where some could."""
        pe_blocks = least_pe_blocks(self.policy.read_path, hit_blocks(facts))
        return self.fleet.refusal(pe_blocks, prompt_blocks(facts), hbm_blocks(facts))

    def enqueue(self, request: Request) -> None:
        self._arm(request)
        self.waiting.join(request)
        self.changed = True

    def move(self, request: Request, event: Event) -> None:
        request.move(event)
        self._arm(request)

    def settle(self) -> None:
        """Every input ends here: hand on what it freed, and fetch if that is due."""
        if self._freed:
            self.changed = True
            freed, self._freed = self._freed, []
            for engine in freed:
                self._serve_line(engine)
        if self.changed and self.waiting and self.now >= self.next_fetch_ns:
            self.changed = False
            self.next_fetch_ns = self.now + self.constants.fetch_interval_ns
            self.count("fetches")
            for request in self.waiting.fetch():
                self._place(request)

    def freed(self, engine: EngineId) -> None:
        """The engine has room, or load, to spare: see to it in `settle`."""
        self._freed.append(engine)

    def leg_loaded(self, request: Request, leg: Leg) -> None:
        engine = request.engine_of(leg.side)
        assert engine is not None
        self.fleet.end_read(engine, leg)
        request.unloaded = tuple(other for other in request.unloaded if other is not leg)
        self.prefill_if_ready(request)

    def prefill_if_ready(self, request: Request) -> None:
        if request.state is State.LOADING and request.prepared and not request.unloaded:
            prefill, decode = request.prefill_engine, request.decode_engine
            assert prefill is not None and decode is not None
            if prefill not in request.commanded:
                request.commanded = (prefill, decode)
            self.move(request, Event.LOAD)
            self.outbox.append(Prefill(*request.key, prefill, decode))

    def _place(self, request: Request) -> None:
        """Both engines are known: choose the read path and line up for DE buffer."""
        prefill, decode = request.prefill_engine, request.decode_engine
        assert prefill is not None and decode is not None
        blocks = hit_blocks(request.facts)
        request.legs = choose_legs(
            self.policy.read_path,
            hit_blocks=blocks,
            pe_queue_tokens=self.fleet.read_queue_tokens(prefill),
            de_queue_tokens=self.fleet.read_queue_tokens(decode),
            pe_buffer_blocks=self.fleet.facts[prefill].buffer_blocks,
            turn=self._turn,
        )
        self._turn += blocks > 0
        request.unloaded = request.legs
        for leg in request.legs:
            self.fleet.start_read(prefill if leg.side is Side.PE else decode, leg)
            self.count("pe_read_blocks" if leg.side is Side.PE else "de_read_blocks", leg.blocks)
        self.count("placed")
        self.move(request, Event.PLACE)
        self.ledger.line_up(decode, request.key, prompt_blocks(request.facts))
        self._serve_line(decode)

    def _serve_line(self, engine: EngineId) -> None:
        if engine not in self.ledger.accounts:
            return  # lost in the same input
        while (key := self.ledger.grant_next(engine)) is not None:
            request = self.requests[key[0]]
            request.commanded = (engine, *request.commanded)
            if engine == request.decode_engine:
                self._prepare(request, engine)
            else:
                self._load(request, Side.PE, engine)
                self.move(request, Event.ALLOCATE)

    def _prepare(self, request: Request, decode: EngineId) -> None:
        """The DE buffer is granted: start there, and line up for the PE buffer if the PE side reads."""
        facts = request.facts
        self.outbox.append(Prepare(*request.key, decode, prompt_blocks(facts), hbm_blocks(facts)))
        self._load(request, Side.DE, decode)
        prefill = request.prefill_engine
        assert prefill is not None
        pe_blocks = sum(leg.blocks for leg in request.legs if leg.side is Side.PE)
        if pe_blocks:
            self.ledger.line_up(prefill, request.key, pe_blocks)
            self._serve_line(prefill)
        else:
            self.move(request, Event.ALLOCATE)

    def _load(self, request: Request, side: Side, engine: EngineId) -> None:
        self.outbox += [Load(*request.key, engine, leg) for leg in request.legs if leg.side is side]

    def _arm(self, request: Request) -> None:
        stay_ns = self._stay_ns[request.state]
        if request.state is State.DECODING:
            stay_ns += self.limits.decode_ns_per_token * request.facts.max_new_tokens
        self.deadlines.set(request.id, self.now + stay_ns)

    # ── back and out ────────────────────────────────────────────────────────────────────────────────────────────────

    def fail_attempt(self, request: Request, cause: Cause) -> None:
        """Take the attempt off its engines, and try again if that is still allowed."""
        self.withdraw(request)
        self.retry(request, cause)

    def withdraw(self, request: Request, lost: EngineId | None = None) -> None:
        """Off every engine and line: engines that were told get an Abort and keep the blocks, the rest is free."""
        if request.state is State.QUEUED:
            self.waiting.leave(request)
            self.changed = True
        elif request.state is not State.RETRYING:
            self._abort(request, lost)

    def _abort(self, request: Request, lost: EngineId | None) -> None:
        """The PE first: what it says, or its loss, is the DE's proof that nobody writes into its blocks any more."""
        prefill, decode = request.prefill_engine, request.decode_engine
        tokens = request.facts.prompt_tokens
        for leg in request.unloaded:
            engine = request.engine_of(leg.side)
            assert engine is not None
            self.fleet.end_read(engine, leg)
        if prefill is not None:
            self.fleet.prefill.end(prefill, tokens)
        assert decode is not None
        self.fleet.decode.end(decode, tokens)
        for engine in (prefill, decode):
            if engine is None:
                continue
            if engine in request.commanded and engine != lost:
                self.ledger.drain(engine, request.key)
                if engine == decode and prefill in request.commanded and prefill != lost:
                    assert prefill is not None
                    self.behind[prefill, *request.key] = decode
                else:
                    self._send_abort(engine, request.key, lost)
            else:
                self.ledger.give_back(engine, request.key)
            self.freed(engine)
        request.leave_engines()

    def _send_abort(self, engine: EngineId, key: tuple[RequestId, int], lost: EngineId | None) -> None:
        self.releases.set((engine, *key), self.now + self.limits.release_ns)
        self.outbox.append(Abort(*key, engine, lost))

    def awaits_release(self, engine: EngineId, key: tuple[RequestId, int]) -> bool:
        return (engine, *key) in self.overdue or (engine, *key) in self.releases

    def abort_answered(self, engine: EngineId, key: tuple[RequestId, int]) -> None:
        """The engine has given everything back; the DE behind it is next."""
        self.ledger.give_back(engine, key)
        self.releases.drop((engine, *key))
        self.overdue.pop((engine, *key), None)
        decode = self.behind.pop((engine, *key), None)
        if decode is not None:
            self._send_abort(decode, key, None)
        self.freed(engine)

    def expire(self, request: Request) -> None:
        """The deadline of the request's state has passed."""
        if request.state in (State.QUEUED, State.RETRYING):
            self.withdraw(request)
            self.fail(request, Cause.TIMEOUT)
        else:
            self.fail_attempt(request, Cause.TIMEOUT)

    def lose(self, engine: EngineId) -> None:
        """Take an engine out, and see what becomes of every request."""
        self.waiting.start_over()
        victims = [live for live in self.requests.values() if engine in (live.prefill_engine, live.decode_engine)]
        for request in victims:
            self.withdraw(request, lost=engine)
        self.fleet.remove(engine)
        self.ledger.close(engine)
        for key in self.releases.keys():  # noqa: SIM118 (a list: it changes under the loop)
            if key[0] == engine:
                self.releases.drop(key)
        self.overdue = {key: None for key in self.overdue if key[0] != engine}
        behind, self.behind = self.behind, {}
        for key, decode in behind.items():
            if key[0] == engine:
                self._send_abort(decode, key[1:], engine)
            elif decode != engine:
                self.behind[key] = decode
        for request in victims:
            self.retry(request, Cause.ENGINE_LOST)
        for request in list(self.waiting.requests.values()):
            refusal = self.refusal(request.facts)
            if refusal is not None:
                self.withdraw(request)
                self.fail(request, refusal)
        self.changed = True

    def retry(self, request: Request, cause: Cause) -> None:
        """After `withdraw`: ask for the next attempt, or give up."""
        if not self.fleet.prefill or not self.fleet.decode:
            self.fail(request, Cause.NO_ENGINE)
        elif request.facts.attempt + 1 >= self.limits.max_attempts:
            self.fail(request, cause)
        else:
            self.count(f"retried_{cause.value}")
            self.move(request, Event.RETRY)
            self.outbox.append(Resubmit(request.id, request.facts.attempt + 1, cause))

    def fail(self, request: Request, cause: Cause) -> None:
        self.count(f"failed_{cause.value}")
        self.end(request, Event.FAIL)
        self.outbox.append(Fail(request.id, cause))

    def end(self, request: Request, event: Event) -> None:
        """To a terminal state; core forgets the request."""
        request.move(event)
        self.deadlines.drop(request.id)
        del self.requests[request.id]
