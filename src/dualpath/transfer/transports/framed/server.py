"""`FramedServer`: lets peers read and write an engine's pool, and proves when a peer no longer does."""

import logging
import socket
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING

import msgspec

from dualpath.transfer.pool import MappedPages
from dualpath.transfer.traffic import TrafficManager
from dualpath.transfer.transport import TransferCause, TransferError
from dualpath.transfer.transports.framed.connection import Connection
from dualpath.transfer.transports.framed.door import Door
from dualpath.transfer.transports.framed.frames import ProtocolError
from dualpath.transfer.transports.framed.handshake import Session

if TYPE_CHECKING:
    from dualpath.transfer.transports.framed import FramedTransport

_log = logging.getLogger(__name__)

Key = tuple[int, int]
"""(connection, operation); operation 0 is the connection itself."""
MAX_PER_PEER = 4_096
MAX_CONNECTIONS = 256
"""Each is a peer's that has proved itself, and has two threads."""


class InFlight:
    """The operations in flight, by peer. Thread-safe.

    A barrier waits for what is in flight when it is made, not for later operations.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._keys: dict[str, set[Key]] = {}
        self._barriers: list[tuple[set[Key], Future[None]]] = []

    def begin(self, peer_tag: str, key: Key) -> bool:
        """Add `key`. Returns False if it is in flight already, or the peer has too many in flight."""
        with self._lock:
            keys = self._keys.setdefault(peer_tag, set())
            if key in keys or len(keys) >= MAX_PER_PEER:
                return False
            keys.add(key)
            return True

    def end(self, peer_tag: str, *ended: Key) -> None:
        """Remove `ended`; those that never began are ignored."""
        with self._lock:
            keys = self._keys.get(peer_tag, set())
            keys.difference_update(ended)
            if not keys:
                self._keys.pop(peer_tag, None)
            for pending, _ in self._barriers:
                pending.difference_update(ended)
            reached = [future for pending, future in self._barriers if not pending]
            self._barriers = [barrier for barrier in self._barriers if barrier[0]]
        for future in reached:
            future.set_result(None)

    def end_connection(self, peer_tag: str, connection: int) -> None:
        """Remove everything of `connection`."""
        with self._lock:
            keys = [key for key in self._keys.get(peer_tag, ()) if key[0] == connection]
        self.end(peer_tag, *keys)

    def barrier(self, peer_tag: str, with_connections: bool) -> "Future[None]":
        """Returns a future for the end of the peer's operations now in flight, and of its connections if wanted."""
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            pending = {key for key in self._keys.get(peer_tag, ()) if with_connections or key[1]}
            if pending:
                self._barriers.append((pending, future))
        if not pending:
            future.set_result(None)
        return future

    def fail_barriers(self) -> None:
        """Fail all barriers: the server is closed and will not see the rest end."""
        with self._lock:
            failed, self._barriers = self._barriers, []
        for _, future in failed:
            text = "the server closed before its peer was proven quiet"
            future.set_exception(TransferError(TransferCause.PEER_CLOSED, text))

    def count(self) -> int:
        """Operations in flight, without connections."""
        with self._lock:
            return sum(1 for keys in self._keys.values() for key in keys if key[1])


class ServerStatistics(msgspec.Struct, frozen=True, gc=False):
    """Counts since the server started, and two gauges."""

    connections_open: int
    connections_accepted: int
    connections_refused: int
    protocol_errors: int
    ops_in_flight: int
    ops_rejected: int


class FramedServer:
    """Listens at an address of `transport`, for one pool.

    Whoever knows `key` can read and write the pool, and nobody else. Raises ValueError when the address is invalid and
    OSError when it can't listen there.
    """

    def __init__(
        self, transport: "FramedTransport", pool: MappedPages, traffic: TrafficManager, address: str, key: bytes
    ) -> None:
        self.pool = pool
        self.traffic = traffic
        self.in_flight = InFlight()
        self._transport = transport
        self._listener, self.address = transport.listen(address)
        self._lock = threading.Lock()
        self._connections: dict[int, Connection] = {}
        self._accepted = self._refused = self._protocol_errors = self._rejected = 0
        self._closing = False
        self.authenticated = transport.authenticated
        self._door = Door(self._listener, self.address, key, self.authenticated, self._admit)

    def quiesce(self, peer_tag: str, *, disconnect: bool = True) -> "Future[None]":
        """As `Server.quiesce`; a peer over shared memory must cooperate in its disconnection, or die.

        With `disconnect` False the future ends when every operation that the peer has in flight here *now* is over; it
        does not wait for operations that begin later or are on their way.
        """
        future = self.in_flight.barrier(peer_tag, with_connections=disconnect)
        if disconnect:
            with self._lock:
                of_peer = [one for one in self._connections.values() if one.peer_tag == peer_tag]
            for connection in of_peer:
                connection.hang_up()
        return future

    @property
    def refused_connections(self) -> int:
        return self.statistics().connections_refused

    def statistics(self) -> ServerStatistics:
        with self._lock:
            return ServerStatistics(
                connections_open=len(self._connections),
                connections_accepted=self._accepted,
                connections_refused=self._refused + self._door.refused_connections,
                protocol_errors=self._protocol_errors,
                ops_in_flight=self.in_flight.count(),
                ops_rejected=self._rejected,
            )

    def close(self, grace_s: float = 2.0) -> None:
        """Disconnect every peer, wait up to `grace_s` in all until they are quiet, and release the address."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            connections = list(self._connections.values())
        self._door.close()
        self._listener.close()
        self._transport.unlisten(self.address)
        for connection in connections:
            connection.hang_up()
        deadline_s = time.monotonic() + grace_s
        for connection in connections:
            connection.join(max(deadline_s - time.monotonic(), 0))
            connection.force()
            connection.join(1.0)
        self.in_flight.fail_barriers()

    def _admit(self, connected: socket.socket, session: Session) -> None:
        with self._lock:
            if self._closing or len(self._connections) >= MAX_CONNECTIONS:
                self._refused += 1
                connected.close()
                return
            self._accepted += 1
            connection = self._transport.connection(self._accepted, connected, self, session)
            self._connections[self._accepted] = connection
        try:
            connection.start()
        except RuntimeError as error:  # no thread can be started now
            _log.warning("%s: refusing %r: %s", self.address, connection.peer_tag, error)
            with self._lock:
                self._refused += 1
                del self._connections[connection.number]

    # ── Called by connections ────────────────────────────────────────────────────────────────────────────────────────

    def rejected(self) -> None:
        with self._lock:
            self._rejected += 1

    def violated(self, connection: Connection, error: Exception) -> None:
        with self._lock:
            self._protocol_errors += 1
        expected = isinstance(error, (ProtocolError, msgspec.MsgspecError, ValueError))
        peer = connection.peer_tag
        _log.warning("%s: hanging up on %r: %s", self.address, peer, error, exc_info=None if expected else error)

    def gone(self, connection: Connection) -> None:
        with self._lock:
            self._connections.pop(connection.number, None)
