"""The journal: what is written comes back, and a replay finds the first difference."""

import inspect

import msgspec
import pytest

from dualpath.core.audit import audit
from dualpath.core.journal import INPUTS, Difference, JournaledScheduler, ReplayReport, decode_entry, replay
from dualpath.core.policy import Constants, Limits
from dualpath.core.scheduler import Scheduler
from dualpath.core.systems import find_system
from dualpath.core.vocabulary import Cancelled, Cause, EngineFacts, Prefill, RequestFacts, Role, Side

PE, DE = 1, 2


def new_scheduler() -> Scheduler:
    return Scheduler(
        find_system("dualpath-split").policy, Constants(alpha_tokens=1_000, beta_tokens=9_000), Limits(max_waiting=7)
    )


def journal() -> list[bytes]:
    """A journal with every kind of input in it."""
    lines: list[bytes] = []
    core = JournaledScheduler(new_scheduler(), lines.append)
    core.engine_joined(1, EngineFacts(PE, Role.PREFILL, 1, 0, 100))
    core.engine_joined(2, EngineFacts(DE, Role.DECODE, 2, 1, 100, 100))
    core.submit(10, RequestFacts(5, 0, 700, 640, 20))
    core.prepared(11, 5, 0)
    core.loaded(12, 5, 0, Side.PE)
    core.load_failed(13, 5, 0, Side.DE)
    core.released(14, 5, 0, PE)
    core.released(14, 5, 0, DE)
    core.resubmit(20_000_000, RequestFacts(5, 1, 700, 0, 20))
    core.prepared(20_000_001, 5, 1)
    core.prefill_done(20_000_002, 5, 1)
    core.buffer_freed(20_000_003, 5, 1, 4)
    core.attempt_failed(20_000_004, 5, 1, DE, Cause.COMPUTE_FAILED)
    core.released(20_000_005, 5, 1, DE)
    core.resubmit(40_000_000, RequestFacts(5, 2, 700, 0, 20))
    core.wake(40_000_001)
    core.prepared(40_000_002, 5, 2)
    core.prefill_done(40_000_003, 5, 2)
    core.finished(40_000_004, 5, 2)
    core.submit(50_000_000, RequestFacts(6, 0, 700, 640, 20))
    core.cancel(50_000_001, 6)
    core.engine_draining(50_000_001, DE, True)
    core.engine_lost(50_000_002, PE)
    audit(core.life)
    return lines


def test_a_replay_gives_the_same_commands() -> None:
    lines = journal()
    assert {msgspec.json.decode(line)["call"] for line in lines[1:]} == set(INPUTS)
    commands = sum(len(msgspec.json.decode(line)["commands"]) for line in lines[1:])
    assert replay(lines) == ReplayReport(len(lines) - 1, commands, None, truncated=False)


def test_every_input_of_the_scheduler_is_journaled() -> None:
    takes_now = [
        name
        for name, member in inspect.getmembers(Scheduler, inspect.isfunction)
        if "now" in inspect.signature(member).parameters
    ]
    assert sorted(takes_now) == sorted(INPUTS)
    assert all(hasattr(JournaledScheduler, name) for name in INPUTS)


def test_the_wrapper_hands_on_commands_and_gauges() -> None:
    plain, lines = new_scheduler(), list[bytes]()
    wrapped = JournaledScheduler(new_scheduler(), lines.append)
    for core in (plain, wrapped):
        core.engine_joined(1, EngineFacts(PE, Role.PREFILL, 1, 0, 100))
        core.engine_joined(2, EngineFacts(DE, Role.DECODE, 2, 1, 100, 100))
        core.submit(10, RequestFacts(5, 0, 700, 640, 20))
    assert wrapped.take_commands() == plain.take_commands() != []
    assert wrapped.take_commands() == []
    assert wrapped.next_wake() == plain.next_wake()
    assert wrapped.statistics() == plain.statistics()
    assert wrapped.load_of(PE) == plain.load_of(PE)
    assert wrapped.engines() == plain.engines()
    assert wrapped.held() == plain.held()


def test_the_first_difference_is_reported() -> None:
    lines = journal()
    other = [line.replace(b'"blocks":5', b'"blocks":6') for line in lines]
    report = replay(other)
    assert report.entries == 2
    assert isinstance(report.difference, Difference)
    assert (report.difference.line, report.difference.entry.call) == (4, "submit")
    assert report.difference.commands != report.difference.entry.commands
    assert replay([lines[0].replace(b'"split"', b'"pe_only"'), *lines[1:]]).difference is not None


def test_an_entry_is_decoded_into_its_types() -> None:
    entry = decode_entry(b'{"call":"loaded","now":3,"arguments":[5,0,"de"],"commands":[]}')
    assert entry.arguments == (5, 0, Side.DE)
    commands = (
        b'[{"type":"Prefill","request":1,"attempt":0,"engine":1,"decode_engine":2},{"type":"Cancelled","request":1}]'
    )
    entry = decode_entry(b'{"call":"wake","now":3,"arguments":[],"commands":' + commands + b"}")
    assert entry.commands == [Prefill(1, 0, 1, 2), Cancelled(1)]


def test_a_journal_cut_off_in_the_middle_of_a_line_is_replayed_up_to_there() -> None:
    lines = journal()
    report = replay([*lines[:5], lines[5][:20]])
    assert (report.entries, report.truncated, report.difference) == (4, True, None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"call":"loa', "line 3"),
        (b'{"call":"loaded","now":3,"arguments":[5,0,"up"],"commands":[]}\n', "line 3.*up"),
        (b'{"call":"reboot","now":3,"arguments":[],"commands":[]}\n', "line 3.*'reboot' is no input"),
    ],
)
def test_a_bad_line_is_named(line: bytes, message: str) -> None:
    lines = journal()
    with pytest.raises(ValueError, match=message):
        replay([*lines[:2], line, *lines[3:]])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "line 1 is no header"),
        ([b"hello\n"], "line 1 is no header"),
        ([journal()[0].replace(b'"journal":1', b'"journal":2')], "version 2"),
    ],
)
def test_a_foreign_journal_is_refused(lines: list[bytes], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replay(lines)


def test_a_scheduler_with_a_past_can_not_be_journaled() -> None:
    scheduler = new_scheduler()
    scheduler.wake(1)
    with pytest.raises(ValueError, match="inputs already"):
        JournaledScheduler(scheduler, list[bytes]().append)


def test_named_arguments_can_not_be_journaled() -> None:
    core = JournaledScheduler(new_scheduler(), list[bytes]().append)
    with pytest.raises(TypeError, match="by position"):
        core.cancel(1, request=5)


def test_an_input_that_raises_is_not_written() -> None:
    lines: list[bytes] = []
    core = JournaledScheduler(new_scheduler(), lines.append)
    with pytest.raises(ValueError, match="must be"):
        core.submit(1, RequestFacts(1, 0, 0, 0, 0))
    assert len(lines) == 1
