"""`ChannelServer`: lets peers read and write an engine's buffer pool, and knows when one of them no longer does."""

import contextlib
import logging
import socket
import threading
import time
from concurrent.futures import Future

import msgspec

from dualpath.transfer import local, tcp
from dualpath.transfer.channel import Address
from dualpath.transfer.pool import MappedPages
from dualpath.transfer.quiet import InFlight
from dualpath.transfer.served import ServedConnection
from dualpath.transfer.stream import Stream
from dualpath.transfer.traffic import TrafficManager
from dualpath.transfer.wire import ProtocolError

_log = logging.getLogger(__name__)


class ServerStatistics(msgspec.Struct, frozen=True, gc=False):
    """Counts since the server began, and two gauges."""

    connections_open: int
    connections_accepted: int
    connections_refused: int
    protocol_errors: int
    ops_in_flight: int
    ops_rejected: int


class ChannelServer:
    """Listens at `address` (``shm:<path>``, or ``tcp://host:port`` with port 0 for any), for one pool.

    Whoever can connect can read and write the pool: the socket's directory, or the network, must be trusted. Raises
    ValueError for an address that is none and OSError for one that cannot be listened at.
    """

    def __init__(self, pool: MappedPages, traffic: TrafficManager, address: str, *, max_connections: int = 256) -> None:
        self.pool = pool
        self.traffic = traffic
        self.in_flight = InFlight()
        parsed = Address.parse(address)
        self._kind = local if parsed.path else tcp
        self._listener, self._address = self._kind.listen(parsed)
        self._max_connections = max_connections
        self._lock = threading.Lock()
        self._connections: dict[int, ServedConnection] = {}
        self._accepted = self._refused = self._protocol_errors = self._rejected = 0
        self._closing = False
        self._acceptor = threading.Thread(target=self._accept_all, name="channel acceptor", daemon=True)
        self._acceptor.start()

    @property
    def address(self) -> str:
        """What peers give to `connect`."""
        return str(self._address)

    def quiesce(self, peer_tag: str, *, disconnect: bool = False) -> "Future[None]":
        """A future that ends when every operation `peer_tag` has in flight on this server *now* is over.

        What the peer begins later, or has on its way to us, is not waited for. For a peer that is lost, `disconnect`
        ends its connections as well, and then the future proves that nothing the peer ever posted can touch the pool.
        A live peer must cooperate in that over shared memory, so the caller bounds its wait. Raises, in the future,
        TransferError when the server closes first.
        """
        future = self.in_flight.barrier(peer_tag, with_connections=disconnect)
        if disconnect:
            with self._lock:
                of_peer = [one for one in self._connections.values() if one.peer_tag == peer_tag]
            for connection in of_peer:
                connection.hang_up()
        return future

    def statistics(self) -> ServerStatistics:
        with self._lock:
            return ServerStatistics(
                connections_open=len(self._connections),
                connections_accepted=self._accepted,
                connections_refused=self._refused,
                protocol_errors=self._protocol_errors,
                ops_in_flight=self.in_flight.count(),
                ops_rejected=self._rejected,
            )

    def close(self, grace_s: float = 2.0) -> None:
        """Disconnect every peer, giving them `grace_s` in all to become quiet, and release the address."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            connections = list(self._connections.values())
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._listener.close()
        self._kind.unlisten(self._address)
        for connection in connections:
            connection.hang_up()
        deadline_s = time.monotonic() + grace_s
        for connection in connections:
            connection.join(max(deadline_s - time.monotonic(), 0))
            connection.force()
            connection.join(1.0)
        self.in_flight.fail_barriers()

    def _accept_all(self) -> None:
        while True:
            try:
                connected, _ = self._listener.accept()
            except OSError as error:
                if self._closing:
                    return
                _log.warning("%s: accept failed, trying again: %s", self._address, error)
                time.sleep(0.05)
                continue
            self._admit(connected)

    def _admit(self, connected: socket.socket) -> None:
        with self._lock:
            if self._closing or len(self._connections) >= self._max_connections:
                self._refused += 1
                connected.close()
                return
            self._accepted += 1
            connection = self._kind.Served(self._accepted, Stream(connected, self.traffic.clock), self, connected)
            self._connections[self._accepted] = connection
        connection.start()

    # ── Called by connections ────────────────────────────────────────────────────────────────────────────────────────

    def rejected(self) -> None:
        with self._lock:
            self._rejected += 1

    def violated(self, connection: ServedConnection, error: Exception) -> None:
        with self._lock:
            self._protocol_errors += 1
        expected = isinstance(error, (ProtocolError, msgspec.MsgspecError, ValueError))
        peer = connection.peer_tag or "a stranger"
        _log.warning("%s: hanging up on %s: %s", self._address, peer, error, exc_info=None if expected else error)

    def gone(self, connection: ServedConnection) -> None:
        with self._lock:
            self._connections.pop(connection.number, None)
