"""The journal: every input of a scheduler with the commands it gave, and a replay that checks them.

Theory of operation. A driver that wraps its `Scheduler` in a `JournaledScheduler` writes one JSON line per input: the
call, the time, the arguments, and the commands that the input appended. The first line is a header with the policy,
constants and limits. Core is deterministic, so `replay` rebuilds the scheduler from the header, repeats the calls and
reports the first input whose commands differ. A difference means that core's behaviour has changed, or that the journal
was altered. Core does no I/O: the driver gives a sink for bytes and reads the lines back itself.
"""

from collections.abc import Callable, Iterable
from typing import Any, Concatenate, ParamSpec, get_type_hints

import msgspec

from dualpath.core.gauges import EngineLoad
from dualpath.core.ledger import Holding
from dualpath.core.lifecycle import Lifecycle
from dualpath.core.policy import Constants, Limits, Policy
from dualpath.core.scheduler import Scheduler
from dualpath.core.vocabulary import Command, EngineFacts, EngineId

JOURNAL_VERSION = 1

INPUTS: dict[str, Callable[..., None]] = {
    "engine_joined": Scheduler.engine_joined,
    "engine_lost": Scheduler.engine_lost,
    "engine_draining": Scheduler.engine_draining,
    "submit": Scheduler.submit,
    "resubmit": Scheduler.resubmit,
    "cancel": Scheduler.cancel,
    "prepared": Scheduler.prepared,
    "loaded": Scheduler.loaded,
    "load_failed": Scheduler.load_failed,
    "prefill_done": Scheduler.prefill_done,
    "buffer_freed": Scheduler.buffer_freed,
    "finished": Scheduler.finished,
    "attempt_failed": Scheduler.attempt_failed,
    "released": Scheduler.released,
    "wake": Scheduler.wake,
}
"""Every input of the scheduler, by its name in a journal."""


class Header(msgspec.Struct, frozen=True):
    """The first line: the scheduler's constructor arguments."""

    journal: int
    policy: Policy
    constants: Constants
    limits: Limits


class Entry(msgspec.Struct, frozen=True):
    """One input, and the commands it gave. `arguments` are those after `now`, typed as the method in `INPUTS`."""

    call: str
    now: int
    arguments: tuple[Any, ...]
    commands: list[Command]


class _RawEntry(msgspec.Struct, frozen=True):
    call: str
    now: int
    arguments: msgspec.Raw
    commands: list[Command]


class Difference(msgspec.Struct, frozen=True):
    """An input that gives other commands in the replay than in the journal."""

    line: int
    """Line number in the journal; the header is line 1."""
    entry: Entry
    commands: list[Command]
    """The commands of the replay."""


class ReplayReport(msgspec.Struct, frozen=True):
    """How far the replay got, and the first difference, if any."""

    entries: int
    commands: int
    difference: Difference | None
    truncated: bool
    """True when the last line is incomplete: the writer was stopped in the middle of it."""


def _argument_types(call: Callable[..., None]) -> list[Any]:
    hints = get_type_hints(call)
    return [hint for name, hint in hints.items() if name not in ("now", "return")]


_ARGUMENTS: dict[str, msgspec.json.Decoder[Any]] = {
    name: msgspec.json.Decoder(tuple[tuple(_argument_types(call))] if _argument_types(call) else tuple[()])  # type: ignore[misc]
    for name, call in INPUTS.items()
}
_ENTRY = msgspec.json.Decoder(_RawEntry)
_HEADER = msgspec.json.Decoder(Header)
_ENCODER = msgspec.json.Encoder()

P = ParamSpec("P")


def _journaled(
    call: Callable[Concatenate[Scheduler, int, P], None],
) -> "Callable[Concatenate[JournaledScheduler, int, P], None]":
    """Returns the method of `JournaledScheduler` that makes this input and journals it with its commands."""

    def record(self: "JournaledScheduler", now: int, /, *arguments: P.args, **named: P.kwargs) -> None:
        if named:
            raise TypeError(f"{call.__name__}: inputs are journaled by position, so give {sorted(named)} by position")
        call(self.scheduler, now, *arguments, **named)
        self.write(Entry(call.__name__, now, arguments, self.scheduler.take_commands()))

    record.__doc__ = call.__doc__
    return record


class JournaledScheduler:
    """A `Scheduler` that writes every input to `sink` as one line of bytes, newline included.

    Raises ValueError unless the scheduler is new: a journal has every input. An input that raises is not written.
    """

    def __init__(self, scheduler: Scheduler, sink: Callable[[bytes], object]) -> None:
        if scheduler.engines() or scheduler.now:
            raise ValueError("this scheduler has had inputs already, which its journal would lack; give it a new one")
        self.scheduler = scheduler
        self._sink = sink
        self._outbox: list[Command] = []
        header = Header(JOURNAL_VERSION, scheduler.policy, scheduler.constants, scheduler.limits)
        sink(_ENCODER.encode(header) + b"\n")

    engine_joined = _journaled(Scheduler.engine_joined)
    engine_lost = _journaled(Scheduler.engine_lost)
    engine_draining = _journaled(Scheduler.engine_draining)
    submit = _journaled(Scheduler.submit)
    resubmit = _journaled(Scheduler.resubmit)
    cancel = _journaled(Scheduler.cancel)
    prepared = _journaled(Scheduler.prepared)
    loaded = _journaled(Scheduler.loaded)
    load_failed = _journaled(Scheduler.load_failed)
    prefill_done = _journaled(Scheduler.prefill_done)
    buffer_freed = _journaled(Scheduler.buffer_freed)
    finished = _journaled(Scheduler.finished)
    attempt_failed = _journaled(Scheduler.attempt_failed)
    released = _journaled(Scheduler.released)
    wake = _journaled(Scheduler.wake)

    @property
    def life(self) -> Lifecycle:
        """See `Scheduler.life`."""
        return self.scheduler.life

    def write(self, entry: Entry) -> None:
        """Journal one input, then put its commands where `take_commands` finds them."""
        self._outbox += entry.commands
        self._sink(_ENCODER.encode(entry) + b"\n")

    def take_commands(self) -> list[Command]:
        """See `Scheduler.take_commands`."""
        commands, self._outbox = self._outbox, []
        return commands

    def next_wake(self) -> int | None:
        """See `Scheduler.next_wake`."""
        return self.scheduler.next_wake()

    def statistics(self) -> dict[str, int]:
        """See `Scheduler.statistics`."""
        return self.scheduler.statistics()

    def load_of(self, engine: EngineId) -> EngineLoad:
        """See `Scheduler.load_of`."""
        return self.scheduler.load_of(engine)

    def engines(self) -> tuple[EngineFacts, ...]:
        """See `Scheduler.engines`."""
        return self.scheduler.engines()

    def held(self) -> tuple[Holding, ...]:
        """See `Scheduler.held`."""
        return self.scheduler.held()


def decode_entry(line: bytes) -> Entry:
    """Decode one line of a journal after the header. Raises ValueError that says what is wrong with the line."""
    raw = _ENTRY.decode(line)
    if raw.call not in _ARGUMENTS:
        raise ValueError(f"{raw.call!r} is no input of the scheduler; known are {', '.join(INPUTS)}")
    return Entry(raw.call, raw.now, _ARGUMENTS[raw.call].decode(raw.arguments), raw.commands)


def replay(lines: Iterable[bytes]) -> ReplayReport:
    """Repeat every call of a journal until one gives other commands than the journal has.

    Raises ValueError with the line number when the header is missing or of another version, or a line is not an entry.
    An incomplete last line is only reported.
    """
    numbered = enumerate(lines, start=1)
    scheduler = _scheduler_of(next(numbered, (1, b""))[1])
    entries = commands = 0
    for number, line in numbered:
        try:
            entry = decode_entry(line)
        except ValueError as error:
            if not line.endswith(b"\n") and next(numbered, None) is None:
                return ReplayReport(entries, commands, None, truncated=True)
            raise ValueError(f"journal line {number}: {error}") from error
        INPUTS[entry.call](scheduler, entry.now, *entry.arguments)
        given = scheduler.take_commands()
        if given != entry.commands:
            return ReplayReport(entries, commands, Difference(number, entry, given), truncated=False)
        entries += 1
        commands += len(given)
    return ReplayReport(entries, commands, None, truncated=False)


def _scheduler_of(line: bytes) -> Scheduler:
    try:
        header = _HEADER.decode(line)
    except msgspec.DecodeError as error:
        raise ValueError(f"journal line 1 is no header: {error}; is this a DualPath journal?") from error
    if header.journal != JOURNAL_VERSION:
        raise ValueError(f"journal line 1: version {header.journal}, this program reads {JOURNAL_VERSION}")
    return Scheduler(header.policy, header.constants, header.limits)
