"""OperationTable: whoever ends an operation, the caller's memory is never touched after its future has ended."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualpath.transfer.transport import ChannelBusy, PageRange, TransferCause, TransferError
from dualpath.transfer.transports.framed.frames import FrameKind
from dualpath.transfer.transports.framed.operations import Operation, OperationTable

LOST = TransferError(TransferCause.PEER_CLOSED, "lost")


def operation(deadline_ns: int = 100) -> Operation:
    return Operation(FrameKind.READ, [PageRange(0, 0, 4)], [np.zeros(4, np.uint8)], deadline_ns)


def table_with(*ops: Operation, max_ops: int = 8) -> OperationTable:
    table = OperationTable(max_ops, lambda: None)
    for op in ops:
        table.add(op)
    return table


def test_an_answer_that_overtakes_the_copying_thread_waits_for_it():
    op = operation()
    table = table_with(op)
    assert table.begin_touch(op)
    table.end(op)
    assert not op.future.done()
    table.end_touch(op)
    assert op.future.result(0) == 4


def test_the_first_outcome_stays():
    op = operation()
    table = table_with(op)
    table.end(op, LOST)
    table.end(op)
    table.expire(1_000)
    assert op.future.exception(0) is LOST


def test_expire_ends_what_is_late_and_defers_what_is_busy():
    late, busy, early = operation(100), operation(100), operation(101)
    table = table_with(late, busy, early)
    assert table.begin_touch(busy)
    table.expire(100)
    assert late.future.exception(0).cause is TransferCause.DEADLINE
    assert not busy.future.done()
    assert not early.future.done()
    assert table.next_deadline() == 101
    table.end_touch(busy)
    assert busy.future.exception(0).cause is TransferCause.DEADLINE
    assert len(table) == 3, "the peer has not had its last word on any"


def test_queued_operations_that_ended_are_skipped_and_forgotten():
    late, wanted = operation(1), operation(100)
    table = table_with(late, wanted)
    table.expire(1)
    assert table.next_queued() is wanted
    assert len(table) == 1


def test_the_bound_counts_until_the_last_word():
    op = operation()
    table = table_with(op, max_ops=1)
    table.end(op, LOST)
    with pytest.raises(ChannelBusy, match="1 operations"):
        table.add(operation())
    table.forget(op)
    table.add(operation())


def test_a_broken_table_ends_everything_now_and_later():
    first, busy, after = operation(), operation(), operation()
    table = table_with(first, busy)
    assert table.begin_touch(busy)
    table.fail_all(LOST)
    assert first.future.exception(0) is LOST
    assert not table.wait_quiet(timeout_s=0)
    table.end_touch(busy)
    assert table.wait_quiet(timeout_s=0)
    assert busy.future.exception(0) is LOST
    table.add(after)
    assert after.future.exception(0) is LOST
    assert table.next_queued() is None


def test_rearm_is_called_for_an_earlier_deadline_only():
    calls = []
    table = OperationTable(8, lambda: calls.append(None))
    table.add(operation(100))
    assert len(calls) == 1
    assert table.next_deadline() == 100
    table.add(operation(200))
    assert len(calls) == 1
    table.add(operation(50))
    assert len(calls) == 2


STEPS = st.lists(st.sampled_from(["begin", "let go", "succeed", "fail", "expire", "break"]), max_size=12)


@given(STEPS)
def test_no_order_of_events_ends_a_future_while_its_memory_is_touched(steps):
    op = operation()
    table = table_with(op)
    touching = False
    for step in steps:
        ended_before = op.future.done()
        match step:
            case "begin" if not touching:
                touching = table.begin_touch(op)
                assert not (touching and ended_before)
            case "let go":
                table.end_touch(op)
                touching = False
            case "succeed":
                table.end(op)
            case "fail":
                table.end(op, LOST)
            case "expire":
                table.expire(100)
            case "break":
                table.fail_all(LOST)
        assert not (touching and op.future.done())
    table.end_touch(op)
    decided = any(step in {"succeed", "fail", "expire", "break"} for step in steps)
    assert op.future.done() == decided
