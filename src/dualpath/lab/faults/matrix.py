"""Which fault, on whom, on which read path, in which phase: the one table, and why the rest of it makes no sense.

A combination makes sense when the victim takes part in the phase, the fault can happen to it, and no other combination
is the same thing under another name. `why_not` says so in a sentence. A body may leave out more (`not_in`): what it
can't do from where it stands, the other one does.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from enum import StrEnum
from itertools import product
from typing import Literal, NamedTuple


class Fault(StrEnum):
    """What happens."""

    KILL = "kill"
    STOP = "stop"
    SLOW = "slow"
    PARTITION_TO = "partition_to"
    """Nothing reaches the victim; what it sends arrives."""
    PARTITION_FROM = "partition_from"
    PARTITION = "partition"
    FULL = "full"
    CORRUPT = "corrupt"
    WRONG = "wrong"
    """It answers, and the answer is nonsense, an error, or one given before."""
    LATE = "late"
    """It answers rightly, after others that it should precede."""
    HUNG = "hung"
    """One piece of work never ends; the rest goes on."""


class Victim(StrEnum):
    """To whom."""

    PE = "PE"
    DE = "DE"
    AGENT = "agent"
    """A node's agent, with all engines of the node."""
    COORDINATOR = "coordinator"
    STORE = "store"
    LINK = "link"
    """Between PE and DE, for KV. Links to the coordinator and the store are cut by a partition of the other end."""
    CLIENT = "client"


class Path(StrEnum):
    """Whose storage NIC reads the request's hit KV."""

    PE = "PE"
    DE = "DE"
    SPLIT = "split"


class Phase(StrEnum):
    """Where the request is that is looked at, in the order of its life."""

    QUEUED = "queued"
    ALLOCATING = "allocating"
    READING = "reading"
    PREFILLING = "prefilling"
    SHIPPING = "shipping"
    ADMITTING = "admitting"
    DECODING = "decoding"
    PERSISTING = "persisting"


Body = Literal["sim", "real"]


class Combination(NamedTuple):
    """One cell of the table."""

    fault: Fault
    victim: Victim
    path: Path
    phase: Phase

    def __str__(self) -> str:
        return f"{self.fault}:{self.victim} {self.phase} path={self.path}"


PARTITIONS = (Fault.PARTITION_TO, Fault.PARTITION_FROM, Fault.PARTITION)
PATHS_DIFFER = (Phase.ALLOCATING, Phase.READING, Phase.PREFILLING, Phase.SHIPPING)
"""Elsewhere one path stands for all: PE."""
OF_WORK = (Fault.WRONG, Fault.LATE, Fault.HUNG)
"""Faults of one piece of work, not of the process that does it."""
_IDLE = {
    Victim.PE: (Phase.ALLOCATING,),
    Victim.DE: (Phase.ALLOCATING, Phase.PREFILLING, Phase.SHIPPING),
    Victim.AGENT: (Phase.ALLOCATING,),
}
_DE_ALONE = (Phase.ADMITTING, Phase.DECODING, Phase.PERSISTING)
_OVER = "is over when the DE has the whole prompt's KV"

_NO_FAULT: dict[Victim, dict[Fault, str]] = {
    Victim.PE: {
        Fault.FULL: "the scheduler asks no engine for more memory than it has",
        Fault.CORRUPT: "memory that rots is for its ECC to notice",
    },
    Victim.COORDINATOR: {
        Fault.FULL: "it keeps no KV; the journal's disk is a test of its own",
        Fault.CORRUPT: "memory that rots is for its ECC to notice",
        Fault.WRONG: "it is what the others believe",
        Fault.LATE: "to engines that is slow",
        Fault.HUNG: "to engines that is stop",
    },
    Victim.STORE: {Fault.STOP: "to whoever reads that is hung"},
    Victim.LINK: {
        Fault.STOP: "a link that stops is a partition",
        Fault.FULL: "a full link is slow",
        Fault.CORRUPT: "TCP's and the NIC's checksums make it a lost packet: slow",
        Fault.WRONG: "a link says nothing of its own; a peer that does is in tests/transfer",
        Fault.HUNG: "a link that hangs is a partition",
    },
    Victim.CLIENT: {
        **dict.fromkeys(PARTITIONS, "to the server that is stop, and in the end kill"),
        Fault.FULL: "a client whose disk is full is one that leaves: kill",
        Fault.CORRUPT: "a body that rots is a wrong one",
        Fault.HUNG: "to the server that is stop",
    },
}
_NO_FAULT[Victim.DE] = _NO_FAULT[Victim.AGENT] = _NO_FAULT[Victim.PE]

_NO_PHASE: dict[Victim, dict[Phase, str]] = {
    Victim.PE: dict.fromkeys(_DE_ALONE, f"the PE's part {_OVER}"),
    Victim.STORE: {
        phase: "nothing is read or written then" for phase in Phase if phase not in (Phase.READING, Phase.PERSISTING)
    },
    Victim.LINK: dict.fromkeys((Phase.QUEUED, Phase.ALLOCATING, Phase.READING), "no KV is between PE and DE yet")
    | dict.fromkeys(_DE_ALONE, f"the link's part {_OVER}"),
}


def why_not(at: Combination) -> str | None:
    """Returns why the combination makes no sense, or is another one; None when it makes sense."""
    fault, victim, path, phase = at
    reason = _NO_FAULT[victim].get(fault) or _NO_PHASE.get(victim, {}).get(phase)
    if reason is not None:
        return reason
    if path is not Path.PE and phase not in PATHS_DIFFER:
        return f"{phase} is the same on every path; PE stands for all"
    if fault in OF_WORK and phase in _IDLE.get(victim, ()):
        return "it has no work for the request then, and nothing to say of it"
    if victim is Victim.STORE:
        return _why_not_store(fault, phase)
    if victim is Victim.CLIENT:
        return _why_not_client(fault, phase)
    return None


def _why_not_store(fault: Fault, phase: Phase) -> str | None:
    if fault is Fault.FULL and phase is Phase.READING:
        return "a full store can be read"
    if fault is Fault.CORRUPT and phase is Phase.PERSISTING:
        return "what is written damaged shows when it is read"
    return None


def _why_not_client(fault: Fault, phase: Phase) -> str | None:
    if fault in (Fault.WRONG, Fault.LATE) and phase is not Phase.QUEUED:
        return "a body has come whole, and is right, before its request is anywhere"
    if fault in (Fault.STOP, Fault.SLOW) and phase is not Phase.DECODING:
        return "only tokens of a stream can be read slowly"
    return None


def not_in(body: Body, at: Combination) -> str | None:
    """Returns why `body` leaves out a combination that makes sense; None when it runs it."""
    fault, victim, _, phase = at
    if body == "sim":
        if victim is Victim.COORDINATOR:
            return "core is the coordinator's: a new one knows nothing of the old"
        if victim is Victim.STORE and phase is Phase.PERSISTING:
            return "core sees no write"
        if victim is Victim.CLIENT and fault is not Fault.KILL:
            return "core sees no client but one that leaves"
        return None
    if fault in OF_WORK and victim in (Victim.PE, Victim.DE, Victim.AGENT):
        return "nobody outside the process can bring it about"
    if fault in PARTITIONS and victim is Victim.AGENT:
        return "an agent's networks are its engines': PE and DE stand for it"
    if victim is Victim.LINK and fault in (Fault.KILL, Fault.LATE):
        return "the testbed can cut and slow down a link, not reset or delay its packets"
    return None


def combinations(body: Body | None = None) -> Iterator[Combination]:
    """Yields what makes sense, or what `body` runs of it, in the order of the enums."""
    for at in map(Combination._make, product(Fault, Victim, Path, Phase)):
        if why_not(at) is None and (body is None or not_in(body, at) is None):
            yield at


def sample(cells: Sequence[Combination], count: int, seed: int) -> list[Combination]:
    """Draws `count` of the cells: of each fault and victim one before of any a second. Returns them in their order."""
    turns: Counter[tuple[Fault, Victim]] = Counter()

    def turn(at: Combination) -> int:
        turns[at[:2]] += 1
        return turns[at[:2]]

    taken = set(sorted(random.Random(seed).sample(cells, len(cells)), key=turn)[:count])
    return [at for at in cells if at in taken]


def select(text: str) -> dict[str, set[str]]:
    """Parses ``fault=kill,victim=DE,phase=decoding``; a name may come again. Raises ValueError."""
    known = {"fault": Fault, "victim": Victim, "path": Path, "phase": Phase}
    wanted: dict[str, set[str]] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in known or value not in list(known[name]):
            values = "; ".join(f"{each}={'|'.join(kind)}" for each, kind in known.items())
            raise ValueError(f"{part!r} selects nothing; write {values}")
        wanted.setdefault(name, set()).add(value)
    return wanted


def selected(at: Combination, wanted: dict[str, set[str]]) -> bool:
    return all(getattr(at, name) in values for name, values in wanted.items())
