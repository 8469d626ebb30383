"""What every transport promises (`dualpath.transfer.transport`): ours, installed ones and the example pass this suite.

Run it over yours, which must be importable::

    python -m pytest tests/transfer/test_conformance.py --transport NAME        # or module:attribute
"""

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from channel_pair import KEY, PAGE_BYTES, PAGES, SLOW, WAIT_S, WHOLE, Pair, deadline_ns, random_bytes, until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dualpath.core.vocabulary import TrafficClass
from dualpath.transfer import TRANSPORTS
from dualpath.transfer.pool_files import sweep_dead_pools
from dualpath.transfer.traffic import TrafficManager
from dualpath.transfer.transport import MAX_RANGES, ChannelBusy, PageRange, TransferCause, TransferError

pytestmark = pytest.mark.slow

HIGH, LOW = TrafficClass.HIGH, TrafficClass.LOW


def cause_of(future) -> TransferCause:
    with pytest.raises(TransferError) as failure:
        future.result(WAIT_S)
    return failure.value.cause


def works(pair, channel) -> None:
    """A byte written is the byte read."""
    out, back = np.array([time.monotonic_ns() % 256], np.uint8), np.zeros(1, np.uint8)
    at = [PageRange(PAGES - 1, PAGE_BYTES - 1, 1)]
    assert channel.is_open
    assert channel.write(at, [out], deadline_ns()).result(WAIT_S) == 1
    assert channel.read(at, [back], deadline_ns()).result(WAIT_S) == 1
    assert out[0] == back[0] == pair.pool.view(PAGES - 1)[PAGE_BYTES - 1]


# ── Bytes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@st.composite
def page_ranges(draw, max_bytes: int = PAGE_BYTES):
    offset = draw(st.integers(0, PAGE_BYTES - 1))
    return PageRange(draw(st.integers(0, PAGES - 1)), offset, draw(st.integers(1, min(max_bytes, PAGE_BYTES - offset))))


descriptor_lists = st.lists(st.one_of(page_ranges(), page_ranges(max_bytes=64)), max_size=20)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.booleans(), descriptor_lists, st.integers(0, 2**32)), min_size=1, max_size=4))
def test_random_descriptor_lists_move_exactly_their_bytes(pair, operations):
    if pair.server is None:
        pair.serve()
        pair.connect()
    channel = pair.channels[0]
    model = np.stack([pair.pool.view(page).copy() for page in range(PAGES)])
    for is_write, descriptors, seed in operations:
        if is_write:  # ranges of one write that overlap are in no order
            descriptors = list({one.page: one for one in descriptors}.values())
        total_bytes = sum(one.n_bytes for one in descriptors)
        memory = random_bytes(total_bytes + 2, seed)
        edges = np.cumsum([1] + [one.n_bytes for one in descriptors])
        local = [memory[start:stop] for start, stop in itertools.pairwise(edges)]
        before = memory.copy()
        post = channel.write if is_write else channel.read
        assert post(descriptors, local, deadline_ns()).result(WAIT_S) == total_bytes
        if is_write:
            for one, array in zip(descriptors, local, strict=True):
                model[one.page, one.offset : one.offset + one.n_bytes] = array
            assert np.array_equal(memory, before)
        else:
            for one, array in zip(descriptors, local, strict=True):
                assert np.array_equal(array, model[one.page, one.offset : one.offset + one.n_bytes])
            assert (memory[0], memory[-1]) == (before[0], before[-1])
        for page in range(PAGES):
            assert np.array_equal(pair.pool.view(page), model[page])


def test_an_operation_of_thousands_of_ranges(pair):
    pair.serve()
    channel = pair.connect()
    source = random_bytes(5_000)
    ranges = [PageRange(index % PAGES, 7 * index, 1) for index in range(5_000)]
    local = [source[index : index + 1] for index in range(5_000)]
    assert channel.write(ranges, local, deadline_ns()).result(WAIT_S) == 5_000
    assert all(pair.pool.view(one.page)[one.offset] == source[index] for index, one in enumerate(ranges))


@pytest.mark.parametrize("rate", [None, 400_000_000])
def test_many_operations_in_flight_both_ways(pair, rate):
    pair.serve(cnic_bytes_per_s=rate)
    pair.traffic = TrafficManager(cnic_bytes_per_s=rate)
    channel = pair.connect(max_ops_in_flight=128)
    half = PAGES // 2
    for page in range(half):
        pair.pool.view(page)[:] = random_bytes(PAGE_BYTES, page)
    whole = [PageRange(page, 0, PAGE_BYTES) for page in range(PAGES)]
    arrived = [np.zeros(PAGE_BYTES, np.uint8) for _ in range(half)]
    leaving = [random_bytes(PAGE_BYTES, 100 + page) for page in range(half)]
    futures = []
    for page in range(half):
        futures.append(channel.read([whole[page]], [arrived[page]], deadline_ns()))
        futures.append(channel.write([whole[half + page]], [leaving[page]], deadline_ns()))
    assert [future.result(WAIT_S) for future in futures] == [PAGE_BYTES] * PAGES
    for page in range(half):
        assert np.array_equal(arrived[page], pair.pool.view(page))
        assert np.array_equal(leaving[page], pair.pool.view(half + page))


def test_nothing_to_move_is_done(pair):
    pair.serve()
    channel = pair.connect()
    assert channel.read([], [], deadline_ns()).result(WAIT_S) == 0
    assert channel.write([], [], deadline_ns()).result(WAIT_S) == 0


# ── Classes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_lanes_count_every_byte_in_its_class(pair):
    """The initiator's always; the server's as well where its process takes part, or else not at all."""
    pair.serve(cnic_bytes_per_s=500_000_000)
    low, high = pair.connect(LOW), pair.connect(HIGH)
    local = [random_bytes(PAGE_BYTES), random_bytes(1_000)]
    low.write([WHOLE, PageRange(1, 5, 1_000)], local, deadline_ns()).result(WAIT_S)
    low.read([WHOLE], local[:1], deadline_ns()).result(WAIT_S)
    high.read([PageRange(1, 5, 1_000)], local[1:], deadline_ns()).result(WAIT_S)
    ours, theirs = pair.traffic.statistics().cnic, pair.server_traffic.statistics().cnic
    assert (ours.tx.low_bytes, ours.tx.high_bytes) == (PAGE_BYTES + 1_000, 0)
    assert (ours.rx.low_bytes, ours.rx.high_bytes) == (PAGE_BYTES, 1_000)
    passive = [theirs.rx.low_bytes, theirs.rx.high_bytes, theirs.tx.low_bytes, theirs.tx.high_bytes]
    assert passive in ([0, 0, 0, 0], [ours.tx.low_bytes, ours.tx.high_bytes, ours.rx.low_bytes, ours.rx.high_bytes])
    snic = pair.traffic.statistics().snic
    assert snic.rx.low_bytes == snic.tx.low_bytes == 0


@pytest.mark.parametrize("verb", ["read", "write"])
def test_the_high_class_overtakes_the_low_one(pair, verb):
    pair.serve()
    pair.traffic = TrafficManager(cnic_bytes_per_s=SLOW)
    low, high = pair.connect(LOW), pair.connect(HIGH)
    bulk, message = random_bytes(PAGE_BYTES), random_bytes(1_000)
    slow = [getattr(low, verb)([PageRange(page, 0, PAGE_BYTES)], [bulk.copy()], deadline_ns()) for page in range(3)]
    assert getattr(high, verb)([PageRange(4, 0, 1_000)], [message], deadline_ns()).result(WAIT_S) == 1_000
    assert not any(future.done() for future in slow)
    assert [future.result(WAIT_S) for future in slow] == [PAGE_BYTES] * 3


# ── Refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("remote", "local_bytes"),
    [
        (PageRange(PAGES, 0, 10), 10),
        (PageRange(-1, 0, 10), 10),
        (PageRange(0, PAGE_BYTES - 5, 10), 10),
        (PageRange(0, -5, 10), 10),
        (PageRange(0, 0, 0), 0),
        (PageRange(0, 0, 10), 11),
        (PageRange(0, 2**63, 10), 10),
    ],
)
def test_bad_descriptors_fail_and_leave_the_channel_usable(pair, remote, local_bytes):
    pair.serve()
    channel = pair.connect()
    for post in (channel.read, channel.write):
        assert cause_of(post([remote], [np.zeros(local_bytes, np.uint8)], deadline_ns())) is (
            TransferCause.BAD_DESCRIPTOR
        )
    works(pair, channel)


def test_bad_local_memory_is_refused_with_its_shape(pair):
    pair.serve()
    channel = pair.connect()
    frozen = np.zeros(10, np.uint8)
    frozen.flags.writeable = False
    for local in ([], [frozen], [np.zeros(10, np.int8)], [np.zeros((2, 5), np.uint8)], [np.zeros(20, np.uint8)[::2]]):
        with pytest.raises(TransferError, match=r"array 0|0 arrays") as failure:
            channel.read([PageRange(0, 0, 10)], local, deadline_ns()).result(WAIT_S)
        assert failure.value.cause is TransferCause.BAD_DESCRIPTOR
    assert channel.write([PageRange(0, 0, 10)], [frozen], deadline_ns()).result(WAIT_S) == 10
    byte = np.zeros(1, np.uint8)
    too_many = MAX_RANGES + 1
    future = channel.write([PageRange(0, 0, 1)] * too_many, [byte] * too_many, deadline_ns())
    assert cause_of(future) is TransferCause.BAD_DESCRIPTOR


def test_posting_beyond_the_bound_raises_at_once_and_recovers(pair):
    pair.serve()
    pair.traffic = TrafficManager(cnic_bytes_per_s=SLOW)
    channel = pair.connect(max_ops_in_flight=3)
    target = np.zeros(100_000, np.uint8)
    futures = [channel.read([PageRange(0, 0, 100_000)], [target], deadline_ns()) for _ in range(3)]
    with pytest.raises(ChannelBusy, match="3 operations"):
        channel.read([PageRange(0, 0, 10)], [target[:10]], deadline_ns())
    assert [future.result(WAIT_S) for future in futures] == [100_000] * 3
    works(pair, channel)
    with pytest.raises(ValueError, match="max_ops_in_flight is 0"):
        pair.connect(max_ops_in_flight=0)


@pytest.mark.parametrize("address", ["", "nonsense", "http://host:1", "{}"])
def test_an_address_that_is_none_is_named(pair, address):
    with pytest.raises(ValueError, match="is not an address of transport") as failure:
        pair.transport.connect(address, pair.traffic, traffic_class=LOW, peer_tag="pe0", key=KEY)
    assert repr(address) in str(failure.value)


# ── Futures ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_futures_serve_asyncio(pair):
    pair.serve()
    channel = pair.connect()
    pair.pool.view(0)[:20] = np.arange(20)
    into = np.zeros(20, np.uint8)

    async def several():
        return await asyncio.gather(
            *(
                asyncio.wrap_future(channel.read([PageRange(0, n, 1)], [into[n : n + 1]], deadline_ns()))
                for n in range(20)
            )
        )

    assert asyncio.run(several()) == [1] * 20
    assert np.array_equal(into, np.arange(20))


def test_a_callback_may_post(pair):
    pair.serve()
    channel = pair.connect(max_ops_in_flight=1)
    second = threading.Event()
    byte = np.zeros(1, np.uint8)

    def post_again(_):
        channel.read([PageRange(0, 0, 1)], [byte], deadline_ns()).add_done_callback(lambda _: second.set())

    channel.write([PageRange(0, 0, 1)], [byte], deadline_ns()).add_done_callback(post_again)
    assert second.wait(WAIT_S)


# ── Deadlines ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("verb", ["read", "write"])
def test_deadline_ends_an_operation_and_the_channel_goes_on(pair, verb):
    pair.serve()
    pair.traffic = TrafficManager(cnic_bytes_per_s=SLOW)
    channel = pair.connect()
    local = np.full(PAGE_BYTES, 7, np.uint8)
    assert cause_of(getattr(channel, verb)([WHOLE], [local], deadline_ns(0.1))) is TransferCause.DEADLINE
    after = local.copy()
    pair.pool.view(0)[:] = 99
    works(pair, channel)
    assert np.array_equal(local, after), "memory is the caller's again when the future has ended"


@pytest.mark.parametrize("verb", ["read", "write"])
def test_a_deadline_that_has_passed(pair, verb):
    pair.serve()
    channel = pair.connect()
    pair.pool.view(0)[:] = 1
    local = np.full(PAGE_BYTES, 7, np.uint8)
    assert cause_of(getattr(channel, verb)([WHOLE], [local], deadline_ns(-1))) is TransferCause.DEADLINE
    works(pair, channel)


def test_an_operation_that_waits_behind_a_long_one_ends_at_its_own_deadline(pair):
    pair.serve()
    pair.traffic = TrafficManager(cnic_bytes_per_s=SLOW)
    channel = pair.connect()
    source = np.full(PAGE_BYTES, 7, np.uint8)
    long = channel.write([WHOLE], [source], deadline_ns())
    until(lambda: pair.pool.view(0)[0] == 7, "the long one has begun")
    short = channel.write([PageRange(1, 0, PAGE_BYTES)], [source], deadline_ns(0.05))
    assert cause_of(short) is TransferCause.DEADLINE
    assert not long.done(), "the short one did not wait for the long one"
    assert long.result(WAIT_S) == PAGE_BYTES
    assert (pair.pool.view(1) == 7).sum() < PAGE_BYTES


def test_a_deadline_may_be_ages_away(pair):
    pair.serve(cnic_bytes_per_s=10_000_000)
    pair.traffic = TrafficManager(cnic_bytes_per_s=10_000_000)
    channel = pair.connect()
    memory = random_bytes(PAGE_BYTES)
    for post in (channel.write, channel.read):
        assert post([WHOLE], [memory], 2**62).result(WAIT_S) == PAGE_BYTES


# ── Ends ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_close_ends_everything_and_refuses_more(pair):
    pair.serve()
    pair.traffic = TrafficManager(cnic_bytes_per_s=SLOW)
    channel = pair.connect()
    target = np.zeros(PAGE_BYTES, np.uint8)
    futures = [channel.read([WHOLE], [target], deadline_ns()) for _ in range(5)]
    futures += [channel.write([PageRange(1, 0, PAGE_BYTES)], [random_bytes(PAGE_BYTES)], deadline_ns())]
    channel.close()
    for future in [*futures, channel.read([WHOLE], [target], deadline_ns())]:
        assert cause_of(future) is TransferCause.PEER_CLOSED
    assert not channel.is_open
    channel.close()


def test_a_server_that_closes_ends_its_channels_and_another_takes_its_place(pair):
    gone = pair.serve().address
    first = pair.connect()
    works(pair, first)
    pair.server.close()
    byte = np.zeros(1, np.uint8)
    assert cause_of(first.read([PageRange(0, 0, 1)], [byte], deadline_ns())) is TransferCause.PEER_CLOSED
    assert not first.is_open
    with pytest.raises(TransferError, match="cannot connect") as failure:
        pair.transport.connect(gone, pair.traffic, traffic_class=LOW, peer_tag="pe0", key=KEY)
    assert failure.value.cause is TransferCause.PEER_CLOSED
    pair.server.close()
    pair.serve()
    works(pair, pair.connect())
    assert not first.is_open


def test_idle_threads_sleep_until_something_happens(pair):
    """Context switches are counted, not time: a thread that polls in a loop has some, one that waits has none."""
    others = {thread.native_id for thread in threading.enumerate()}
    pair.serve()
    works(pair, pair.connect())
    threads = [thread for thread in threading.enumerate() if thread.native_id not in others]

    def switches() -> list[str]:
        statuses = [Path(f"/proc/self/task/{thread.native_id}/status").read_text() for thread in threads]
        return [line for status in statuses for line in status.splitlines() if line.startswith("voluntary")]

    time.sleep(0.1)
    before = switches()
    time.sleep(0.3)
    assert switches() == before


# ── Quiet ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_peer_of_which_nothing_is_known_is_quiet(pair):
    pair.serve()
    pair.server.quiesce("nobody").result(WAIT_S)


def test_a_disconnected_peer_touches_the_pool_no_more_and_may_come_back(pair):
    pair.serve(cnic_bytes_per_s=SLOW)
    pair.traffic = TrafficManager(cnic_bytes_per_s=SLOW)
    channel, *bystanders = (pair.connect(peer_tag=tag) for tag in ("7", "77", "7.7", "*"))
    source = np.full(PAGE_BYTES, 5, np.uint8)
    future = channel.write([WHOLE], [source], deadline_ns())
    until(lambda: pair.pool.view(0)[0] == 5, "the write has begun")
    pair.server.quiesce("7").result(WAIT_S)
    snapshot = pair.pool.view(0).copy()
    assert cause_of(future) is TransferCause.PEER_CLOSED
    until(lambda: not channel.is_open, "the channel knows")
    channel.close()
    assert np.array_equal(pair.pool.view(0), snapshot)
    assert 0 < (snapshot == 5).sum() < PAGE_BYTES
    for one in (*bystanders, pair.connect(peer_tag="7")):
        works(pair, one)


SERVER = """
import sys
from dualpath.transfer import TRANSPORTS
from dualpath.transfer.pool import BufferPool
from dualpath.transfer.traffic import TrafficManager
pool = BufferPool.create("victim", 8 << 20, 2)
pool.view(0)[:] = 0x11
traffic = TrafficManager(cnic_bytes_per_s=4_000_000)
server = TRANSPORTS.get(sys.argv[1]).serve(pool, traffic, host="127.0.0.1", name="victim", key=bytes(range(32)))
print(server.address, flush=True)
sys.stdin.read()
"""
WRITER = """
import sys, time
import numpy as np
from dualpath.core.vocabulary import TrafficClass
from dualpath.transfer import TRANSPORTS
from dualpath.transfer.traffic import TrafficManager
from dualpath.transfer.transport import PageRange
channel = TRANSPORTS.get(sys.argv[1]).connect(
    sys.argv[2],
    TrafficManager(cnic_bytes_per_s=int(sys.argv[3])),
    traffic_class=TrafficClass.LOW,
    peer_tag="victim",
    key=bytes(range(32)),
)
source = np.full(int(sys.argv[4]), 0x11, np.uint8)
future = channel.write([PageRange(0, 0, len(source))], [source], time.monotonic_ns() + 60_000_000_000)
print("posted", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def child(script: str, *args: str):
    process = subprocess.Popen(
        [sys.executable, "-c", script, *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
        sweep_dead_pools()


@pytest.mark.parametrize("verb", ["read", "write"])
def test_a_server_killed_in_the_middle_fails_the_future_and_nothing_is_touched_afterwards(transport, verb):
    with child(SERVER, transport) as server:
        channel = TRANSPORTS.get(transport).connect(
            server.stdout.readline().strip(),
            TrafficManager(cnic_bytes_per_s=4_000_000),
            traffic_class=LOW,
            peer_tag="pe0",
            key=KEY,
        )
        memory = np.zeros(8 << 20, np.uint8)
        future = getattr(channel, verb)([PageRange(0, 0, 8 << 20)], [memory], deadline_ns())
        if verb == "read":
            until(lambda: memory[0] == 0x11, "the first chunk has come")
        server.send_signal(signal.SIGKILL)
        assert cause_of(future) is TransferCause.PEER_CLOSED
        after = memory.copy()
        channel.close()
        assert not channel.is_open
        assert np.array_equal(memory, after)
        assert (memory == 0x11).sum() < memory.size
    TRANSPORTS.get(transport).sweep()


def test_an_initiator_killed_in_the_middle_of_a_write_becomes_quiet(pair):
    pair.serve()
    with child(WRITER, pair.kind, pair.server.address, str(SLOW), str(PAGE_BYTES)) as writer:
        assert writer.stdout.readline() == "posted\n"
        until(lambda: pair.pool.view(0)[0] == 0x11, "the first chunk has come")
        writer.send_signal(signal.SIGKILL)
        pair.server.quiesce("victim").result(WAIT_S)
        snapshot = pair.pool.view(0).copy()
        assert 0 < (snapshot == 0x11).sum() < PAGE_BYTES
        writer.wait(WAIT_S)
        assert np.array_equal(pair.pool.view(0), snapshot)
    works(pair, pair.connect())


def test_sweeping_removes_what_a_killed_server_left_and_nothing_else(transport, short_tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(short_tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(short_tmp_path))
    (short_tmp_path / "dualpath-notes.txt").write_text("not ours")
    pair = Pair(transport)
    try:
        pair.serve()
        alone = sorted(short_tmp_path.rglob("*"))
        with child(SERVER, transport) as server:
            assert server.stdout.readline()
            both = sorted(short_tmp_path.rglob("*"))
            assert pair.transport.sweep() == []
            assert sorted(short_tmp_path.rglob("*")) == both
            server.send_signal(signal.SIGKILL)
            server.wait(WAIT_S)
            assert bool(pair.transport.sweep()) == (both != alone)
            assert sorted(short_tmp_path.rglob("*")) == alone
        works(pair, pair.connect())
    finally:
        pair.close()
    left = [path for path in short_tmp_path.rglob("*") if not path.is_dir()]
    assert left == [short_tmp_path / "dualpath-notes.txt"]
