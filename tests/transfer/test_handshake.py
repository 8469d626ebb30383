"""The data port: who knows the cluster's key is let in, nobody else learns or changes a byte, however many come."""

import contextlib
import os
import shutil
import socket
import stat
import tempfile
import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from channel_pair import KEY, PAGE_BYTES, WAIT_S, WHOLE, Pair, deadline_ns, random_bytes, until

from dualpath.core.vocabulary import TrafficClass
from dualpath.transfer.transport import PageRange, TransferCause, TransferError
from dualpath.transfer.transports.framed import door
from dualpath.transfer.transports.framed.frames import Frame, FrameKind, ProtocolError, Stream, pack_ranges
from dualpath.transfer.transports.framed.handshake import (
    VERSION,
    Challenge,
    Hello,
    Session,
    Welcome,
    challenge,
    check_hello,
    packed,
    shake_hands,
)

TRANSPORT_NAMES = ("shm", "tcp", "tcp-authenticated", "nixl")
LOW = TrafficClass.LOW
OTHER_KEY = bytes(32)


@pytest.fixture
def knocked(pair):
    """Connections to the pair's server that have said nothing yet."""
    made: list[socket.socket] = []

    def knock() -> socket.socket:
        made.append(pair.transport.dial(pair.server.address, LOW, WAIT_S))
        made[-1].settimeout(WAIT_S)
        return made[-1]

    yield knock
    for one in made:
        one.close()


def heard(connected: socket.socket) -> Challenge:
    size = msgspec.msgpack.encode(challenge(False))
    return msgspec.msgpack.decode(connected.recv(32 + len(size), socket.MSG_WAITALL)[32:], type=Challenge)


def hello(key: bytes, given: Challenge, tag: str = "pe0") -> Hello:
    said = Hello(VERSION, tag, LOW, bytes(32))
    return msgspec.structs.replace(said, proof=Session(key, given, said).initiator_proof())


def is_turned_away(connected: socket.socket) -> bool:
    with contextlib.suppress(ConnectionResetError):
        return connected.recv(65_536) == b""
    return True


def serves(pair: Pair) -> bool:
    return pair.connect().read([PageRange(0, 0, 1)], [np.zeros(1, np.uint8)], deadline_ns()).result(WAIT_S) == 1


def test_without_the_key_nobody_reads_or_writes_a_byte(pair):
    server = pair.serve()
    pair.pool.view(0)[:] = random_bytes(PAGE_BYTES)
    before = pair.pool.view(0).copy()
    with pytest.raises(TransferError) as failure:
        pair.connect(key=OTHER_KEY)
    assert failure.value.cause in (TransferCause.PROTOCOL, TransferCause.PEER_CLOSED)
    assert "has it the same cluster secret?" in str(failure.value)
    assert server.refused_connections == 1
    assert np.array_equal(pair.pool.view(0), before)
    local = np.zeros(PAGE_BYTES, np.uint8)
    assert pair.connect().read([WHOLE], [local], deadline_ns()).result(WAIT_S) == PAGE_BYTES
    assert np.array_equal(local, before)


def test_a_server_that_does_not_know_the_key_is_not_believed(pair):
    """It gets no frame, and over shared memory nothing that it names is mapped."""
    pair.serve()
    listener, address = pair.transport.listen(pair.transport.bind_address("127.0.0.1", "forged"))
    asked: list[bytes] = []

    def forge() -> None:
        connected, _ = listener.accept()
        with connected:
            connected.sendall(packed(FrameKind.CHALLENGE, challenge(pair.transport.authenticated)))
            said = Stream(connected, time.monotonic_ns)
            said.receive_bytes(said.receive_frame(deadline_ns()).n_bytes, deadline_ns())
            welcome = Welcome(VERSION, PAGE_BYTES, 12, str(pair.pool.path))
            connected.sendall(packed(FrameKind.WELCOME, welcome))
            connected.settimeout(WAIT_S)
            with contextlib.suppress(OSError):
                asked.append(connected.recv(1))
            said.close()

    forger = threading.Thread(target=forge)
    forger.start()
    options = {"traffic_class": LOW, "peer_tag": "pe0", "key": KEY}
    with pytest.raises(TransferError, match=r"protocol: .* is not our channel server"):
        pair.transport.connect(address, pair.traffic, **options)
    forger.join()
    listener.close()
    pair.transport.unlisten(address)
    assert asked in ([], [b""])


def test_a_proof_is_of_one_connection_and_one_role(pair, knocked):
    """What somebody has recorded, or is told by the server, lets nobody in elsewhere."""
    server = pair.serve()
    first, second = knocked(), knocked()
    old, new = heard(first), heard(second)
    assert old.nonce != new.nonce
    recorded = packed(FrameKind.HELLO, hello(KEY, old))
    second.sendall(recorded)
    assert is_turned_away(second)
    session = Session(KEY, old, hello(KEY, old))
    assert session.initiator_proof() != session.server_proof(Welcome(VERSION, 1, 1))
    first.sendall(recorded)
    until(lambda: server.statistics().connections_open == 1, "the one whose proof it is came in")
    assert server.refused_connections == 1


@pytest.mark.parametrize("change", [{"tag": "pe1"}, {"traffic_class": TrafficClass.HIGH}, {"nonce": b"x" * 32}])
def test_a_proof_is_of_all_that_is_said(change):
    given = challenge(False)
    said = hello(KEY, given)
    check_hello(KEY, given, msgspec.msgpack.encode(said))
    with pytest.raises(ProtocolError, match="does not know the cluster's secret"):
        check_hello(KEY, given, msgspec.msgpack.encode(msgspec.structs.replace(said, **change)))


def test_another_version_is_told(pair, knocked):
    pair.serve()
    given = challenge(False)
    body = msgspec.msgpack.encode(msgspec.structs.replace(hello(KEY, given), version=1))
    with pytest.raises(ProtocolError, match=f"expected version {VERSION} of the handshake, not 1"):
        check_hello(KEY, given, body)


def test_frames_before_the_hello_are_not_obeyed(pair, knocked):
    server = pair.serve()
    stranger = knocked()
    heard(stranger)
    stranger.sendall(Frame(FrameKind.READ, 1, 10, 1).pack() + pack_ranges([PageRange(0, 0, 10)]))
    assert is_turned_away(stranger)
    assert server.refused_connections == 1


# ── However many ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_thousand_idle_connections_cost_no_thread_and_shut_nobody_out(pair, knocked):
    server = pair.serve()
    assert serves(pair)
    threads = threading.active_count()
    for _ in range(1_000):
        knocked()
    until(lambda: server.refused_connections >= 1_000 - door.MAX_AT_THE_DOOR, "the oldest have gone")
    assert threading.active_count() == threads
    assert serves(pair)
    assert len(server._door._knocking) <= door.MAX_AT_THE_DOOR


def test_who_says_nothing_has_to_go(pair, knocked, monkeypatch):
    monkeypatch.setattr(door, "HELLO_TIMEOUT_S", 0.05)
    server = pair.serve()
    silent, slow = knocked(), knocked()
    heard(silent)
    slow.sendall(packed(FrameKind.HELLO, hello(KEY, heard(slow)))[:40])
    assert is_turned_away(silent) and is_turned_away(slow)
    assert server.refused_connections == 2


def test_a_hello_in_pieces_is_heard(pair, knocked):
    server = pair.serve()
    slow = knocked()
    for byte in packed(FrameKind.HELLO, hello(KEY, heard(slow))):
        slow.sendall(bytes([byte]))
    until(lambda: server.statistics().connections_open == 1, "it came in")


def test_no_descriptor_left_is_survived(pair, knocked):
    """Those at the door make room; a peer comes in when there is some."""
    import resource

    server = pair.serve()
    heard(knocked())
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 1, limit[1]))
    try:
        second = knocked()  # takes the last one; the server has none for its end
        heard(second)
        until(lambda: server.refused_connections == 1, "the first had to go")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert serves(pair)


def test_strangers_fill_no_log(pair, knocked, caplog):
    server = pair.serve()
    for _ in range(50):
        knocked().sendall(b"GET / HTTP/1.1\r\n\r\n" * 4)
    until(lambda: server.refused_connections == 50, "all are refused")
    assert len([line for line in caplog.messages if "refused" in line]) == 1


# ── Whose ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_sockets_and_pools_are_this_users_alone():
    pair = Pair("shm")
    try:
        socket_file = Path(pair.serve().address.removeprefix("shm:"))
        assert stat.S_IMODE(socket_file.stat().st_mode) == stat.S_IMODE(pair.pool.path.stat().st_mode) == 0o600
        assert stat.S_IMODE(socket_file.parent.stat().st_mode) == 0o700
    finally:
        pair.close()


@pytest.mark.privileged
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_turned_away_even_with_the_key(monkeypatch: pytest.MonkeyPatch):
    """The socket's mode and its directory's are given up here, so that only the kernel's word remains.

    The directory is this test's own, since whoever else uses it gives it its mode back.
    """
    own = tempfile.mkdtemp()
    Path(own).chmod(0o755)
    monkeypatch.setenv("XDG_RUNTIME_DIR", own)
    pair = Pair("shm")
    try:
        server = pair.serve()
        path = server.address.removeprefix("shm:")
        Path(path).chmod(0o666)
        Path(path).parent.chmod(0o755)
        stranger, heard_by_it = os.pipe()
        if os.fork() == 0:
            os.setuid(65534)
            with contextlib.suppress(BaseException):
                connected = pair.transport.dial(server.address, LOW, WAIT_S)
                try:
                    shake_hands(Stream(connected, time.monotonic_ns), KEY, "pe0", LOW, False, deadline_ns())
                    os.write(heard_by_it, b"welcome")
                except Exception as error:
                    os.write(heard_by_it, type(error).__name__.encode())
            os._exit(0)
        os.close(heard_by_it)
        with os.fdopen(stranger, "rb") as told:
            assert told.read() == b"StreamClosed"
        os.wait()
        until(lambda: server.refused_connections == 1, "it was refused")
    finally:
        pair.close()
        shutil.rmtree(own)


# ── On the way ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Meddler:
    """Stands between a channel and its server, and changes one byte that passes to the server."""

    def __init__(self, address: str, at_byte: int) -> None:
        scheme, _, where = address.rpartition("//")
        host, _, port = where.rpartition(":")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"{scheme}//127.0.0.1:{self._listener.getsockname()[1]}"
        self._server = socket.create_connection((host, int(port)))
        self._at_byte = at_byte
        self._threads = [threading.Thread(target=self._pass, args=(way,), daemon=True) for way in ("in", "out")]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        self._client, _ = self._listener.accept()
        for thread in self._threads:
            thread.start()

    def _pass(self, way: str) -> None:
        source, sink = (self._client, self._server) if way == "in" else (self._server, self._client)
        passed = 0
        with contextlib.suppress(OSError):
            while data := bytearray(source.recv(65_536)):
                if way == "in" and passed <= self._at_byte < passed + len(data):
                    data[self._at_byte - passed] ^= 1
                passed += len(data)
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for one in (self._listener, self._server, self._client):
            one.close()


@pytest.mark.parametrize("after_hello", [0, 10, 40, 60, 110, 250, 5_000])
def test_a_byte_that_is_changed_on_the_way_fails_the_operation(after_hello):
    """In a length, a header, its tag, a range, the payload: no write succeeds with bytes that are not the peer's."""
    pair = Pair("tcp-authenticated")
    hello_bytes = len(packed(FrameKind.HELLO, hello(KEY, challenge(True))))
    try:
        server = pair.serve()
        meddler = Meddler(server.address, hello_bytes + after_hello)
        options = {"traffic_class": LOW, "peer_tag": "pe0", "key": KEY}
        channel = pair.transport.connect(meddler.address, pair.traffic, **options)
        future = channel.write([PageRange(3, 0, 9_000)], [np.full(9_000, 7, np.uint8)], deadline_ns(10))
        with pytest.raises(TransferError):
            future.result(WAIT_S)
        server.quiesce("pe0").result(WAIT_S)
        assert not pair.pool.view(4).any()
        assert (server.statistics().ops_in_flight, server.statistics().connections_open) == (0, 0)
        channel.close()
        meddler.close()
    finally:
        pair.close()


def test_one_side_alone_can_not_authenticate_frames():
    pair = Pair("tcp-authenticated")
    try:
        address = pair.serve().address.replace("tcp-authenticated", "tcp")
        plain = Pair("tcp")
        with pytest.raises(TransferError, match="give both the same --transport"):
            plain.transport.connect(address, pair.traffic, traffic_class=LOW, peer_tag="pe0", key=KEY)
        plain.close()
    finally:
        pair.close()
