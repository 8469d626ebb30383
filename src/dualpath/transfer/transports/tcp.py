"""``tcp``, between hosts: the payload follows its DATA frame, `sendmsg` and `recvmsg_into` straight from and to pages.

Both ends mark the connection's class in the IP header (`core.traffic_classes`). So a kernel or a switch can separate
the two; where none does, `TrafficManager` separates them.
"""

import contextlib
import socket
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from dualpath.core.traffic_classes import CLASSES
from dualpath.core.vocabulary import TrafficClass
from dualpath.transfer.pool import Bytes
from dualpath.transfer.transports.framed import FramedTransport, MakeChannel
from dualpath.transfer.transports.framed.channel import FramedChannel
from dualpath.transfer.transports.framed.connection import Connection
from dualpath.transfer.transports.framed.frames import Frame
from dualpath.transfer.transports.framed.handshake import Session
from dualpath.transfer.transports.framed.operations import Cursor, Operation, late_error

if TYPE_CHECKING:
    from dualpath.transfer.transports.framed.server import FramedServer

_PEER_DEAD_AFTER_MS = 10_000
"""A host that acknowledges nothing for this long counts as dead."""


class TcpChannel(FramedChannel):
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


class TcpConnection(Connection):
    """The server's side."""

    def __init__(self, number: int, connected: socket.socket, server: "FramedServer", session: Session) -> None:
        super().__init__(number, connected, server, session)
        self._connected = connected
        _configure(connected)

    def hang_up(self) -> None:
        # Once our own receiver has stopped, no byte of the peer reaches the pool any more.
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


class TcpTransport(FramedTransport):
    """Its addresses are ``tcp://host:port``; port 0 takes a free one."""

    scheme = "tcp"
    channel: MakeChannel = TcpChannel
    connection = TcpConnection

    def bind_address(self, host: str, name: str) -> str:  # noqa: ARG002
        return self._address(host, 0)

    def listen(self, address: str) -> tuple[socket.socket, str]:
        host, port = self._host_and_port(address)
        if host in {"0.0.0.0", "::"}:
            raise ValueError(f"{address} would be given to peers; give the address at which they reach this host")
        try:
            family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            listener = socket.create_server((str(where[0]), port), family=family, backlog=1024)
        except OSError as error:
            raise OSError(error.errno, f"cannot listen at {address}: {error.strerror}") from error
        return listener, self._address(host, listener.getsockname()[1])

    def dial(self, address: str, traffic_class: TrafficClass, timeout_s: float) -> socket.socket:
        connected = socket.create_connection(self._host_and_port(address), timeout_s)
        _configure(connected)
        _mark(connected, traffic_class)
        return connected

    def _host_and_port(self, address: str) -> tuple[str, int]:
        with contextlib.suppress(ValueError):  # a port that is not a number
            parts = urlsplit(address)
            if parts.scheme == self.scheme and parts.hostname and parts.port is not None and not parts.path:
                return parts.hostname, parts.port
        example = f"{self.scheme}://10.0.0.1:7000"
        raise ValueError(f"{address!r} is not an address of transport {self.scheme}; give one like {example}")

    def _address(self, host: str, port: int) -> str:
        return f"{self.scheme}://{f'[{host}]' if ':' in host else host}:{port}"


class AuthenticatedTcpTransport(TcpTransport):
    """``tcp`` whose frames carry MACs. Its addresses are ``tcp-authenticated://host:port``."""

    scheme = "tcp-authenticated"
    authenticated = True


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
            connected.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, CLASSES[traffic_class].tos)
        else:
            connected.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, CLASSES[traffic_class].tos)
