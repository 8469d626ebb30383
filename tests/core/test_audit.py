"""The audit finds each kind of corruption: a check that can't fail is a defect."""

from collections.abc import Callable

import pytest

from dualpath.core.audit import audit
from dualpath.core.ledger import _Held
from dualpath.core.lifecycle import Lifecycle
from dualpath.core.policy import Constants, Policy
from dualpath.core.request import NEVER_NS, Request, State
from dualpath.core.scheduler import Scheduler
from dualpath.core.vocabulary import Cause, EngineFacts, RequestFacts, Role, Side

PE, DE, SMALL_DE = 1, 2, 3
DECODING, PREFILLING, RETRYING, LOADING, IN_PE_LINE, IN_DE_LINE, QUEUED = range(10, 17)
"""Requests, by where they are."""


def busy() -> Lifecycle:
    """A PE and a DE with a request in every live state, one of whose earlier attempts is draining."""
    policy = Policy(placement="paper", read_path="pe_only")
    core = Scheduler(policy, Constants(alpha_tokens=1_000, beta_tokens=9_000))
    core.engine_joined(0, EngineFacts(PE, Role.PREFILL, 1, 0, 20))
    core.engine_joined(0, EngineFacts(DE, Role.DECODE, 2, 1, 55, 75))
    now = 0

    def submit(request: int, blocks: int) -> None:
        nonlocal now
        now += 10_000_000
        core.submit(now, RequestFacts(request, 0, 64 * blocks + 1, 64 * blocks, 1))

    for request in (DECODING, PREFILLING, RETRYING, LOADING):
        submit(request, 4)
        if request != LOADING:
            core.prepared(now, request, 0)
            core.loaded(now, request, 0, Side.PE)
    for request in (DECODING, RETRYING):
        core.prefill_done(now, request, 0)
    core.attempt_failed(now, RETRYING, 0, DE, Cause.COMPUTE_FAILED)
    for request in (IN_PE_LINE, IN_DE_LINE, QUEUED):
        submit(request, 19)
    core.engine_joined(now, EngineFacts(SMALL_DE, Role.DECODE, 3, 2, 10, 10))
    audit(core.life)
    return core.life


def test_the_busy_cluster_is_as_busy_as_it_should_be() -> None:
    life = busy()
    assert {request.id: request.state for request in life.requests.values()} == {
        DECODING: State.DECODING,
        PREFILLING: State.PREFILLING,
        RETRYING: State.RETRYING,
        LOADING: State.LOADING,
        IN_PE_LINE: State.ALLOCATING,
        IN_DE_LINE: State.ALLOCATING,
        QUEUED: State.QUEUED,
    }
    assert [key[0] for key in life.ledger.accounts[PE].line] == [IN_PE_LINE]
    assert [key[0] for key in life.ledger.accounts[DE].line] == [IN_DE_LINE]
    assert list(life.waiting.private) == [1]
    assert list(life.aborts.in_time) == [(DE, RETRYING, 0)]


def change(request: int, **fields: object) -> Callable[[Lifecycle], None]:
    def corrupt(life: Lifecycle) -> None:
        for name, value in fields.items():
            setattr(life.requests[request], name, value)

    return corrupt


def misfile(life: Lifecycle) -> None:
    life.requests[99] = life.requests.pop(DECODING)


def move_a_deadline_forward_by_hand(life: Lifecycle) -> None:
    life.requests[DECODING].deadline_ns = 1


def forget_to_wait(life: Lifecycle) -> None:
    del life.waiting.requests[QUEUED]


def stand_in_two_lines(life: Lifecycle) -> None:
    life.waiting.for_decode.append(life.requests[QUEUED])


def stand_in_the_pe_line(life: Lifecycle) -> None:
    life.waiting.for_prefill.append(life.requests[QUEUED])


def leave_the_private_queue(life: Lifecycle) -> None:
    del life.waiting.private[1]


def miscount_seq(life: Lifecycle) -> None:
    life.fleet.prefill.seq[0] += 1


def miscount_tok(life: Lifecycle) -> None:
    life.fleet.decode.tok[0] -= 64


def miscount_reads(life: Lifecycle) -> None:
    life.fleet.read_queues.tokens[0] += 64


def read_from_another_node(life: Lifecycle) -> None:
    life.fleet.prefill._places[0] = 1


def miscount_the_hbm_column(life: Lifecycle) -> None:
    life.fleet.decode.hbm_free[0] += 1


def miscount_the_group(life: Lifecycle) -> None:
    life.fleet.decode.groups[1].tok_total += 1


def miscount_the_groups_load(life: Lifecycle) -> None:
    life.fleet.decode.group_load[0] += 1


def look_away_from_a_group(life: Lifecycle) -> None:
    life.fleet.decode.groups[1].short_of_blocks = 1


def forget_an_account(life: Lifecycle) -> None:
    del life.ledger.accounts[SMALL_DE]


def leak_free_blocks(life: Lifecycle) -> None:
    life.ledger.accounts[PE].buffer_free_blocks -= 1


def overdraw(life: Lifecycle) -> None:
    account = life.ledger.accounts[SMALL_DE]
    account.held[RETRYING, 0] = _Held(buffer_blocks=11, draining=True)
    account.buffer_free_blocks = -1


def hold_without_owner(life: Lifecycle) -> None:
    life.ledger.accounts[SMALL_DE].held[99, 0] = _Held()


def drain_the_living(life: Lifecycle) -> None:
    life.ledger.accounts[DE].held[DECODING, 0].draining = True


def queue_the_dead(life: Lifecycle) -> None:
    life.ledger.accounts[PE].line[99, 0] = 1


def hold_too_much(life: Lifecycle) -> None:
    account = life.ledger.accounts[DE]
    account.held[DECODING, 0].buffer_blocks += 1
    account.buffer_free_blocks -= 1


def free_too_early(life: Lifecycle) -> None:
    account = life.ledger.accounts[DE]
    account.held[PREFILLING, 0].buffer_blocks -= 1
    account.buffer_free_blocks += 1


def free_the_pe_too_early(life: Lifecycle) -> None:
    account = life.ledger.accounts[PE]
    account.held[PREFILLING, 0].buffer_blocks -= 1
    account.buffer_free_blocks += 1


def promise_too_little(life: Lifecycle) -> None:
    life.ledger.accounts[DE].held[DECODING, 0].hbm_blocks -= 1


def leave_the_buffer_line(life: Lifecycle) -> None:
    life.ledger.accounts[DE].line.clear()


def forget_an_abort(life: Lifecycle) -> None:
    del life.aborts.in_time[DE, RETRYING, 0]


def count_an_abort_twice(life: Lifecycle) -> None:
    life.aborts.overdue[DE, RETRYING, 0] = None


def send_an_abort_out_of_turn(life: Lifecycle) -> None:
    life.aborts.in_time[DE, 98, 0] = 1


def wait_behind_nobody(life: Lifecycle) -> None:
    life.aborts.behind[PE, RETRYING, 0] = DE


CORRUPTIONS: list[tuple[Callable[[Lifecycle], None], str]] = [
    (misfile, "is filed as 99"),
    (change(DECODING, deadline_ns=NEVER_NS), "request 10 has no deadline"),
    (move_a_deadline_forward_by_hand, "nobody watches the deadline of request 10"),
    (change(DECODING, state=State.FINISHED), "is over and still known"),
    (forget_to_wait, "waits: False"),
    (change(DECODING, decode_engine=77), "on engine 77, gone"),
    (change(QUEUED, commanded=(PE,)), "more than a place in line"),
    (change(DECODING, prefill_engine=PE), "wrong engines"),
    (change(RETRYING, decode_engine=DE), "wrong engines"),
    (change(DECODING, legs=()), "do not cover the hit"),
    (change(PREFILLING, prepared=False), "before its KV is there"),
    (stand_in_the_pe_line, "the line for PEs"),
    (stand_in_two_lines, "the line for DEs"),
    (leave_the_private_queue, "private queues"),
    (miscount_seq, "engine 1: seq, tok, read_q"),
    (miscount_tok, "engine 2: seq, tok, read_q"),
    (miscount_reads, "engine 1: seq, tok, read_q"),
    (read_from_another_node, "read_q column"),
    (miscount_the_hbm_column, "free HBM blocks, column"),
    (miscount_the_group, "group 1: tok, free HBM"),
    (miscount_the_groups_load, "group 1: tok, free HBM"),
    (look_away_from_a_group, "the head would fit, and nobody looks"),
    (forget_an_account, "accounts and engines differ"),
    (leak_free_blocks, "engine 1: 8 held"),
    (overdraw, "overdrawn"),
    (hold_without_owner, "no owner"),
    (drain_the_living, "no owner"),
    (queue_the_dead, "the dead stand in line"),
    (hold_too_much, "6 blocks of DE buffer"),
    (free_too_early, "4 blocks of DE buffer"),
    (free_the_pe_too_early, "3 blocks of PE buffer"),
    (promise_too_little, "4 HBM blocks promised"),
    (leave_the_buffer_line, "in line for None"),
    (forget_an_abort, "draining"),
    (count_an_abort_twice, "both in time and overdue"),
    (send_an_abort_out_of_turn, "not in order"),
    (wait_behind_nobody, "which has no Abort"),
]


@pytest.mark.parametrize(("corrupt", "message"), CORRUPTIONS)
def test_each_corruption_is_found(corrupt: Callable[[Lifecycle], None], message: str) -> None:
    life = busy()
    corrupt(life)
    with pytest.raises(AssertionError, match=message):
        audit(life)


def test_a_head_of_line_that_would_fit_is_found() -> None:
    life = busy()
    account = life.ledger.accounts[DE]
    account.buffer_free_blocks += 100
    account.held[RETRYING, 0].buffer_blocks -= 100
    with pytest.raises(AssertionError, match="the head would fit"):
        audit(life)


def test_a_request_has_no_hidden_fields() -> None:
    """`change` above would silently set a misspelt one."""
    with pytest.raises(AttributeError):
        Request(RequestFacts(1, 0, 1, 0, 1)).colour = "red"  # type: ignore[attr-defined]
