"""Lanes against a clock that moves only when somebody sleeps: what is granted when, to whom, and what is counted."""

import threading

import pytest

from dualpath.core.arbiter import PACKET_BYTES
from dualpath.core.vocabulary import TrafficClass
from dualpath.transfer.traffic import BURST_NS, DeadlineExceeded, TrafficManager

HIGH, LOW = TrafficClass.HIGH, TrafficClass.LOW
MB = 1_000_000
MS = 1_000_000


class SleptTime:
    """Time that passes only in `sleep`; `oversleep_ns` more than asked for."""

    def __init__(self, oversleep_ns: int = 0) -> None:
        self.now = 0
        self.oversleep_ns = oversleep_ns
        self.sleeps: list[int] = []

    def clock(self) -> int:
        return self.now

    def sleep(self, n_ns: int) -> None:
        self.sleeps.append(n_ns)
        self.now += n_ns + self.oversleep_ns


def manager(time: SleptTime, snic: int | None = None, cnic: int | None = None, burst_ns: int = 0) -> TrafficManager:
    return TrafficManager(snic, cnic, burst_ns=burst_ns, clock=time.clock, sleep=time.sleep)


def test_one_chunk_takes_its_time_on_the_wire():
    time = SleptTime()
    manager(time, cnic=100 * MB).cnic.tx.acquire(LOW, 65_536)
    assert time.now == 65_536 * 10


@pytest.mark.parametrize("oversleep_ns", [0, 80_000, 1_500_000])
def test_a_lone_thread_keeps_the_rate_however_badly_it_sleeps(oversleep_ns):
    time = SleptTime(oversleep_ns)
    lane = manager(time, cnic=100 * MB, burst_ns=BURST_NS).cnic.tx
    lane.acquire(LOW, 2 * 65_536)  # uses up some of what the lane saved while it was idle
    begun = time.now
    for _ in range(100):
        lane.acquire(LOW, 65_536)
    exact_ns = 100 * 65_536 * 10
    assert exact_ns - BURST_NS <= time.now - begun <= exact_ns + oversleep_ns
    assert lane.statistics().busy_ns == exact_ns + 2 * 65_536 * 10


def test_an_idle_lane_saves_up_no_more_than_its_burst():
    time = SleptTime()
    lane = manager(time, cnic=100 * MB, burst_ns=BURST_NS).cnic.tx
    for _ in range(3):
        time.now += 1_000 * MS
        begun = time.now
        lane.acquire(LOW, 10 * 65_536)
        assert time.now - begun == 10 * 65_536 * 10 - BURST_NS


def test_more_than_a_chunk_is_asked_for_in_chunks():
    time = SleptTime()
    lane = manager(time, snic=100 * MB).snic.rx
    lane.acquire(HIGH, 1_000_000)
    assert lane.statistics().high_bytes == 1_000_000
    assert time.now == 1_000_000 * 10
    assert max(time.sleeps) <= lane.chunk_bytes * 10


def test_directions_and_nics_do_not_share_a_rate():
    time = SleptTime()
    traffic = manager(time, snic=100 * MB, cnic=100 * MB)
    for lane in (traffic.snic.rx, traffic.snic.tx, traffic.cnic.rx, traffic.cnic.tx):
        lane.acquire(LOW, 65_536)
    assert time.now == 4 * 65_536 * 10, "one after the other only because one thread asked"
    statistics = traffic.statistics()
    for lane_statistics in (statistics.snic.rx, statistics.snic.tx, statistics.cnic.rx, statistics.cnic.tx):
        assert (lane_statistics.high_bytes, lane_statistics.low_bytes, lane_statistics.waiting) == (0, 65_536, 0)


def test_without_a_rate_nothing_sleeps_and_all_is_counted():
    time = SleptTime()
    traffic = manager(time)
    traffic.cnic.rx.acquire(HIGH, 10**12, deadline_ns=-1)
    traffic.cnic.rx.acquire(LOW, 7)
    traffic.cnic.rx.acquire(LOW, 0)
    statistics = traffic.statistics().cnic
    assert (statistics.rx.high_bytes, statistics.rx.low_bytes, statistics.rx.busy_ns) == (10**12, 7, 0)
    assert statistics.tx.high_bytes == statistics.tx.low_bytes == 0
    assert time.sleeps == []


def test_deadline_gives_the_ticket_back_and_says_what_was_sent():
    time = SleptTime()
    lane = manager(time, cnic=MB).cnic.tx  # a 64 KiB chunk takes 65.5 ms
    with pytest.raises(DeadlineExceeded, match=r"65536 of 200000 bytes sent") as late:
        lane.acquire(LOW, 200_000, deadline_ns=20 * MS)
    assert late.value.granted_bytes == 65_536
    statistics = lane.statistics()
    assert (statistics.low_bytes, statistics.waiting) == (65_536, 0)
    before = time.now
    lane.acquire(LOW, 1_000)
    assert lane.statistics().low_bytes == 66_536
    assert time.now >= before


@pytest.mark.parametrize("oversleep_ns", [0, 100 * MS])
def test_a_free_lane_grants_nothing_after_the_deadline(oversleep_ns):
    time = SleptTime(oversleep_ns)
    lane = manager(time, cnic=MB).cnic.tx
    with pytest.raises(DeadlineExceeded) as late:
        lane.acquire(LOW, 10 * 65_536, deadline_ns=60 * MS)
    assert late.value.granted_bytes == 65_536
    with pytest.raises(DeadlineExceeded):
        lane.acquire(LOW, 1, deadline_ns=time.now)
    assert lane.statistics().low_bytes == 65_536


def test_local_copy_charges_both_directions_at_once():
    time = SleptTime()
    traffic = manager(time, cnic=100 * MB)
    traffic.local_copy(1_000_000)
    cnic = traffic.statistics().cnic
    assert cnic.rx.low_bytes == cnic.tx.low_bytes == 1_000_000
    assert cnic.rx.waiting == cnic.tx.waiting == 0
    assert time.now == 1_000_000 * 10, "both lanes at the same time, not one after the other"


def test_local_copy_that_is_late_leaves_nobody_waiting():
    time = SleptTime()
    traffic = manager(time, cnic=MB)
    traffic.cnic.tx.acquire(LOW, 65_536)
    with pytest.raises(DeadlineExceeded):
        traffic.local_copy(65_536, deadline_ns=time.now)
    cnic = traffic.statistics().cnic
    assert cnic.rx.waiting == cnic.tx.waiting == 0


def test_waiting_high_goes_before_waiting_low():
    """One thread holds the wire in its sleep while others queue; then the order of the grants is the arbiter's."""
    order: list[str] = []
    queued = threading.Event()
    time = SleptTime()

    def sleep(n_ns: int) -> None:
        assert queued.wait(30)
        time.sleep(n_ns)

    traffic = TrafficManager(None, MB, burst_ns=0, clock=time.clock, sleep=sleep)
    lane = traffic.cnic.tx

    def move(name: str, traffic_class: TrafficClass) -> None:
        lane.acquire(traffic_class, 65_536)
        order.append(f"{name} by {lane.statistics().low_bytes + lane.statistics().high_bytes}")

    holder = threading.Thread(target=move, args=("first", LOW))
    holder.start()
    others = []
    for index, traffic_class in enumerate([LOW, LOW, HIGH]):
        while lane.statistics().waiting < index or lane.statistics().low_bytes == 0:
            threading.Event().wait(0.001)
        time.now = index  # in the middle of a packet, for which the high one waits
        others.append(threading.Thread(target=move, args=(traffic_class.name, traffic_class)))
        others[-1].start()
    while lane.statistics().waiting < 3:
        threading.Event().wait(0.001)
    grants = _record_grants(lane)
    queued.set()
    for thread in [holder, *others]:
        thread.join(30)
        assert not thread.is_alive()
    assert grants == [HIGH, LOW, LOW]
    assert len(order) == 4
    assert lane.statistics().waiting == 0


def _record_grants(lane) -> list[TrafficClass]:
    """The classes of what the lane grants from now on, read off its counters around every poll."""
    grants: list[TrafficClass] = []
    poll = lane._arbiter.poll

    def recording(now):
        before = lane._arbiter.served_bytes
        granted = poll(now)
        after = lane._arbiter.served_bytes
        grants.extend([HIGH] * ((after[0] - before[0]) // 65_536) + [LOW] * ((after[1] - before[1]) // 65_536))
        return granted

    lane._arbiter.poll = recording
    return grants


def test_the_lead_passes_over_a_chunk_that_nobody_waits_for():
    """As `local_copy` leaves one on its second lane while it waits for the first."""
    time = SleptTime()
    release = threading.Event()

    def sleep(n_ns: int) -> None:
        assert release.wait(30)
        time.sleep(n_ns)

    lane = TrafficManager(None, MB, burst_ns=0, clock=time.clock, sleep=sleep).cnic.tx
    threads = [threading.Thread(target=lane.acquire, args=(LOW, 65_536), daemon=True) for _ in range(3)]
    for index, thread in enumerate(threads):
        if index == 2:
            lane._begin(LOW, 65_536, None)
        waiting = {0: 0, 1: 1, 2: 3}[index]
        thread.start()
        while lane.statistics().low_bytes == 0 or lane.statistics().waiting < waiting:
            threading.Event().wait(0.001)
    release.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert lane.statistics().low_bytes == 4 * 65_536


def test_many_threads_on_one_lane_all_get_through_and_conserve_bytes():
    traffic = TrafficManager(None, 800 * MB)
    lane = traffic.cnic.rx
    threads = [
        threading.Thread(target=lambda kind=kind: [lane.acquire(kind, 65_536) for _ in range(50)])
        for kind in (HIGH, LOW, LOW, LOW)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    statistics = lane.statistics()
    assert (statistics.high_bytes, statistics.low_bytes) == (50 * 65_536, 150 * 65_536)
    assert statistics.waiting == 0
    assert statistics.busy_ns == 200 * -(-65_536 * 1_000_000_000 // (800 * MB))


def test_a_follower_whose_deadline_passes_leaves_while_the_leader_stays():
    time = SleptTime()
    release = threading.Event()

    def sleep(n_ns: int) -> None:
        assert release.wait(30)
        time.sleep(n_ns)

    lane = TrafficManager(None, MB, burst_ns=0, clock=time.clock, sleep=sleep).cnic.tx
    threads = [threading.Thread(target=lane.acquire, args=(LOW, 65_536)) for _ in range(2)]
    for index, thread in enumerate(threads):
        thread.start()
        while lane.statistics().low_bytes == 0 or lane.statistics().waiting < index:
            threading.Event().wait(0.001)
    ended: list[BaseException] = []

    def follow() -> None:
        try:
            lane.acquire(LOW, 65_536, deadline_ns=5 * MS)
        except DeadlineExceeded as late:
            ended.append(late)

    follower = threading.Thread(target=follow)
    follower.start()
    while lane.statistics().waiting < 2:
        threading.Event().wait(0.001)
    time.now = 6 * MS
    follower.join(30)
    assert len(ended) == 1
    assert lane.statistics().waiting == 1
    release.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert lane.statistics().low_bytes == 2 * 65_536


def test_a_high_chunk_does_not_wait_for_a_sleeping_low_leader():
    """A leader can't be woken, and a low one sleeps until the chunk on the wire is over: the high one leads then."""
    time = SleptTime()
    release = threading.Event()

    def sleep(n_ns: int) -> None:
        assert threading.current_thread().name == "high" or release.wait(30)
        time.sleep(n_ns)

    lane = TrafficManager(None, MB, burst_ns=0, clock=time.clock, sleep=sleep).cnic.tx
    lows = [threading.Thread(target=lane.acquire, args=(LOW, 65_536), daemon=True) for _ in range(2)]
    for index, thread in enumerate(lows):
        thread.start()
        while lane.statistics().low_bytes == 0 or lane.statistics().waiting < index:
            threading.Event().wait(0.001)
    high = threading.Thread(target=lane.acquire, args=(HIGH, 1_000), name="high", daemon=True)
    time.now = 1 * MS
    high.start()
    high.join(30)
    assert not high.is_alive() and lane.statistics().waiting == 1
    assert time.now == PACKET_BYTES * 1_000 + 1 * MS, "the rest of a packet, and its own time"
    release.set()
    for thread in lows:
        thread.join(30)
        assert not thread.is_alive()
    assert (lane.statistics().high_bytes, lane.statistics().low_bytes) == (1_000, 2 * 65_536)
