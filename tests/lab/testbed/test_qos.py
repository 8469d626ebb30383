"""Messages like expert parallelism's, how they are timed, and the rule. What NICs do is measured, not tested."""

import time
from concurrent.futures import Future

import pytest

from dualpath.lab.testbed.expert_traffic import COMBINE_BYTES, DISPATCH_BYTES, Messages, expert_traffic
from dualpath.lab.testbed.failure import TestbedError
from dualpath.lab.testbed.qos_peer import Exchange, Exchanged, exchange
from dualpath.lab.testbed.qos_report import Phase, QosReport, Times, make_report, times_of
from dualpath.transfer.transport import PageRange

MS = 1_000_000


def test_sizes_are_those_of_deepseek_v3_on_its_own_link_and_smaller_on_a_slower_one() -> None:
    """128 tokens of 8 experts each among 8 ranks: DeepEP's setting. A token is 7.4 kB out and 14.3 kB back."""
    assert (DISPATCH_BYTES, COMBINE_BYTES) == (7392, 14336)
    assert expert_traffic(50_000_000_000, 8).sizes_bytes == (128 * 7392, 128 * 14336)
    assert expert_traffic(125_000_000, 4).sizes_bytes == (3 * 2 * 7392, 3 * 2 * 14336)
    assert expert_traffic(1, 4).sizes_bytes == (2 * 7392, 2 * 14336), "one token at least"


@pytest.mark.parametrize("rate", [1_000_000, 125_000_000, 50_000_000_000])
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("share", [0.1, 0.3])
def test_all_to_alls_take_their_share_of_the_link(rate: int, ranks: int, share: float) -> None:
    assert expert_traffic(rate, ranks, share).bytes_per_s(ranks - 1) == pytest.approx(share * rate, rel=1e-6)


@pytest.mark.parametrize(("ranks", "share"), [(1, 0.2), (4, 0), (4, 1)])
def test_no_traffic_without_peers_or_a_share(ranks: int, share: float) -> None:
    with pytest.raises(ValueError, match="at least two send"):
        expert_traffic(125_000_000, ranks, share)


class SlowChannel:
    """A write takes `takes_s`, during which nothing else happens."""

    is_open = True

    def __init__(self, takes_s: float) -> None:
        self.takes_s = takes_s
        self.written: list[list[PageRange]] = []

    def write(self, remote, _local, _deadline_ns) -> Future[int]:
        time.sleep(self.takes_s)
        self.written.append(remote)
        done: Future[int] = Future()
        done.set_result(sum(one.n_bytes for one in remote))
        return done


def test_an_exchange_writes_to_every_peer_and_leaves_out_periods_that_began_too_late() -> None:
    channels = [SlowChannel(0), SlowChannel(0.01), SlowChannel(0)]
    messages = Messages((100, 200), 8 * MS)
    found = exchange(channels, Exchange(0.1, time.monotonic_ns(), messages, (1, 2)))
    assert channels[0].written == []
    assert channels[1].written == channels[2].written
    assert [one[0].n_bytes for one in channels[1].written] == [100, 200] * len(found.took_ns)
    assert found.sent_bytes == 2 * 300 * len(found.took_ns)
    assert 0 in found.took_ns and 1 not in found.took_ns, "the first took more than 20 ms"
    assert all(took_ns >= 20 * MS for took_ns in found.took_ns.values())


def test_an_exchange_is_over_when_its_slowest_rank_is() -> None:
    ranks = [Exchanged({0: 1_000, 1: 9_000, 2: 3_000}, 0), Exchanged({0: 5_000, 1: 2_000, 3: 1_000}, 0)]
    assert times_of(ranks) == Times(7.0, 9.0, 2)
    with pytest.raises(TestbedError, match="all ranks"):
        times_of([Exchanged({0: 1}, 0), Exchanged({1: 1}, 0)])


def report_of(ping_us: float, all_to_all_us: float, kv: float) -> QosReport:
    def phase(name: str, factor: float, kv_bytes_per_s: float | None) -> Phase:
        pings, all_to_alls = Times(100 * factor, 0, 10), Times(1_000 * factor, 0, 10)
        return Phase(name, pings, all_to_alls, 20.0, kv_bytes_per_s)

    classes = Phase("classes", Times(ping_us, 0, 10), Times(all_to_all_us, 0, 10), 20.0, kv)
    seen = {
        "idle": [phase("idle", 1, None)] * 2,
        "elsewhere": [phase("elsewhere", 1.05, 100.0)] * 2,
        "fifo": [phase("fifo", 9, 100.0)] * 2,
        "classes": [classes] * 2,
        "kv alone": [Phase("kv alone", kv_bytes_per_s=100.0)] * 2,
    }
    return make_report("tcp", 125, Messages((1,), 1), 1.0, seen)


@pytest.mark.parametrize(
    ("ping_us", "all_to_all_us", "kv", "holds"),
    [(110, 1_100, 77.7, True), (111, 1_100, 80, False), (100, 1_110, 80, False), (100, 1_000, 77.5, False)],
)
def test_the_rule_is_about_both_kinds_of_messages_and_kv(
    ping_us: float, all_to_all_us: float, kv: float, holds: bool
) -> None:
    assert report_of(ping_us, all_to_all_us, kv).is_as_wanted is holds


def test_a_ratio_is_taken_within_a_round() -> None:
    """The second round's machine is twice as slow, which is nobody's delay."""
    slow = [Phase("", Times(p50_us, 0, 10), Times(p50_us, 0, 10), 0.0, 100.0) for p50_us in (100, 200)]
    found = make_report(
        "tcp", 125, Messages((1,), 1), 1.0, dict.fromkeys(("idle", "elsewhere", "fifo", "classes", "kv alone"), slow)
    )
    assert (found.pings.idle.median, found.pings.idle.low, found.pings.idle.high) == (1, 1, 1)
