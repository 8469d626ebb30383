"""Which operations are in flight on a server, by peer, and futures that end when given ones are not any more."""

import threading
from concurrent.futures import Future

from dualpath.transfer.channel import TransferCause, TransferError

Key = tuple[int, int]
"""(connection, operation); operation 0 is the connection itself."""


MAX_PER_PEER = 4_096


class InFlight:
    """Thread-safe. A barrier waits for what is in flight when it is asked for, not for what comes later."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._keys: dict[str, set[Key]] = {}
        self._barriers: list[tuple[set[Key], Future[None]]] = []

    def begin(self, peer_tag: str, key: Key) -> bool:
        """False if `key` is in flight already, or too much of the peer is."""
        with self._lock:
            keys = self._keys.setdefault(peer_tag, set())
            if key in keys or len(keys) >= MAX_PER_PEER:
                return False
            keys.add(key)
            return True

    def end(self, peer_tag: str, *ended: Key) -> None:
        """`ended` are over; those that never began are ignored."""
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
        """Everything of `connection` is over."""
        with self._lock:
            keys = [key for key in self._keys.get(peer_tag, ()) if key[0] == connection]
        self.end(peer_tag, *keys)

    def barrier(self, peer_tag: str, with_connections: bool) -> "Future[None]":
        """Ends when the peer's operations in flight now (and its connections, if so wished) are over."""
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
        """The server is gone and will not see the rest end."""
        with self._lock:
            failed, self._barriers = self._barriers, []
        for _, future in failed:
            text = "the server closed before its peer was proven quiet"
            future.set_exception(TransferError(TransferCause.PEER_CLOSED, text))

    def count(self) -> int:
        """Operations in flight, connections not counted."""
        with self._lock:
            return sum(1 for keys in self._keys.values() for key in keys if key[1])
