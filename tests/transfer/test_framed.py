"""What only our transports over sockets do: frames, a server that trusts nobody, counts, addresses, and what a future
waits for when a peer stalls in the middle of a chunk.
"""

import contextlib
import signal
import socket
import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from channel_pair import KEY, PAGE_BYTES, PAGES, SLOW, WAIT_S, WHOLE, Pair, deadline_ns, random_bytes, until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_conformance import SERVER, WRITER, cause_of, child, works

from dualpath.core.traffic_classes import CLASSES
from dualpath.core.vocabulary import TrafficClass
from dualpath.transfer.traffic import TrafficManager
from dualpath.transfer.transport import PageRange, TransferCause, TransferError
from dualpath.transfer.transports.framed.frames import (
    CAUSES,
    Frame,
    FrameKind,
    Stream,
    StreamClosed,
    pack_ranges,
)
from dualpath.transfer.transports.framed.handshake import (
    VERSION,
    Welcome,
    challenge,
    check_hello,
    packed,
    shake_hands,
)
from dualpath.transfer.transports.shm import SharedMemoryTransport
from dualpath.transfer.transports.tcp import TcpTransport

pytestmark = pytest.mark.slow

TRANSPORT_NAMES = ("shm", "tcp", "tcp-authenticated")
HIGH, LOW = TrafficClass.HIGH, TrafficClass.LOW


def connect(address, **options):
    return TcpTransport().connect(address, TrafficManager(), traffic_class=LOW, peer_tag="pe0", key=KEY, **options)


class RawPeer:
    """Speaks frames by hand, to say what our channels never would."""

    def __init__(self, pair: Pair, tag: str = "raw") -> None:
        self.socket = connected = pair.transport.dial(pair.server.address, LOW, WAIT_S)
        self.stream = Stream(connected, time.monotonic_ns)
        if tag:
            shake_hands(self.stream, KEY, tag, LOW, pair.transport.authenticated, deadline_ns())

    def receive(self, kind: FrameKind) -> Frame:
        frame = self.stream.receive_frame(deadline_ns())
        assert frame.kind is kind
        return frame

    def open(self, kind: FrameKind, op: int, ranges: list[PageRange], timeout_s: float = 30) -> None:
        total_bytes = sum(one.n_bytes for one in ranges)
        frame = Frame(kind, op, total_bytes, len(ranges), timeout_ns=int(timeout_s * 1e9))
        self.stream.send(frame, [pack_ranges(ranges)])

    def sealed(self, said: bytes) -> bytes:
        """As a member says it whose frames carry MACs: nonsense, but its own."""
        return said if self.stream.seal is None else self.stream.seal.opening(said, 0)

    def chunk(self, op: int, payload: bytes, inline: bool) -> None:
        self.stream.send(Frame(FrameKind.DATA, op, len(payload)), [payload] if inline else [])


@pytest.fixture
def raw_peers():
    peers = []

    def make(*args, **kwargs):
        peers.append(RawPeer(*args, **kwargs))
        return peers[-1]

    yield make
    for peer in peers:
        peer.stream.close()


# ── Deadlines ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("slow_side", ["ours", "theirs"])
@pytest.mark.parametrize("verb", ["read", "write"])
def test_deadline_ends_an_operation_and_the_channel_goes_on(pair, verb, slow_side):
    pair.serve(cnic_bytes_per_s=SLOW if slow_side == "theirs" else None)
    pair.traffic = TrafficManager(cnic_bytes_per_s=SLOW if slow_side == "ours" else None)
    channel = pair.connect()
    local = np.full(PAGE_BYTES, 7, np.uint8)
    assert cause_of(getattr(channel, verb)([WHOLE], [local], deadline_ns(0.1))) is TransferCause.DEADLINE
    after = local.copy()
    local_again = np.zeros(1_000, np.uint8)
    pair.pool.view(1)[:1_000] = 9
    assert channel.read([PageRange(1, 0, 1_000)], [local_again], deadline_ns()).result(WAIT_S) == 1_000
    assert np.all(local_again == 9)
    until(lambda: channel.ops_in_flight == 0, "the late operation's last frame has come")
    assert np.array_equal(local, after)


def test_an_operation_that_waits_behind_a_long_one_ends_at_its_own_deadline(pair):
    pair.serve(cnic_bytes_per_s=SLOW)
    pair.traffic = TrafficManager(cnic_bytes_per_s=SLOW)
    channel = pair.connect()
    source = np.full(PAGE_BYTES, 7, np.uint8)
    long = channel.write([WHOLE], [source], deadline_ns())
    short = channel.write([PageRange(1, 0, 100)], [source[:100]], deadline_ns(0.05))
    assert cause_of(short) is TransferCause.DEADLINE
    assert not long.done(), "the short one did not wait for the long one"
    assert long.result(WAIT_S) == PAGE_BYTES
    works(pair, channel)
    assert not pair.pool.view(1).any(), "a write that never began has written nothing"


class SilentServer:
    """Welcomes a TCP channel and then reads only when told to."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        self.address = f"tcp://127.0.0.1:{self.listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self._welcome)
        self.thread.start()

    def _welcome(self) -> None:
        connected, _ = self.listener.accept()
        self.stream = Stream(connected, time.monotonic_ns)
        given = challenge(authenticated=False)
        connected.sendall(packed(FrameKind.CHALLENGE, given))
        session = check_hello(KEY, given, self.stream.receive_bytes(self.stream.receive_frame().n_bytes))
        welcome = Welcome(VERSION, 8 << 20, 8)
        connected.sendall(
            packed(FrameKind.WELCOME, msgspec.structs.replace(welcome, proof=session.server_proof(welcome)))
        )


@pytest.fixture
def silent():
    server = SilentServer()
    yield server
    server.thread.join()
    server.stream.close()
    server.listener.close()


def test_memory_of_a_write_to_a_stalled_peer_is_the_callers_again_at_the_deadline(silent):
    channel = connect(silent.address)
    silent.thread.join()
    channel._stream._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
    total_bytes = 8 << 20
    memory = np.full(total_bytes, 0x11, np.uint8)
    future = channel.write([PageRange(0, 0, total_bytes)], [memory], deadline_ns(0.3))
    assert cause_of(future) is TransferCause.DEADLINE
    memory[:] = 0xEE
    received = []
    opening = silent.stream.receive_frame(deadline_ns())
    silent.stream.receive_bytes(opening.ranges * 24)
    while (frame := silent.stream.receive_frame(deadline_ns())).kind is FrameKind.DATA:
        received.append(silent.stream.receive_bytes(frame.n_bytes, deadline_ns()))
    assert frame == Frame(FrameKind.ABORT, opening.op)
    content = b"".join(received)
    assert len(content) == 1 << 20, "the chunk that was on its way, to its end"
    assert 0 < content.count(0x11) < len(content)
    assert b"\xee" not in content
    assert content.count(0x11) + content.count(0) == len(content)
    until(lambda: channel.ops_in_flight == 0, "the aborted write is forgotten")
    channel.close()


def test_memory_of_a_read_that_stalls_in_a_chunk_is_the_callers_again_at_the_deadline(silent):
    channel = connect(silent.address)
    silent.thread.join()
    memory = np.zeros(1_000, np.uint8)
    future = channel.read([PageRange(0, 0, 1_000)], [memory], deadline_ns(0.3))
    opening = silent.stream.receive_frame(deadline_ns())
    assert opening.kind is FrameKind.READ
    assert 0 < opening.timeout_ns <= 300_000_000
    silent.stream.receive_bytes(24)
    silent.stream.send(Frame(FrameKind.DATA, opening.op, 1_000), [])
    silent.stream._socket.send(b"\x11" * 400)
    assert cause_of(future) is TransferCause.DEADLINE
    memory[:] = 0xEE
    silent.stream._socket.send(b"\x22" * 600)
    again = np.zeros(3, np.uint8)
    second = channel.read([PageRange(0, 0, 3)], [again], deadline_ns())
    opening = silent.stream.receive_frame(deadline_ns())
    silent.stream.receive_bytes(24)
    silent.stream.send(Frame(FrameKind.DATA, opening.op, 3), [b"abc"])
    assert second.result(WAIT_S) == 3
    assert again.tobytes() == b"abc"
    assert np.all(memory == 0xEE)
    channel.close()


@pytest.mark.parametrize(
    "nonsense",
    [
        Frame(FrameKind.DATA, 1, 1_001),
        Frame(FrameKind.DATA, 99, 10),
        Frame(FrameKind.DONE, 1),
        Frame(FrameKind.BUSY, 1, 5),
        Frame(FrameKind.WELCOME),
    ],
)
def test_a_server_that_answers_nonsense_breaks_the_channel_not_the_engine(silent, nonsense):
    channel = connect(silent.address)
    silent.thread.join()
    future = channel.read([PageRange(0, 0, 1_000)], [np.zeros(1_000, np.uint8)], deadline_ns())
    silent.stream.receive_frame(deadline_ns())
    silent.stream.send(nonsense, [bytes(nonsense.n_bytes)])
    assert cause_of(future) is TransferCause.PROTOCOL
    assert not channel.is_open
    channel.close()


def test_connecting_to_what_never_answers_ends_in_time():
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(TransferError, match="did not answer in time") as failure:
            connect(address, timeout_s=0.1)
        assert failure.value.cause is TransferCause.PEER_CLOSED


# ── A server that trusts nobody ──────────────────────────────────────────────────────────────────────────────────────


def test_server_refuses_bad_descriptors_by_an_error_and_goes_on(pair, raw_peers):
    server = pair.serve()
    peer = raw_peers(pair)
    before = [pair.pool.view(page).copy() for page in range(PAGES)]
    peer.open(FrameKind.READ, 1, [PageRange(PAGES, 0, 10)])
    error = peer.receive(FrameKind.ERROR)
    assert (error.op, CAUSES[error.cause]) == (1, TransferCause.BAD_DESCRIPTOR)
    assert b"page 12" in peer.stream.receive_bytes(error.n_bytes)
    peer.open(FrameKind.WRITE, 2, [PageRange(0, PAGE_BYTES - 1, 2_000)])
    peer.chunk(2, b"\x33" * 1_500, pair.kind != "shm")
    peer.chunk(2, b"\x33" * 500, pair.kind != "shm")
    error = peer.receive(FrameKind.ERROR)
    assert (error.op, CAUSES[error.cause]) == (2, TransferCause.BAD_DESCRIPTOR)
    peer.stream.receive_bytes(error.n_bytes)
    peer.open(FrameKind.READ, 3, [PageRange(0, 0, 10)])
    assert peer.receive(FrameKind.DATA).op == 3
    if pair.kind != "shm":
        peer.stream.receive_bytes(10)
    assert all(np.array_equal(pair.pool.view(page), before[page]) for page in range(PAGES))
    statistics = server.statistics()
    assert (statistics.ops_rejected, statistics.protocol_errors, statistics.connections_open) == (2, 0, 1)


def frames_no_peer_sends() -> list[bytes]:
    ranges = pack_ranges([PageRange(0, 0, 10)])
    return [
        b"GET / HTTP/1.1\r\nHost: engine\r\n\r\n" + bytes(40),
        Frame(FrameKind.WRITE, 1, 10**12, 1).pack() + ranges,
        Frame(FrameKind.WRITE, 0, 10, 1).pack() + ranges,
        Frame(FrameKind.READ, 1, 0, 0).pack(),
        Frame(FrameKind.READ, 1, 10, 70_000).pack(),
        Frame(FrameKind.DATA, 77, 10).pack() + bytes(10),
        Frame(FrameKind.WRITE, 5, 10, 1).pack() + ranges + Frame(FrameKind.DATA, 5, 11).pack() + bytes(11),
        Frame(FrameKind.DATA, 5, 1 << 40).pack(),
        Frame(FrameKind.ABORT, 3).pack(),
        Frame(FrameKind.IDLE, 3).pack(),
        Frame(FrameKind.HELLO, n_bytes=3).pack() + b"abc",
        Frame(FrameKind.WELCOME, 3, 1 << 30).pack(),
        Frame(FrameKind.ERROR, 3, cause=200).pack(),
        (Frame(FrameKind.WRITE, 5, 10, 1).pack() + ranges) * 2,
        b"".join(Frame(FrameKind.WRITE, op, 10, 1).pack() + ranges for op in range(1, 5_000)),
    ]


@pytest.mark.parametrize("said", frames_no_peer_sends())
@pytest.mark.parametrize("tag", ["raw", ""])
def test_a_peer_that_talks_nonsense_is_counted_and_closed(pair, raw_peers, said, tag):
    server = pair.serve()
    good = pair.connect()
    peer = raw_peers(pair, tag=tag)
    peer.socket.setblocking(True)
    peer.socket.settimeout(WAIT_S)
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        peer.socket.sendall(peer.sealed(said))
        while peer.socket.recv(65_536):
            pass
    peer.stream.close()
    until(lambda: server.statistics().connections_open == 1, "the connection is gone")
    statistics = server.statistics()
    refused = (0, 1) if tag else (1, 0)  # a stranger is turned away at the door
    assert (statistics.connections_refused, statistics.protocol_errors, statistics.ops_in_flight) == (*refused, 0)
    works(pair, good)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(said=st.binary(min_size=1, max_size=200), greeted=st.booleans())
def test_random_bytes_do_not_bring_a_server_down(pair, said, greeted):
    server = pair.server or pair.serve()
    peer = RawPeer(pair, tag="raw" if greeted else "")
    peer.socket.setblocking(True)
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        peer.socket.sendall(peer.sealed(said))
    peer.stream.close()
    until(lambda: server.statistics().connections_open == 0, "the connection is gone")
    assert server.statistics().ops_in_flight == 0
    works(pair, pair.connect())
    pair.channels.pop().close()
    until(lambda: server.statistics().connections_open == 0, "the good connection is gone too")


# ── Quiet ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_quiesce_of_a_peer_with_nothing_in_flight_is_done_at_once(pair):
    server = pair.serve()
    assert server.quiesce("nobody", disconnect=False).done()
    works(pair, pair.connect(peer_tag="pe0"))
    until(lambda: server.quiesce("pe0", disconnect=False).done(), "its last DONE has come")


def test_quiesce_waits_for_what_is_in_flight_and_not_for_what_comes_later(pair, raw_peers):
    server = pair.serve()
    inline = pair.kind != "shm"
    peer = raw_peers(pair, tag="pe0")
    peer.open(FrameKind.WRITE, 1, [PageRange(0, 0, 100)])
    until(lambda: server.statistics().ops_in_flight == 1, "the write is open")
    barrier = server.quiesce("pe0", disconnect=False)
    peer.open(FrameKind.WRITE, 2, [PageRange(1, 0, 100)])
    until(lambda: server.statistics().ops_in_flight == 2, "the second write is open")
    assert server.quiesce("pe1", disconnect=False).done()
    peer.chunk(1, b"a" * 60, inline)
    assert not barrier.done()
    peer.chunk(1, b"a" * 40, inline)
    barrier.result(WAIT_S)
    assert server.statistics().ops_in_flight == 1
    second = server.quiesce("pe0", disconnect=False)
    assert not second.done()
    peer.stream.send(Frame(FrameKind.ABORT, 2))
    second.result(WAIT_S)


def test_a_read_over_shared_memory_is_over_when_the_reader_says_so(raw_peers):
    pair = Pair("shm")
    try:
        server = pair.serve()
        peer = raw_peers(pair, tag="pe0")
        peer.open(FrameKind.READ, 1, [PageRange(0, 0, 100)])
        assert peer.receive(FrameKind.DATA).n_bytes == 100
        barrier = server.quiesce("pe0", disconnect=False)
        assert not barrier.done()
        peer.stream.send(Frame(FrameKind.DONE, 1))
        barrier.result(WAIT_S)
    finally:
        pair.close()


def test_disconnecting_a_peer_ends_its_operations_and_proves_it_quiet(pair):
    server = pair.serve(cnic_bytes_per_s=SLOW)
    pair.traffic = TrafficManager(cnic_bytes_per_s=SLOW)
    channel, bystander = pair.connect(peer_tag="pe0"), pair.connect(peer_tag="pe1")
    source = np.full(PAGE_BYTES, 5, np.uint8)
    future = channel.write([WHOLE], [source], deadline_ns())
    until(lambda: server.statistics().ops_in_flight == 1, "the write is open")
    server.quiesce("pe0").result(WAIT_S)
    snapshot = pair.pool.view(0).copy()
    assert cause_of(future) is TransferCause.PEER_CLOSED
    channel.close()
    assert np.array_equal(pair.pool.view(0), snapshot)
    works(pair, bystander)


def test_a_peer_that_never_lets_go_of_shared_memory_is_not_called_quiet(raw_peers):
    pair = Pair("shm")
    try:
        server = pair.serve()
        peer = raw_peers(pair, tag="pe0")
        peer.open(FrameKind.WRITE, 1, [PageRange(0, 0, 100)])
        until(lambda: server.statistics().ops_in_flight == 1, "the write is open")
        barrier = server.quiesce("pe0")
        with pytest.raises(StreamClosed):
            peer.stream.receive_frame(deadline_ns())
        assert not barrier.done()
        server.close(grace_s=0.05)
        assert cause_of(barrier) is TransferCause.PEER_CLOSED
    finally:
        pair.close()


# ── What an initiator that was killed leaves ─────────────────────────────────────────────────────────────────────────


def test_an_initiator_killed_in_a_write_is_waited_for_without_being_disconnected(pair):
    server = pair.serve()
    with child(WRITER, pair.kind, server.address, str(SLOW), str(PAGE_BYTES)) as writer:
        assert writer.stdout.readline() == "posted\n"
        until(lambda: pair.pool.view(0)[0] == 0x11, "the first chunk has come")
        barrier = server.quiesce("victim", disconnect=False)
        assert not barrier.done()
        writer.send_signal(signal.SIGKILL)
        barrier.result(WAIT_S)
        snapshot = pair.pool.view(0).copy()
        assert 0 < (snapshot == 0x11).sum() < PAGE_BYTES
        until(lambda: server.statistics().connections_open == 0, "the connection is gone")
        assert np.array_equal(pair.pool.view(0), snapshot)
        assert server.statistics().protocol_errors == 0


# ── Addresses ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_reconnect_after_the_server_restarted_at_its_address(pair):
    address = pair.serve().address
    first = pair.connect()
    works(pair, first)
    pair.server.close()
    assert cause_of(first.write([WHOLE], [random_bytes(PAGE_BYTES)], deadline_ns())) is TransferCause.PEER_CLOSED
    with pytest.raises(TransferError, match="cannot connect"):
        pair.connect()
    pair.serve(address)
    works(pair, pair.connect())
    assert not first.is_open
    with pytest.raises(OSError, match="cannot listen at"):
        type(pair.server)(pair.transport, pair.pool, pair.traffic, address, KEY)


def test_server_socket_left_by_a_killed_server_is_replaced():
    pair = Pair("shm")
    try:
        with child(SERVER, "shm") as server:
            address = server.stdout.readline().strip()
            server.send_signal(signal.SIGKILL)
            server.wait(WAIT_S)
        assert Path(address.removeprefix("shm:")).is_socket()
        pair.serve(address)
        works(pair, pair.connect())
    finally:
        pair.close()


@pytest.mark.parametrize("address", ["tcp://host", "tcp://:1", "tcp://host:x", "tcp://host:1/path", "http://host:1"])
def test_tcp_addresses_say_what_one_looks_like(address):
    with pytest.raises(ValueError, match=r"is not an address of transport tcp; give one like tcp://10"):
        connect(address)


def test_where_nobody_can_listen(tmp_path):
    for address, complaint in (
        ("shm:", "is not an address of transport shm; give one like shm:"),
        (f"shm:/{'x' * 120}", "107 bytes"),
        (f"shm:{tmp_path}/missing/x.sock", "cannot listen at shm:"),
    ):
        with pytest.raises((OSError, ValueError), match=complaint):
            SharedMemoryTransport().listen(address)
    with pytest.raises(ValueError, match="would be given to peers"):
        TcpTransport().listen("tcp://0.0.0.0:0")


def test_a_host_of_ipv6_is_an_address_too():
    listener, address = TcpTransport().listen(TcpTransport().bind_address("::1", ""))
    with contextlib.closing(listener):
        assert address == f"tcp://[::1]:{listener.getsockname()[1]}"
        TcpTransport().dial(address, LOW, WAIT_S).close()


def test_a_shm_peer_whose_pool_is_gone_is_told_so():
    pair = Pair("shm")
    try:
        pair.serve()
        pair.pool.path.unlink()
        with pytest.raises(TransferError, match="No such file"):
            pair.connect()
    finally:
        pair.close()


# ── Counts and bounds ────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_byte_that_leaves_one_nic_enters_the_other_in_its_class(pair):
    pair.serve(cnic_bytes_per_s=500_000_000)
    low, high = pair.connect(LOW), pair.connect(HIGH)
    local = [random_bytes(PAGE_BYTES), random_bytes(1_000)]
    low.write([WHOLE, PageRange(1, 5, 1_000)], local, deadline_ns()).result(WAIT_S)
    low.read([WHOLE], local[:1], deadline_ns()).result(WAIT_S)
    high.read([PageRange(1, 5, 1_000)], local[1:], deadline_ns()).result(WAIT_S)
    high.write([PageRange(1, 5, 77)], [random_bytes(77)], deadline_ns()).result(WAIT_S)
    ours, theirs = pair.traffic.statistics().cnic, pair.server_traffic.statistics().cnic
    assert (ours.tx.low_bytes, ours.tx.high_bytes) == (PAGE_BYTES + 1_000, 77)
    assert (ours.rx.low_bytes, ours.rx.high_bytes) == (PAGE_BYTES, 1_000)
    assert (theirs.rx.low_bytes, theirs.rx.high_bytes) == (ours.tx.low_bytes, ours.tx.high_bytes)
    assert (theirs.tx.low_bytes, theirs.tx.high_bytes) == (ours.rx.low_bytes, ours.rx.high_bytes)


def test_ranges_of_one_write_land_in_their_order_and_reads_pass_between_operations(pair):
    pair.serve()
    channel = pair.connect(max_ops_in_flight=128)
    first, second = np.full(PAGE_BYTES, 1, np.uint8), np.full(100, 2, np.uint8)
    futures = [channel.write([WHOLE, PageRange(0, 50, 100)], [first, second], deadline_ns())]
    pair.pool.view(1)[:20] = range(20)
    found = np.zeros((20, 1), np.uint8)
    futures += [channel.read([PageRange(1, n, 1)], [found[n]], deadline_ns()) for n in range(20)]
    assert [future.result(WAIT_S) for future in futures[1:]] == [1] * 20
    assert found[:, 0].tolist() == list(range(20))
    assert futures[0].result(WAIT_S) == PAGE_BYTES + 100
    assert np.all(pair.pool.view(0)[50:150] == 2)
    assert channel.ops_in_flight == 0
    with pytest.raises(ValueError, match="must be 1 to 1024"):
        pair.connect(max_ops_in_flight=1025)


def test_a_connection_without_threads_is_refused_alone(pair, monkeypatch):
    server = pair.serve()
    start = threading.Thread.start

    def none_left(thread):
        if thread.name.startswith("channel receiver"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        with pytest.raises(TransferError, match="did not welcome us"):
            pair.connect()
    statistics = server.statistics()
    assert (statistics.connections_open, statistics.connections_refused) == (0, 1)
    works(pair, pair.connect())


def test_connections_beyond_the_bound_are_refused(pair, monkeypatch):
    monkeypatch.setattr("dualpath.transfer.transports.framed.server.MAX_CONNECTIONS", 1)
    server = pair.serve()
    kept = pair.connect()
    with pytest.raises(TransferError, match="did not welcome us") as failure:
        pair.connect()
    assert failure.value.cause is TransferCause.PEER_CLOSED
    assert server.statistics().connections_refused == 1
    works(pair, kept)


def test_tcp_marks_both_ends_with_the_class():
    pair = Pair("tcp")
    try:
        pair.serve()
        for traffic_class in TrafficClass:
            channel = pair.connect(traffic_class)
            works(pair, channel)
            assert channel._stream._socket.getsockopt(socket.IPPROTO_IP, socket.IP_TOS) == CLASSES[traffic_class].tos
            served = list(pair.server._connections.values())[-1]
            assert served._stream._socket.getsockopt(socket.IPPROTO_IP, socket.IP_TOS) == CLASSES[traffic_class].tos
    finally:
        pair.close()
