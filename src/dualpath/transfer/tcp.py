"""Channels between hosts: the payload follows its DATA frame, `sendmsg` and `recvmsg_into` straight from and to pages.

The connection carries its class in the IP header, on both ends: DSCP EF for the high class, so that a kernel or a
switch can keep the two apart (`TrafficManager` does it where none does).
"""

import contextlib
import socket

from dualpath.core.vocabulary import TrafficClass
from dualpath.transfer.channel import Address
from dualpath.transfer.cursor import Cursor
from dualpath.transfer.initiator import SocketChannel
from dualpath.transfer.operation import Operation, late_error
from dualpath.transfer.pool import Bytes
from dualpath.transfer.served import Host, ServedConnection
from dualpath.transfer.stream import Stream
from dualpath.transfer.wire import Frame

TOS = {TrafficClass.HIGH: 0xB8, TrafficClass.LOW: 0x00}
_PEER_DEAD_AFTER_MS = 30_000
"""A host that acknowledges nothing for so long is gone."""


class TcpChannel(SocketChannel):
    """The initiator's side."""

    def _put(self, op: Operation, frame: Frame) -> None:
        def let_go() -> None:
            self._table.end(op, late_error(op))
            self._table.end_touch(op)

        self._stream.send(frame, [part.data for part in op.local.take(frame.n_bytes)], op.deadline_ns, let_go)

    def _get(self, op: Operation, n_bytes: int) -> None:
        if not self._table.begin_touch(op):
            self._discard(n_bytes)
            return
        try:
            rest = self._receive([part.data for part in op.local.take(n_bytes)], lambda: not op.decided)
        finally:
            self._table.end_touch(op)
        self._discard(sum(map(len, rest)))

    def _discard(self, n_bytes: int) -> None:
        scratch = memoryview(bytearray(min(n_bytes, 65_536)))
        while n_bytes:
            piece = scratch[:n_bytes]
            self._receive([piece])
            n_bytes -= len(piece)

    def _interrupt(self) -> None:
        self._stream.shutdown()


class Served(ServedConnection):
    """The server's side."""

    def __init__(self, number: int, stream: Stream, host: Host, connected: socket.socket) -> None:
        super().__init__(number, stream, host)
        self._connected = connected
        _configure(connected)

    def hang_up(self) -> None:
        # Nothing of the peer's can come through any more once our own receiver has stopped.
        self._stream.shutdown()

    def _pull(self, n_bytes: int, cursor: Cursor | None) -> None:
        if cursor is None:
            self._stream.discard(n_bytes)
        else:
            self._stream.receive_all([part.data for part in cursor.take(n_bytes)])

    def _push(self, frame: Frame, slices: list[Bytes]) -> None:
        self._stream.send(frame, [part.data for part in slices])

    def _mark_class(self, traffic_class: TrafficClass) -> None:
        _mark(self._connected, traffic_class)


def listen(address: Address) -> tuple[socket.socket, Address]:
    """A listening socket, and the address with the port it got."""
    if address.host in {"0.0.0.0", "::"}:
        raise ValueError(f"{address}: peers are given this address; write the one they reach this host by")
    try:
        family, _, _, _, where = _resolve(address)
        listener = socket.create_server(where[:2], family=family, backlog=128)
    except OSError as error:
        raise OSError(error.errno, f"cannot listen at {address}: {error.strerror}") from error
    return listener, Address(host=address.host, port=listener.getsockname()[1])


def unlisten(address: Address) -> None:
    """Nothing is left of a TCP address."""


def dial(address: Address, traffic_class: TrafficClass, timeout_s: float) -> socket.socket:
    """A connected socket. Raises OSError."""
    connected = socket.create_connection((address.host, address.port), timeout_s)
    _configure(connected)
    _mark(connected, traffic_class)
    return connected


def _resolve(address: Address) -> tuple[int, int, int, str, tuple[str, int]]:
    return socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]  # type: ignore[return-value]


def _configure(connected: socket.socket) -> None:
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _PEER_DEAD_AFTER_MS)


def _mark(connected: socket.socket, traffic_class: TrafficClass) -> None:
    with contextlib.suppress(OSError):  # a container may forbid it; the traffic manager does not depend on it
        if connected.family == socket.AF_INET6:
            connected.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, TOS[traffic_class])
        else:
            connected.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, TOS[traffic_class])
