"""The arbiter: work conserving, 99 to 1, never starving, and exact however late it is polled."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpath.core.arbiter import SECOND_NS, Arbiter, Grant
from dualpath.core.vocabulary import TrafficClass

HIGH, LOW = TrafficClass.HIGH, TrafficClass.LOW
RATE = 1_000_000_000  # one byte a nanosecond, so that times can be read off


def test_a_lone_chunk_has_the_link_from_when_it_asked() -> None:
    arbiter = Arbiter(RATE)
    ticket = arbiter.request(100, LOW, 50)
    assert arbiter.next_wake() == 100
    assert arbiter.poll(100) == [Grant(ticket, 100, 150)]
    assert arbiter.next_wake() is None
    assert arbiter.served_bytes == (0, 50)
    assert arbiter.busy_ns == 50


def test_the_next_chunk_waits_until_the_link_is_free() -> None:
    arbiter = Arbiter(RATE)
    arbiter.request(0, LOW, 50)
    second = arbiter.request(0, LOW, 50)
    assert len(arbiter.poll(0)) == 1
    assert arbiter.queued_bytes == (0, 50)
    assert arbiter.next_wake() == 50
    assert arbiter.poll(49) == []
    assert arbiter.poll(50) == [Grant(second, 50, 100)]


def test_a_late_poll_loses_no_more_than_the_burst_forgives() -> None:
    arbiter = Arbiter(RATE, burst_ns=1_000)
    tickets = [arbiter.request(0, LOW, 100) for _ in range(3)]
    assert arbiter.poll(1_050) == [
        Grant(tickets[0], 50, 150),
        Grant(tickets[1], 150, 250),
        Grant(tickets[2], 250, 350),
    ]
    without_credit = Arbiter(RATE, burst_ns=0)
    first = without_credit.request(0, LOW, 100)
    assert without_credit.poll(1_050) == [Grant(first, 1_050, 1_150)]


def test_a_late_poll_does_not_let_a_later_high_chunk_jump_back_in_time() -> None:
    arbiter = Arbiter(RATE, burst_ns=1_000)
    low = arbiter.request(0, LOW, 100)
    high = arbiter.request(50, HIGH, 100)
    assert arbiter.poll(500) == [Grant(low, 0, 100), Grant(high, 100, 200)]


def test_both_backlogged_share_ninety_nine_to_one() -> None:
    arbiter = Arbiter(RATE)
    for _ in range(20_000):
        arbiter.request(0, HIGH, 1_000)
        arbiter.request(0, LOW, 1_000)
    now = 0
    for _ in range(10_000):
        now = arbiter.poll(now)[-1].done_ns
    high, low = arbiter.served_bytes
    assert high + low == 10_000_000
    assert abs(low - 100_000) <= 1_000, f"low had {low} of {high + low} bytes"


def test_a_high_chunk_waits_for_the_low_chunk_on_the_wire_only() -> None:
    arbiter = Arbiter(RATE)
    for _ in range(100):
        arbiter.request(0, LOW, 1_000)
    now = 0
    for _ in range(10):  # the low class has been alone for a while, and owes nothing for it
        now = arbiter.poll(now)[-1].done_ns
    arbiter.poll(now)
    high = arbiter.request(now + 1, HIGH, 10)
    assert arbiter.poll(now + 1_000) == [Grant(high, now + 1_000, now + 1_010)]


def test_a_low_chunk_is_served_soon_though_high_never_pauses() -> None:
    arbiter = Arbiter(RATE)
    for _ in range(1_000):
        arbiter.request(0, HIGH, 100)
    now = arbiter.poll(0)[-1].done_ns
    first = arbiter.request(now, LOW, 100)
    second = arbiter.request(now, LOW, 100)
    order = []
    while arbiter.next_wake() is not None:
        (grant,) = arbiter.poll(now)
        order.append(grant.ticket)
        now = grant.done_ns
    assert order.index(first) <= 1
    assert order.index(second) - order.index(first) == 100  # one in a hundred chunks is low


def test_an_idle_class_saves_up_no_credit() -> None:
    arbiter = Arbiter(RATE)
    for _ in range(2_000):
        arbiter.request(0, HIGH, 100)
    now = 0
    for _ in range(1_000):  # high alone: low could claim ten chunks here, had it been saving
        now = arbiter.poll(now)[-1].done_ns
    lows = [arbiter.request(now, LOW, 100) for _ in range(20)]
    served = []
    for _ in range(99):
        (grant,) = arbiter.poll(now)
        served.append(grant.ticket)
        now = grant.done_ns
    assert sum(ticket in lows for ticket in served) == 1


def test_a_cancelled_chunk_is_never_granted() -> None:
    arbiter = Arbiter(RATE)
    first = arbiter.request(0, LOW, 10)
    second = arbiter.request(0, LOW, 10)
    assert arbiter.cancel(first)
    assert not arbiter.cancel(first)
    assert not arbiter.cancel(12345)
    assert arbiter.queued_bytes == (0, 10)
    assert [grant.ticket for grant in arbiter.poll(0)] == [second]
    assert not arbiter.cancel(second)
    assert arbiter.next_wake() is None


def test_a_long_cancelled_queue_does_not_hold_its_class_back() -> None:
    arbiter = Arbiter(RATE)
    for ticket in [arbiter.request(0, LOW, 1_000_000) for _ in range(1_000)]:
        arbiter.cancel(ticket)
    highs = [arbiter.request(0, HIGH, 100) for _ in range(10)]
    low = arbiter.request(0, LOW, 100)
    arbiter.poll(0)
    assert [grant.ticket for grant in arbiter.poll(100)] == [low]
    assert highs


def test_an_unlimited_link_grants_at_once_and_counts() -> None:
    arbiter = Arbiter(None)
    tickets = [arbiter.request(7, kind, 1 << 40) for kind in (HIGH, LOW, HIGH)]
    grants = arbiter.poll(7)
    assert sorted(grant.ticket for grant in grants) == tickets
    assert all(grant.done_ns == 7 for grant in grants)
    assert arbiter.served_bytes == (2 << 40, 1 << 40)
    assert arbiter.busy_ns == 0


@pytest.mark.parametrize("arguments", [{"rate_bytes_per_s": 0}, {"weights": (99, 0)}, {"burst_ns": -1}])
def test_bad_settings_are_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="at least"):
        Arbiter(**{"rate_bytes_per_s": 1, **arguments})  # type: ignore[arg-type]


def test_an_empty_chunk_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        Arbiter(RATE).request(0, LOW, 0)


chunks = st.lists(
    st.tuples(st.integers(0, 500), st.sampled_from(TrafficClass), st.integers(1, 300), st.booleans()), max_size=60
)


@settings(deadline=None, derandomize=True)
@given(chunks, st.integers(0, 2_000), st.integers(1, 3 * SECOND_NS))
def test_every_chunk_has_the_link_once_in_order_and_alone(
    arrivals: list[tuple[int, TrafficClass, int, bool]], burst_ns: int, rate: int
) -> None:
    arbiter = Arbiter(rate, burst_ns=burst_ns)
    asked: dict[int, tuple[int, TrafficClass, int]] = {}
    grants: list[Grant] = []
    now = 0
    for gap, kind, n_bytes, polled in arrivals:
        now += gap
        asked[arbiter.request(now, kind, n_bytes)] = (now, kind, n_bytes)
        if polled:
            grants += arbiter.poll(now)
    while (wake := arbiter.next_wake()) is not None:
        now = max(now, wake)
        found = arbiter.poll(now)
        assert found, "next_wake promised a grant"
        grants += found
    assert sorted(grant.ticket for grant in grants) == sorted(asked)
    for grant in grants:
        asked_ns, _, n_bytes = asked[grant.ticket]
        assert grant.start_ns >= asked_ns
        assert (grant.done_ns - grant.start_ns) * rate >= n_bytes * SECOND_NS
    assert all(before.done_ns <= after.start_ns for before, after in pairwise(grants))
    for kind in TrafficClass:
        tickets = [grant.ticket for grant in grants if asked[grant.ticket][1] is kind]
        assert tickets == sorted(tickets)
    assert arbiter.queued_bytes == (0, 0)
    assert sum(arbiter.served_bytes) == sum(n_bytes for _, _, n_bytes in asked.values())


@settings(deadline=None, derandomize=True)
@given(chunks)
def test_polling_late_gives_the_grants_of_polling_always(
    arrivals: list[tuple[int, TrafficClass, int, bool]],
) -> None:
    eager, lazy = (Arbiter(RATE, burst_ns=10**9) for _ in range(2))
    eager_grants: list[Grant] = []
    now = 0
    for gap, kind, n_bytes, _ in arrivals:
        later = now + gap + 1
        while (wake := eager.next_wake()) is not None and wake < later:
            eager_grants += eager.poll(max(now, wake))
        now = later
        eager.request(now, kind, n_bytes)
        lazy.request(now, kind, n_bytes)
    end = now + 10**6
    while (wake := eager.next_wake()) is not None:
        eager_grants += eager.poll(max(now, wake))
    assert lazy.poll(end) == eager_grants
