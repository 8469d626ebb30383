"""A request's life as a declared table, and the record core keeps of it.

Theory of operation. A request is in one state and has one owner: core, but for RETRYING, where the driver is to match
the prompt against storage anew. Every live state has a deadline. `TRANSITIONS` is all there is: an event that a state
does not list is a bug and raises `IllegalTransition`. What engines say never gets that far out of turn: `ACCEPTS` names
the states in which an input means something, and elsewhere it is stale, dropped and counted.

`render_table()` draws the diagram in the documentation from the same table.
"""

from enum import Enum

from dualpath.core.vocabulary import BLOCK_TOKENS, EngineId, GroupId, Leg, RequestFacts, RequestId, Side


class State(Enum):
    """Where a request is."""

    QUEUED = "queued"
    """Waits for a PE and a DE."""
    ALLOCATING = "allocating"
    """Placed; waits for DE buffer, then PE buffer, blocks."""
    LOADING = "loading"
    """Holds its buffer blocks; legs are being read from storage."""
    PREFILLING = "prefilling"
    DECODING = "decoding"
    RETRYING = "retrying"
    """The attempt failed; the driver owes a `resubmit`."""
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"

    # Members are singletons; Enum's own hash is that of the name, computed in Python, and it showed in profiles.
    __hash__ = object.__hash__

    @property
    def is_terminal(self) -> bool:
        return not TRANSITIONS[self]


class Event(Enum):
    """What moves a request on."""

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
"""The states in which an input of an engine is news; in any other it is stale."""


class IllegalTransition(Exception):  # noqa: N818 (named as a thing that happened, like StopIteration)
    """Core tried to move a request in a way that `TRANSITIONS` does not list: a bug in core."""


NEVER_NS = (1 << 63) - 1
"""A time that does not come: no deadline."""


class Request:
    """One live request: its current attempt, and what that attempt has where.

    A plain class with slots: its fields are written some twenty times in a life, and a Struct checks each write.
    """

    __slots__ = (
        "attempt",
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
        """Of the state it is in, NEVER_NS where it has none; written by `Deadlines` alone."""
        self.begin_attempt(facts)

    def begin_attempt(self, facts: RequestFacts) -> None:
        """Begin the attempt that `facts` describe, on no engine yet."""
        self.facts = facts
        self.attempt = facts.attempt
        self.key = (facts.request, facts.attempt)
        """What engines and the ledger know it by."""
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
        """Engines that were told of the attempt, and so must be told to abort it."""
        self.legs: tuple[Leg, ...] = ()
        """The read path: who reads which hit blocks."""
        self.unloaded: tuple[Leg, ...] = ()
        """Legs not yet in their buffer; they count in the nodes' read queues."""
        self.prepared = False

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.__slots__)
        return f"Request({fields})"

    def engine_of(self, side: Side) -> EngineId | None:
        return self.prefill_engine if side is Side.PE else self.decode_engine

    def move(self, event: Event) -> None:
        """Take the transition. Raises IllegalTransition where the table has none."""
        target = TRANSITIONS[self.state].get(event)
        if target is None:
            raise IllegalTransition(f"request {self.id} attempt {self.attempt}: {event.value} in {self.state}")
        self.state = target


def hit_blocks(facts: RequestFacts) -> int:
    """Full Blocks found in storage."""
    return facts.hit_tokens // BLOCK_TOKENS


def prompt_blocks(facts: RequestFacts) -> int:
    """DE buffer blocks for the whole prompt."""
    return -(-facts.prompt_tokens // BLOCK_TOKENS)


def hbm_blocks(facts: RequestFacts) -> int:
    """DE device blocks for the prompt and all it may generate."""
    return -(-(facts.prompt_tokens + facts.max_new_tokens) // BLOCK_TOKENS)


def check_facts(facts: RequestFacts) -> None:
    """Raise ValueError where a driver's facts make no sense."""
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
    """The transition table as a Mermaid state diagram, for the documentation."""
    lines = ["```mermaid", "stateDiagram-v2", "    [*] --> queued"]
    for state, moves in TRANSITIONS.items():
        lines += [f"    {state.value} --> {target.value}: {event.value}" for event, target in moves.items()]
    lines += [f"    {state.value} --> [*]" for state in State if state.is_terminal]
    return "\n".join([*lines, "```"])
