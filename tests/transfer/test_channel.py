"""Both kinds of channel, through the same suite: bytes arrive exactly, bounds hold, accounts balance."""

import asyncio
import itertools
import socket
import threading

import numpy as np
import pytest
from channel_pair import PAGE_BYTES, PAGES, Pair, deadline_ns
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dualpath.core.vocabulary import TrafficClass
from dualpath.transfer import ChannelBusy, Span, TrafficManager, TransferCause, TransferError, connect
from dualpath.transfer.tcp import TOS

HIGH, LOW = TrafficClass.HIGH, TrafficClass.LOW
WAIT_S = 30


def random_bytes(n_bytes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, n_bytes, dtype=np.uint8)


@st.composite
def spans(draw, max_bytes: int = PAGE_BYTES):
    offset = draw(st.integers(0, PAGE_BYTES - 1))
    return Span(draw(st.integers(0, PAGES - 1)), offset, draw(st.integers(1, min(max_bytes, PAGE_BYTES - offset))))


descriptor_lists = st.lists(st.one_of(spans(), spans(max_bytes=64)), max_size=20)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.booleans(), descriptor_lists, st.integers(0, 2**32)), min_size=1, max_size=4))
def test_random_descriptor_lists_move_exactly_their_bytes(pair, operations):
    if pair.server is None:
        pair.serve()
        pair.connect()
    channel = pair.channels[0]
    model = np.stack([pair.pool.view(page).copy() for page in range(PAGES)])
    for is_write, descriptors, seed in operations:
        total_bytes = sum(span.n_bytes for span in descriptors)
        memory = random_bytes(total_bytes + 2, seed)
        edges = np.cumsum([1] + [span.n_bytes for span in descriptors])
        local = [memory[start:stop] for start, stop in itertools.pairwise(edges)]
        before = memory.copy()
        post = channel.write if is_write else channel.read
        assert post(descriptors, local, deadline_ns()).result(WAIT_S) == total_bytes
        if is_write:
            for span, array in zip(descriptors, local, strict=True):
                model[span.page, span.offset : span.offset + span.n_bytes] = array
            assert np.array_equal(memory, before)
        else:
            for span, array in zip(descriptors, local, strict=True):
                assert np.array_equal(array, model[span.page, span.offset : span.offset + span.n_bytes])
            assert (memory[0], memory[-1]) == (before[0], before[-1])
        for page in range(PAGES):
            assert np.array_equal(pair.pool.view(page), model[page])


def test_more_slices_than_one_system_call_takes(pair):
    pair.serve()
    channel = pair.connect()
    source = random_bytes(5_000)
    pieces = [Span(index % PAGES, 7 * index, 1) for index in range(5_000)]
    local = [source[index : index + 1] for index in range(5_000)]
    assert channel.write(pieces, local, deadline_ns()).result(WAIT_S) == 5_000
    assert all(pair.pool.view(span.page)[span.offset] == source[index] for index, span in enumerate(pieces))


@pytest.mark.parametrize("rate", [None, 400_000_000])
def test_many_operations_in_flight_both_ways(pair, rate):
    pair.serve(cnic_bytes_per_s=rate)
    pair.traffic = TrafficManager(cnic_bytes_per_s=rate)
    channel = pair.connect(max_ops_in_flight=128)
    half = PAGES // 2
    for page in range(half):
        pair.pool.view(page)[:] = random_bytes(PAGE_BYTES, page)
    whole = [Span(page, 0, PAGE_BYTES) for page in range(PAGES)]
    arrived = [np.zeros(PAGE_BYTES, np.uint8) for _ in range(half)]
    leaving = [random_bytes(PAGE_BYTES, 100 + page) for page in range(half)]
    futures = []
    for page in range(half):
        futures.append(channel.read([whole[page]], [arrived[page]], deadline_ns()))
        futures.append(channel.write([whole[half + page]], [leaving[page]], deadline_ns()))
        futures.append(channel.ping(bytes([page]) * 100, deadline_ns()))
    results = [future.result(WAIT_S) for future in futures]
    assert results[0::3] == results[1::3] == [PAGE_BYTES] * half
    assert results[2::3] == [bytes([page]) * 100 for page in range(half)]
    for page in range(half):
        assert np.array_equal(arrived[page], pair.pool.view(page))
        assert np.array_equal(leaving[page], pair.pool.view(half + page))
    assert channel.ops_in_flight == 0


def test_every_byte_that_leaves_one_nic_enters_the_other_in_its_class(pair):
    pair.serve(cnic_bytes_per_s=500_000_000)
    low, high = pair.connect(LOW), pair.connect(HIGH)
    local = [random_bytes(PAGE_BYTES), random_bytes(1_000)]
    low.write([Span(0, 0, PAGE_BYTES), Span(1, 5, 1_000)], local, deadline_ns()).result(WAIT_S)
    low.read([Span(0, 0, PAGE_BYTES)], local[:1], deadline_ns()).result(WAIT_S)
    high.read([Span(1, 5, 1_000)], local[1:], deadline_ns()).result(WAIT_S)
    high.ping(b"x" * 77, deadline_ns()).result(WAIT_S)
    ours, theirs = pair.traffic.statistics().cnic, pair.server_traffic.statistics().cnic
    assert (ours.tx.low_bytes, ours.tx.high_bytes) == (PAGE_BYTES + 1_000, 77)
    assert (ours.rx.low_bytes, ours.rx.high_bytes) == (PAGE_BYTES, 1_000 + 77)
    assert (theirs.rx.low_bytes, theirs.rx.high_bytes) == (ours.tx.low_bytes, ours.tx.high_bytes)
    assert (theirs.tx.low_bytes, theirs.tx.high_bytes) == (ours.rx.low_bytes, ours.rx.high_bytes)
    snic = pair.traffic.statistics().snic
    assert snic.rx.low_bytes == snic.tx.low_bytes == 0


@pytest.mark.parametrize(
    ("remote", "local_bytes"),
    [
        (Span(PAGES, 0, 10), 10),
        (Span(-1, 0, 10), 10),
        (Span(0, PAGE_BYTES - 5, 10), 10),
        (Span(0, -5, 10), 10),
        (Span(0, 0, 0), 0),
        (Span(0, 0, 10), 11),
        (Span(0, 2**63, 10), 10),
    ],
)
def test_bad_descriptors_fail_and_leave_the_channel_usable(pair, remote, local_bytes):
    pair.serve()
    channel = pair.connect()
    for post in (channel.read, channel.write):
        with pytest.raises(TransferError) as failure:
            post([remote], [np.zeros(local_bytes, np.uint8)], deadline_ns()).result(WAIT_S)
        assert failure.value.cause is TransferCause.BAD_DESCRIPTOR
    assert channel.ping(b"still here", deadline_ns()).result(WAIT_S) == b"still here"


def test_bad_local_memory_is_refused_with_its_shape(pair):
    pair.serve()
    channel = pair.connect()
    frozen = np.zeros(10, np.uint8)
    frozen.flags.writeable = False
    for local in ([], [frozen], [np.zeros(10, np.int8)], [np.zeros((2, 5), np.uint8)], [np.zeros(20, np.uint8)[::2]]):
        with pytest.raises(TransferError, match=r"array 0|0 arrays") as failure:
            channel.read([Span(0, 0, 10)], local, deadline_ns()).result(WAIT_S)
        assert failure.value.cause is TransferCause.BAD_DESCRIPTOR
    assert channel.write([Span(0, 0, 10)], [frozen], deadline_ns()).result(WAIT_S) == 10
    assert channel.read([], [], deadline_ns()).result(WAIT_S) == 0
    with pytest.raises(TransferError, match="65537 bytes"):
        channel.ping(b"x" * 65_537, deadline_ns()).result(WAIT_S)


def test_posting_beyond_the_bound_raises_at_once_and_recovers(pair):
    pair.serve(cnic_bytes_per_s=1_000_000)
    channel = pair.connect(max_ops_in_flight=3)
    target = np.zeros(100_000, np.uint8)
    futures = [channel.read([Span(0, 0, 100_000)], [target], deadline_ns()) for _ in range(3)]
    with pytest.raises(ChannelBusy, match="3 operations"):
        channel.read([Span(0, 0, 10)], [target[:10]], deadline_ns())
    assert [future.result(WAIT_S) for future in futures] == [100_000] * 3
    assert channel.ping(b"again", deadline_ns()).result(WAIT_S) == b"again"


def test_a_deadline_may_be_ages_away(pair):
    pair.serve(cnic_bytes_per_s=10_000_000)
    pair.traffic = TrafficManager(cnic_bytes_per_s=10_000_000)
    channel = pair.connect()
    memory = random_bytes(PAGE_BYTES)
    for post in (channel.write, channel.read):
        assert post([Span(0, 0, PAGE_BYTES)], [memory], 2**62).result(WAIT_S) == PAGE_BYTES
    with pytest.raises(ValueError, match="must be 1 to 1024"):
        pair.connect(max_ops_in_flight=0)


def test_futures_serve_asyncio(pair):
    pair.serve()
    channel = pair.connect()

    async def several():
        return await asyncio.gather(
            *(asyncio.wrap_future(channel.ping(bytes([n]), deadline_ns())) for n in range(1, 20))
        )

    assert asyncio.run(several()) == [bytes([n]) for n in range(1, 20)]


def test_a_callback_may_post(pair):
    pair.serve()
    channel = pair.connect()
    second = threading.Event()

    def post_again(future):
        channel.ping(future.result() + b"!", deadline_ns()).add_done_callback(lambda _: second.set())

    channel.ping(b"a", deadline_ns()).add_done_callback(post_again)
    assert second.wait(WAIT_S)


def test_close_ends_everything_and_refuses_more(pair):
    pair.serve(cnic_bytes_per_s=1_000_000)
    channel = pair.connect()
    target = np.zeros(PAGE_BYTES, np.uint8)
    futures = [channel.read([Span(0, 0, PAGE_BYTES)], [target], deadline_ns()) for _ in range(5)]
    futures += [channel.write([Span(1, 0, PAGE_BYTES)], [random_bytes(PAGE_BYTES)], deadline_ns())]
    channel.close()
    for future in [*futures, channel.ping(b"", deadline_ns())]:
        with pytest.raises(TransferError) as failure:
            future.result(WAIT_S)
        assert failure.value.cause is TransferCause.PEER_CLOSED
    assert not channel.is_open
    channel.close()


def test_reconnect_after_the_server_restarted(pair):
    address = pair.serve().address
    first = pair.connect()
    assert first.ping(b"1", deadline_ns()).result(WAIT_S) == b"1"
    pair.server.close()
    with pytest.raises(TransferError) as failure:
        first.ping(b"2", deadline_ns()).result(WAIT_S)
    assert failure.value.cause is TransferCause.PEER_CLOSED
    with pytest.raises(TransferError, match="cannot connect"):
        pair.connect()
    pair.serve(address)
    assert pair.connect().ping(b"3", deadline_ns()).result(WAIT_S) == b"3"
    assert not first.is_open


def test_addresses_that_are_none_say_what_one_looks_like(pair, tmp_path):
    for address in ("", "shm:", "tcp://host", "tcp://:1", "tcp://host:x", "tcp://host:1/path", "http://host:1"):
        with pytest.raises(ValueError, match=r"write shm:.*tcp://"):
            connect(address, local_traffic=pair.traffic, traffic_class=LOW, peer_tag="pe0")
    with pytest.raises(ValueError, match="107 bytes"):
        pair.serve(f"shm:/{'x' * 120}")
    with pytest.raises(ValueError, match="peers are given this address"):
        pair.serve("tcp://0.0.0.0:0")
    with pytest.raises(OSError, match="cannot listen at shm:"):
        pair.serve(f"shm:{tmp_path}/missing/x.sock")
    address = pair.serve().address
    with pytest.raises(OSError, match="cannot listen at"):
        type(pair.server)(pair.pool, pair.traffic, address)


def test_connections_beyond_the_bound_are_refused(pair):
    server = pair.serve()
    server._max_connections = 1
    kept = pair.connect()
    with pytest.raises(TransferError, match="did not welcome us") as failure:
        pair.connect()
    assert failure.value.cause is TransferCause.PEER_CLOSED
    assert server.statistics().connections_refused == 1
    assert kept.ping(b"", deadline_ns()).result(WAIT_S) == b""


def test_tcp_marks_both_ends_with_the_class(tmp_path):
    pair = Pair("tcp", tmp_path)
    try:
        pair.serve()
        for traffic_class in TrafficClass:
            channel = pair.connect(traffic_class)
            channel.ping(b"", deadline_ns()).result(WAIT_S)
            assert channel._stream._socket.getsockopt(socket.IPPROTO_IP, socket.IP_TOS) == TOS[traffic_class]
            served = list(pair.server._connections.values())[-1]
            assert served._connected.getsockopt(socket.IPPROTO_IP, socket.IP_TOS) == TOS[traffic_class]
    finally:
        pair.close()
