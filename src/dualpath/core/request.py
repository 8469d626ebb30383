"""The states of a request as a declared table, and core's record of one live request.

Theory of operation. A request is in one state and has one owner. The owner is core, except in RETRYING: there the
driver must match the prompt against storage again. Every live state has a deadline. `TRANSITIONS` lists every legal
move; any other move is a bug and raises `IllegalTransition`. A late message of an engine cannot cause one: `ACCEPTS`
lists the states in which each input is accepted, and in any other state the input is stale, dropped and counted.

`render_table()` draws the diagram in the documentation from the same table.
"""

from enum import Enum

from dualpath.core.vocabulary import BLOCK_TOKENS, EngineId, GroupId, Leg, RequestFacts, RequestId, Side


class State(Enum):
    """Where a request is."""

    QUEUED = "queued"
    """Waits for a PE and a DE."""
    ALLOCATING = "allocating"
    """Placed; waits for DE buffer blocks, then for PE buffer blocks."""
    LOADING = "loading"
    """Holds its buffer blocks; legs are being read from storage."""
    PREFILLING = "prefilling"
    DECODING = "decoding"
    RETRYING = "retrying"
    """The attempt failed; the driver owes a `resubmit`."""
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"

    # Members are singletons. Enum hashes the name in Python, which was visible in profiles.
    __hash__ = object.__hash__

    @property
    def is_terminal(self) -> bool:
        return not TRANSITIONS[self]


class Event(Enum):
    """What moves a request to its next state."""

    PLACE = "place"
    ALLOCATE = "allocate"
    LOAD = "load"
    PREFILL = "prefill"
    FINISH = "finish"
    RETRY = "retry"
    RESUBMIT = "resubmit"
    FAIL = "fail"
    CANCEL = "cancel"

    __hash__ = object.__hash__


_ON_ENGINES = (State.ALLOCATING, State.LOADING, State.PREFILLING, State.DECODING)
_LIVE = (State.QUEUED, *_ON_ENGINES, State.RETRYING)

TRANSITIONS: dict[State, dict[Event, State]] = {state: {} for state in State}
TRANSITIONS[State.QUEUED][Event.PLACE] = State.ALLOCATING
TRANSITIONS[State.ALLOCATING][Event.ALLOCATE] = State.LOADING
TRANSITIONS[State.LOADING][Event.LOAD] = State.PREFILLING
TRANSITIONS[State.PREFILLING][Event.PREFILL] = State.DECODING
TRANSITIONS[State.DECODING][Event.FINISH] = State.FINISHED
TRANSITIONS[State.RETRYING][Event.RESUBMIT] = State.QUEUED
for _state in _ON_ENGINES:
    TRANSITIONS[_state][Event.RETRY] = State.RETRYING
for _state in _LIVE:
    TRANSITIONS[_state][Event.FAIL] = State.FAILED
    TRANSITIONS[_state][Event.CANCEL] = State.CANCELLED

ACCEPTS: dict[str, tuple[State, ...]] = {
    "prepared": (State.ALLOCATING, State.LOADING),
    "loaded": (State.ALLOCATING, State.LOADING),
    "load_failed": (State.ALLOCATING, State.LOADING),
    "prefill_done": (State.PREFILLING,),
    "buffer_freed": (State.DECODING,),
    "finished": (State.DECODING,),
    "attempt_failed": _ON_ENGINES,
}
"""The states in which core accepts an engine's input; in any other state the input is stale."""


class IllegalTransition(Exception):  # noqa: N818 (named as a thing that happened, like StopIteration)
    """Core tried a move that `TRANSITIONS` does not list: a bug in core."""


NEVER_NS = (1 << 63) - 1
"""The time that means "no deadline"."""


class Request:
    """One live request: its current attempt, and the attempt's engines, legs and progress.

    A plain class with slots: the fields are written about twenty times per request, and a Struct checks each write.
    """

    __slots__ = (
        "attempt",
        "avoids",
        "commanded",
        "deadline_ns",
        "decode_engine",
        "facts",
        "group",
        "hbm_blocks",
        "hit_blocks",
        "id",
        "key",
        "legs",
        "prefill_engine",
        "prepared",
        "prompt_blocks",
        "state",
        "unloaded",
    )

    def __init__(self, facts: RequestFacts) -> None:
        self.id: RequestId = facts.request
        self.state = State.QUEUED
        self.deadline_ns = NEVER_NS
        """Deadline of the current state, NEVER_NS for none; only `Deadlines` writes it."""
        self.avoids: frozenset[EngineId] = frozenset()
        """Engines that failed an earlier attempt, or between which a transfer failed; others are chosen, if any can."""
        self.begin_attempt(facts)

    def begin_attempt(self, facts: RequestFacts) -> None:
        """Start the attempt that `facts` describe; it is on no engine yet."""
        self.facts = facts
        self.attempt = facts.attempt
        self.key = (facts.request, facts.attempt)
        """The key by which engines and the ledger know the attempt."""
        self.hit_blocks = hit_blocks(facts)
        self.prompt_blocks = prompt_blocks(facts)
        self.hbm_blocks = hbm_blocks(facts)
        self.leave_engines()

    def leave_engines(self) -> None:
        """Forget the attempt's engines, legs and progress."""
        self.group: GroupId | None = None
        """The DE group in whose private queue it waits or waited."""
        self.prefill_engine: EngineId | None = None
        """From PE choice until `prefill_done`."""
        self.decode_engine: EngineId | None = None
        """From DE choice until the attempt ends."""
        self.commanded: tuple[EngineId, ...] = ()
        """Engines that were told of the attempt, and therefore get an Abort when it fails."""
        self.legs: tuple[Leg, ...] = ()
        """The read path: which side reads which hit blocks."""
        self.unloaded: tuple[Leg, ...] = ()
        """Legs not yet in their buffer; they count in the nodes' read queues."""
        self.prepared = False

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.__slots__)
        return f"Request({fields})"

    def engine_of(self, side: Side) -> EngineId | None:
        return self.prefill_engine if side is Side.PE else self.decode_engine

    def move(self, event: Event) -> None:
        """Take the transition. Raises IllegalTransition when the table does not list it."""
        target = TRANSITIONS[self.state].get(event)
        if target is None:
            raise IllegalTransition(f"request {self.id} attempt {self.attempt}: {event.value} in {self.state}")
        self.state = target


def hit_blocks(facts: RequestFacts) -> int:
    """Number of Full Blocks found in storage."""
    return facts.hit_tokens // BLOCK_TOKENS


def prompt_blocks(facts: RequestFacts) -> int:
    """Number of DE buffer blocks for the whole prompt."""
    return -(-facts.prompt_tokens // BLOCK_TOKENS)


def hbm_blocks(facts: RequestFacts) -> int:
    """Number of DE device blocks for the prompt and all tokens it may generate."""
    return -(-(facts.prompt_tokens + facts.max_new_tokens) // BLOCK_TOKENS)


def pe_buffer_blocks(stages: bool, legs: tuple[Leg, ...], prompt_blocks: int) -> int:
    """Number of PE buffer blocks for an attempt: the whole prompt's where the PE stages, else those that it reads."""
    return prompt_blocks if stages else sum(leg.blocks for leg in legs if leg.side is Side.PE)


def check_facts(facts: RequestFacts) -> None:
    """Raises ValueError when a driver's facts are invalid."""
    sound = (
        facts.prompt_tokens >= 1
        and facts.max_new_tokens >= 1
        and facts.attempt >= 0
        and 0 <= facts.hit_tokens < facts.prompt_tokens
        and facts.hit_tokens % BLOCK_TOKENS == 0
    )
    if not sound:
        raise ValueError(
            f"{facts}: prompt_tokens and max_new_tokens must be at least 1, attempt at least 0, and hit_tokens a "
            f"multiple of {BLOCK_TOKENS} below prompt_tokens, so that at least one token is computed"
        )


def render_table() -> str:
    """Returns the transition table as a Mermaid state diagram, for the documentation."""
    lines = ["```mermaid", "stateDiagram-v2", "    [*] --> queued"]
    for state, moves in TRANSITIONS.items():
        lines += [f"    {state.value} --> {target.value}: {event.value}" for event, target in moves.items()]
    lines += [f"    {state.value} --> [*]" for state in State if state.is_terminal]
    return "\n".join([*lines, "```"])
