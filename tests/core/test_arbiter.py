"""The arbiter: work conserving, 99 to 1, never starving, and exact however late it is polled."""

from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpath.core.arbiter import PACKET_BYTES, SECOND_NS, Arbiter, Grant
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


def test_a_high_chunk_waits_for_a_low_chunk_of_one_packet() -> None:
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
    st.tuples(
        st.integers(0, 500) | st.integers(0, 20_000),
        st.sampled_from(TrafficClass),
        st.integers(1, 300) | st.integers(1, 50_000),
        st.booleans(),
    ),
    max_size=60,
)


def test_a_high_chunk_whose_packet_has_passed_before_the_poll_waits_for_no_other() -> None:
    """Polled late, beyond its credit: it starts as early as the credit reaches back."""
    arbiter = Arbiter(111_111_112, burst_ns=10)
    arbiter.request(0, HIGH, 1)
    arbiter.request(0, LOW, 4097)
    late = arbiter.request(10, HIGH, 1)
    assert len(arbiter.poll(10)) == 2
    assert arbiter.next_wake() is not None and arbiter.next_wake() < 29  # type: ignore[operator]
    (grant,) = arbiter.poll(29)
    assert (grant.ticket, grant.start_ns) == (late, 19)


@settings(deadline=None, derandomize=True)
@given(chunks, st.integers(0, 2_000), st.integers(1, 3 * SECOND_NS))
def test_every_chunk_has_the_link_once_in_order_and_alone_in_its_class(
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
    for kind in TrafficClass:
        of_kind = [grant for grant in grants if asked[grant.ticket][1] is kind]
        assert [grant.ticket for grant in of_kind] == sorted(grant.ticket for grant in of_kind)
        assert all(before.done_ns <= after.start_ns for before, after in pairwise(of_kind))
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


def test_a_high_chunk_waits_for_the_low_packet_on_the_wire_only() -> None:
    """And the low chunk's rest goes after it: the next low one starts as much later."""
    arbiter = Arbiter(RATE)
    first, second = (arbiter.request(0, LOW, 100 * PACKET_BYTES) for _ in range(2))
    assert arbiter.poll(0) == [Grant(first, 0, 100 * PACKET_BYTES)]
    high = arbiter.request(PACKET_BYTES + 1, HIGH, 1_000)
    assert arbiter.next_wake() == 2 * PACKET_BYTES
    assert arbiter.poll(2 * PACKET_BYTES) == [Grant(high, 2 * PACKET_BYTES, 2 * PACKET_BYTES + 1_000)]
    assert arbiter.next_wake() == 100 * PACKET_BYTES + 1_000
    now = 100 * PACKET_BYTES + 1_000
    assert arbiter.poll(now) == [Grant(second, now, now + 100 * PACKET_BYTES)]


def test_a_high_chunk_waits_for_all_of_a_low_chunk_whose_turn_it_was() -> None:
    """Or a high class that never pauses would leave the low one nothing."""
    arbiter = Arbiter(RATE, weights=(2, 1))
    size = 10 * PACKET_BYTES
    lows, highs = ([arbiter.request(0, kind, size) for _ in range(3)] for kind in (LOW, HIGH))
    grants, now = [], 0
    while (wake := arbiter.next_wake()) is not None:
        now = max(now, wake)
        grants += arbiter.poll(now)
    assert [grant.ticket for grant in grants] == [highs[0], lows[0], highs[1], highs[2], lows[1], lows[2]]
    assert all(before.done_ns == after.start_ns for before, after in pairwise(grants))


class Layers(NamedTuple):
    """All-to-alls on one NIC: in each layer two, of `peers` messages at once, cut into chunks one after another."""

    sizes: tuple[int, int]
    peers: int
    share: float

    def starts(self, rate: int, layers: int, chunk: int) -> list[tuple[int, int]]:
        """When each begins, and its bytes to each peer: `share` of the link, after two chunks of KV."""
        first_ns = 2 * chunk * SECOND_NS // rate
        half_ns = round(sum(self.sizes) * self.peers * SECOND_NS / rate / self.share / 2)
        return [(first_ns + n * half_ns, self.sizes[n % 2]) for n in range(2 * layers)]


def run_layers(layers: Layers, rate: int, chunk: int, kv_flows: int) -> tuple[list[int], tuple[int, int], int]:
    """Under a virtual clock, polled whenever something can start: each all-to-all's time, bytes by class, and the end.

    `kv_flows` threads always have a chunk to send: each asks for its next as soon as one is sent.
    """
    arbiter = Arbiter(rate)
    begun = layers.starts(rate, 40, chunk)
    end_ns = begun[-1][0] + 2 * (begun[-1][0] - begun[-2][0]) + 3 * chunk * SECOND_NS // rate
    events: list[tuple[int, TrafficClass, int, int]] = []  # when it is asked for, the class, its bytes, whose
    for index, (start_ns, size) in enumerate(begun):
        events += [(start_ns, HIGH, size, index * layers.peers + peer) for peer in range(layers.peers)]
    events += [(0, LOW, 1 << 60, -1 - flow) for flow in range(kv_flows)]
    heapify(events)
    asked: dict[int, tuple[TrafficClass, int, int]] = {}
    done_ns = [0] * len(begun)
    while True:
        wake = arbiter.next_wake()
        if events and (wake is None or events[0][0] <= wake):
            now, kind, left, whose = heappop(events)
            if now >= end_ns:
                return (
                    [done - start for done, (start, _) in zip(done_ns, begun, strict=True)],
                    arbiter.served_bytes,
                    now,
                )
            asked[arbiter.request(now, kind, min(left, chunk))] = kind, left - min(left, chunk), whose
            continue
        if wake is None:
            return [done - start for done, (start, _) in zip(done_ns, begun, strict=True)], arbiter.served_bytes, end_ns
        for grant in arbiter.poll(wake):
            kind, left, whose = asked.pop(grant.ticket)
            if kind is HIGH:
                done_ns[whose // layers.peers] = max(done_ns[whose // layers.peers], grant.done_ns)
            if left:
                heappush(events, (grant.done_ns, kind, left, whose))


all_to_alls = st.builds(
    Layers,
    st.tuples(st.integers(2_000, 300_000), st.integers(2_000, 300_000)),
    st.integers(1, 7),
    st.floats(0.05, 0.6),
)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(all_to_alls, st.integers(20_000_000, 50_000_000_000), st.sampled_from([65_536, 262_144]), st.integers(1, 8))
def test_the_rule_of_isolation(layers: Layers, rate: int, chunk: int, kv_flows: int) -> None:
    """KV that saturates a link has what is left, and costs an all-to-all a packet or, once in 99 chunks, low's turn.

    Low's turn is two chunks at most: the rest of one, which no high chunk interrupts any more, and one.
    """
    idle, _, _ = run_layers(layers, rate, chunk, 0)
    beside, (high_bytes, low_bytes), end_ns = run_layers(layers, rate, chunk, kv_flows)
    packet_ns, chunk_ns = (-(-n_bytes * SECOND_NS // rate) for n_bytes in (PACKET_BYTES, chunk))
    delays = sorted(after - before for before, after in zip(idle, beside, strict=True))
    chunks = layers.peers * -(-max(layers.sizes) // chunk)  # each one's time is rounded up to a nanosecond
    assert delays[len(delays) // 2] <= packet_ns + chunks
    assert delays[-1] <= packet_ns + 2 * (chunk_ns + chunks)
    ratios = sorted(after / before for before, after in zip(idle, beside, strict=True))
    assert ratios[len(ratios) // 2] <= 1.1 or min(layers.sizes) * layers.peers < 10 * PACKET_BYTES
    assert high_bytes == sum(size for _, size in layers.starts(rate, 40, chunk)) * layers.peers
    assert low_bytes >= 0.97 * (rate * end_ns / SECOND_NS - high_bytes) - 2 * chunk
    assert low_bytes + high_bytes <= rate * end_ns / SECOND_NS + (kv_flows + 1) * chunk
