"""The steps that move a request forward. `scheduler` takes them once it knows that an input is not stale.

The steps that end an attempt early, when something fails, are in `withdrawal`; read it next.

Every step keeps four records consistent: the fleet's columns (load and read queues), the ledger (blocks), the waiting
room (lines) and the deadlines. It appends commands to the outbox. A step only notes freed blocks and changed loads.
Every input ends with `settle`, which serves the buffer lines and runs a fetch if one is due. Older requests therefore
get freed blocks before newer ones are placed.
"""

from dualpath.core.counts import COUNTS
from dualpath.core.deadlines import Aborts, Deadlines
from dualpath.core.fleet import Fleet
from dualpath.core.ledger import Ledger
from dualpath.core.placement import PLACEMENTS
from dualpath.core.policy import FOREVER_NS, Constants, Limits, Policy
from dualpath.core.read_path import PathFacts, choose_legs, find_read_path, least_pe_blocks
from dualpath.core.request import ACCEPTS, NEVER_NS, Event, Request, State, pe_buffer_blocks
from dualpath.core.vocabulary import (
    Cause,
    Command,
    Decode,
    EngineId,
    Finish,
    Leg,
    Load,
    Prefill,
    Prepare,
    RequestId,
    Side,
)
from dualpath.core.waiting import WaitingRoom


class Lifecycle:
    """The state of all engines and requests, and the steps that change it."""

    def __init__(self, policy: Policy, constants: Constants, limits: Limits) -> None:
        self.policy = policy
        self._read_path = find_read_path(policy.read_path)
        self.constants = constants
        self.limits = limits
        self.fleet = Fleet()
        self.ledger = Ledger(self.fleet.decode)
        self.waiting = WaitingRoom(
            PLACEMENTS.get(policy.placement)(constants), self._read_path, self.fleet, self.ledger
        )
        self.requests: dict[RequestId, Request] = {}
        self.deadlines = Deadlines(self.requests)
        self.aborts = Aborts(limits.release_ns)
        self.outbox: list[Command] = []
        self.counts = dict.fromkeys(COUNTS, 0)
        self.now = 0
        self.next_fetch_ns = 0
        self.vacant_until_ns = 0
        """Until then requests wait for a new PE or DE; at or before `now`: they don't."""
        self.changed = False
        """True when something since the last fetch may let the next one place more."""
        self._freed: list[EngineId] = []
        self._turn = 0
        stay_ns = {
            State.QUEUED: limits.queue_ns,
            State.ALLOCATING: limits.queue_ns,
            State.LOADING: limits.load_ns,
            State.PREFILLING: limits.prefill_ns,
            State.DECODING: limits.decode_ns,
            State.RETRYING: limits.queue_ns,
        }
        self.stay_ns = {state: limit if limit < FOREVER_NS else NEVER_NS for state, limit in stay_ns.items()}
        """The longest stay in each live state; NEVER_NS means no limit."""

    def begin(self, now: int) -> None:
        """Start an input; every input calls this first. Raises ValueError when time goes back."""
        if now < self.now:
            raise ValueError(f"now is {now} ns after {self.now} ns: a driver's clock must be monotonic")
        self.now = now

    def accept(self, now: int, name: str, request: RequestId, attempt: int) -> Request | None:
        """Start an engine's input `name`. Returns the request; None, and counts a drop, when the input is stale."""
        if now != self.now:
            self.begin(now)
        live = self.requests.get(request)
        if live is not None and live.attempt == attempt and live.state in ACCEPTS[name]:
            return live
        self.counts[f"dropped_{name}"] += 1
        return None

    def accept_leg(
        self, now: int, name: str, request: RequestId, attempt: int, side: Side
    ) -> tuple[Request, Leg] | None:
        """Like `accept`, for an input about a leg; an input about a leg that is not being read is stale too."""
        live = self.accept(now, name, request, attempt)
        if live is None:
            return None
        for leg in live.unloaded:
            if leg.side is side and live.engine_of(side) in live.commanded:
                return live, leg
        self.counts[f"dropped_{name}"] += 1
        return None

    def refusal(self, request: Request) -> Cause | None:
        """Returns why no engine could ever take the request; None when some engine could, or one that is to come."""
        if self.awaits_replacement:
            return None
        pe_blocks = least_pe_blocks(self._read_path, request.hit_blocks)
        return self.fleet.refusal(pe_blocks, request.prompt_blocks, request.hbm_blocks)

    @property
    def awaits_replacement(self) -> bool:
        """Whether a role has lost its last engine, not long ago."""
        return self.now < self.vacant_until_ns and not self.fleet.has_both_roles

    def enqueue(self, request: Request) -> None:
        self.deadlines.set(request, self.now + self.stay_ns[State.QUEUED])
        self.waiting.join(request)
        self.changed = True

    def move(self, request: Request, event: Event) -> None:
        """Take the transition and set the deadline of the new state."""
        request.move(event)
        state = request.state
        stay_ns = self.stay_ns[state]
        if stay_ns == NEVER_NS == request.deadline_ns:
            return
        if state is State.DECODING:
            stay_ns += self.limits.decode_ns_per_token * request.facts.max_new_tokens
        self.deadlines.set(request, self.now + stay_ns)

    def settle(self) -> None:
        """End an input: grant the blocks that it freed to those in line, and fetch if a fetch is due."""
        if self._freed:
            freed, self._freed = self._freed, []
            for engine in freed:
                self._serve_line(engine)
        if self.changed and self.now >= self.next_fetch_ns and self.waiting.requests and self.fleet.has_both_roles:
            self.changed = False
            self.next_fetch_ns = self.now + self.constants.fetch_interval_ns
            self.counts["fetches"] += 1
            for request in self.waiting.fetch():
                self._place(request)

    def freed(self, engine: EngineId) -> None:
        """Note that the engine has freed blocks or load, for `settle`."""
        self.changed = True
        if self.ledger.has_line(engine):
            self._freed.append(engine)

    def leg_loaded(self, request: Request, leg: Leg) -> None:
        engine = request.engine_of(leg.side)
        assert engine is not None
        self.fleet.end_read(engine, leg)
        left = request.unloaded
        request.unloaded = () if len(left) == 1 else tuple(other for other in left if other is not leg)
        self.prefill_if_ready(request)

    def prefill_if_ready(self, request: Request) -> None:
        if request.prepared and not request.unloaded and request.state is State.LOADING:
            prefill, decode = request.prefill_engine, request.decode_engine
            assert prefill is not None and decode is not None
            if prefill not in request.commanded:
                request.commanded = (prefill, decode)
            self.move(request, Event.LOAD)
            self.outbox.append(Prefill(request.id, request.attempt, prefill, decode))

    def prefilled(self, request: Request) -> None:
        """The PE holds nothing of the attempt any more; the DE takes over."""
        prefill, decode = request.prefill_engine, request.decode_engine
        assert prefill is not None and decode is not None
        self.fleet.prefill.end(prefill, request.facts.prompt_tokens)
        self.ledger.give_back(prefill, request.key)
        self.freed(prefill)
        request.prefill_engine = None
        request.commanded = (decode,)
        self.move(request, Event.PREFILL)
        self.outbox.append(Decode(request.id, request.attempt, decode))

    def finished(self, request: Request) -> None:
        """The DE holds nothing of the attempt any more; the request is complete."""
        decode = request.decode_engine
        assert decode is not None
        self.fleet.decode.end(decode, request.facts.prompt_tokens)
        self.ledger.give_back(decode, request.key)
        self.freed(decode)
        self.counts["finished"] += 1
        self.end(request, Event.FINISH)
        self.outbox.append(Finish(request.id))

    def _place(self, request: Request) -> None:
        """Both engines are chosen: choose the read path and line up for the DE buffer."""
        prefill, decode = request.prefill_engine, request.decode_engine
        assert prefill is not None and decode is not None
        fleet = self.fleet
        if request.hit_blocks:
            facts = PathFacts(
                request.hit_blocks,
                fleet.read_queue_tokens(prefill),
                fleet.read_queue_tokens(decode),
                fleet.facts[prefill].buffer_blocks,
                self._turn,
            )
            request.legs = request.unloaded = choose_legs(self._read_path, facts)
            self._turn += 1
        for leg in request.legs:
            if leg.side is Side.PE:
                fleet.start_read(prefill, leg)
                self.counts["pe_read_blocks"] += leg.blocks
            else:
                fleet.start_read(decode, leg)
                self.counts["de_read_blocks"] += leg.blocks
        self.counts["placed"] += 1
        self.move(request, Event.PLACE)
        if self.ledger.line_up(decode, request.key, request.prompt_blocks):
            self._prepare(request, decode)

    def _serve_line(self, engine: EngineId) -> None:
        if engine not in self.ledger.accounts:
            return  # lost in the same input
        while (key := self.ledger.grant_next(engine)) is not None:
            request = self.requests[key[0]]
            if engine == request.decode_engine:
                self._prepare(request, engine)
            else:
                self._allocated(request)

    def _prepare(self, request: Request, decode: EngineId) -> None:
        """The DE buffer is granted: command the DE, and line up for the PE buffer if the PE side reads or stages."""
        request.commanded = (decode, *request.commanded)
        self.outbox.append(Prepare(request.id, request.attempt, decode, request.prompt_blocks, request.hbm_blocks))
        for leg in request.legs:
            if leg.side is Side.DE:
                self.outbox.append(Load(request.id, request.attempt, decode, leg))
        prefill = request.prefill_engine
        assert prefill is not None
        blocks = pe_buffer_blocks(self.fleet.facts[prefill].stages, request.legs, request.prompt_blocks)
        if not blocks or self.ledger.line_up(prefill, request.key, blocks):
            self._allocated(request)
        else:
            self._serve_line(prefill)  # blocks that this input freed there may not have been granted yet

    def _allocated(self, request: Request) -> None:
        """The request waits for no blocks any more: command the PE's read, if it reads.

        One that waited for a PE to stage it may have all its KV by now.
        """
        if request.legs and request.legs[0].side is Side.PE:  # the PE side's leg always comes first
            prefill = request.prefill_engine
            assert prefill is not None
            request.commanded = (prefill, *request.commanded)
            self.outbox.append(Load(request.id, request.attempt, prefill, request.legs[0]))
        self.move(request, Event.ALLOCATE)
        self.prefill_if_ready(request)

    def end(self, request: Request, event: Event) -> None:
        """Move to a terminal state and forget the request."""
        request.move(event)
        del self.requests[request.id]
