"""Model engines: their own books, what is wrong with them, and what they still owe."""

from collections.abc import Callable
from dataclasses import dataclass, field

from dualpath.core.vocabulary import Command, EngineFacts, RequestFacts
from dualpath.lab.faults.matrix import Phase

Key = tuple[int, int]
"""``(request, attempt)``."""
Word = tuple[str, tuple[object, ...]]
"""An input of the scheduler by name, with its arguments after `now`."""


@dataclass(slots=True)
class Job:
    """Something an engine (or, with engine None, the driver) still has to do and then say."""

    engine: int | None
    key: Key
    work: Callable[[bool], None]
    """Called with True for success."""
    phase: Phase
    hung: bool = False


@dataclass(slots=True)
class ModelEngine:
    """An engine's own books: blocks by attempt; and what is wrong with it."""

    facts: EngineFacts
    buffer: dict[Key, int] = field(default_factory=dict)
    hbm: dict[Key, int] = field(default_factory=dict)
    aborted: set[Key] = field(default_factory=set)
    silent_since: int | None = None
    """When it was stopped or cut off; its lease runs from then."""
    stopped: bool = False
    slow: bool = False
    cut_to: bool = False
    cut_from: bool = False
    inbox: list[Command] = field(default_factory=list)
    """Commands that are under way: it is stopped, or nothing reaches it."""

    @property
    def works(self) -> bool:
        return not self.stopped

    def take_buffer(self, key: Key, blocks: int) -> None:
        assert key not in self.buffer, f"{key} has buffer blocks on engine {self.facts.engine} already"
        self.buffer[key] = blocks
        assert sum(self.buffer.values()) <= self.facts.buffer_blocks, f"engine {self.facts.engine} is out of buffer"

    def take_hbm(self, key: Key, blocks: int) -> None:
        self.hbm[key] = blocks
        assert sum(self.hbm.values()) <= self.facts.hbm_blocks, f"engine {self.facts.engine} is out of device memory"

    def drop(self, key: Key) -> None:
        self.buffer.pop(key, None)
        self.hbm.pop(key, None)


@dataclass(slots=True)
class ModelRequest:
    facts: RequestFacts
    outcome: Command | None = None
    loaded_blocks: int = 0
    prepared: bool = False
    part: Phase | None = None
    """Which part of PREFILLING or DECODING it is in."""
