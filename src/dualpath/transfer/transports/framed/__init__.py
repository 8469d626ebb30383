"""The code that transports over a connected socket share: connecting, and the two sides of a connection.

Read `frames.py` (the messages), then `channel.py` (the initiator) and `connection.py` (the server). `operations.py` has
the rule that keeps the initiator's memory safe, `server.py` the proof that a peer is quiet.
"""

import socket
from abc import ABC, abstractmethod
from collections.abc import Callable

import msgspec

from dualpath.core.vocabulary import TrafficClass
from dualpath.transfer.pool import BufferPool
from dualpath.transfer.traffic import TrafficManager
from dualpath.transfer.transport import TransferCause, TransferError
from dualpath.transfer.transports.framed.channel import FramedChannel
from dualpath.transfer.transports.framed.connection import Connection
from dualpath.transfer.transports.framed.frames import ProtocolError, Stream, StreamClosed
from dualpath.transfer.transports.framed.handshake import Welcome, check_user, shake_hands
from dualpath.transfer.transports.framed.server import FramedServer

MAX_OPS_IN_FLIGHT = 1_024
"""Largest bound a channel may choose: a server keeps a record of each operation."""

MakeChannel = Callable[[Stream, Welcome, TrafficManager, TrafficClass, int], FramedChannel]


class FramedTransport(ABC):
    """A `Transport` over a socket. A subclass says where to listen, how to dial, and how payload travels."""

    channel: MakeChannel
    connection: type[Connection]
    authenticated = False
    """Whether every frame carries a MAC, for networks on which somebody could change bytes on their way."""

    @abstractmethod
    def bind_address(self, host: str, name: str) -> str:
        """Returns the address at which to listen by default."""

    @abstractmethod
    def listen(self, address: str) -> tuple[socket.socket, str]:
        """Returns a listening socket and its real address. Raises ValueError, OSError."""

    def unlisten(self, address: str) -> None:  # noqa: B027
        """Remove what remains of an address after its socket is closed."""

    @abstractmethod
    def dial(self, address: str, traffic_class: TrafficClass, timeout_s: float) -> socket.socket:
        """Returns a connected socket. Raises ValueError, OSError."""

    def sweep(self) -> list[str]:
        return []

    def serve(self, pool: BufferPool, traffic: TrafficManager, *, host: str, name: str, key: bytes) -> FramedServer:
        return FramedServer(self, pool, traffic, self.bind_address(host, name), key)

    def connect(
        self,
        address: str,
        traffic: TrafficManager,
        *,
        traffic_class: TrafficClass,
        peer_tag: str,
        key: bytes,
        max_ops_in_flight: int = 64,
        timeout_s: float = 5.0,
    ) -> FramedChannel:
        if not 1 <= max_ops_in_flight <= MAX_OPS_IN_FLIGHT:
            raise ValueError(f"max_ops_in_flight is {max_ops_in_flight}; it must be 1 to {MAX_OPS_IN_FLIGHT}")
        deadline_ns = traffic.clock() + round(timeout_s * 1e9)
        try:
            connected = self.dial(address, traffic_class, timeout_s)
            stream = Stream(connected, traffic.clock)
        except OSError as error:
            raise TransferError(TransferCause.PEER_CLOSED, f"cannot connect to {address}: {error}") from error
        try:
            check_user(connected)
            welcome = shake_hands(stream, key, peer_tag, traffic_class, self.authenticated, deadline_ns)
            return self.channel(stream, welcome, traffic, traffic_class, max_ops_in_flight)
        except StreamClosed as error:
            stream.close()
            raise TransferError(TransferCause.PEER_CLOSED, f"{address} did not welcome us: {error}") from error
        except (ProtocolError, msgspec.DecodeError, OSError, ValueError) as error:
            stream.close()
            raise TransferError(TransferCause.PROTOCOL, f"{address} is not our channel server: {error}") from error
