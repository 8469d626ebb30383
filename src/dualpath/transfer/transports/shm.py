"""``shm``, between engines of one host: frames over a Unix socket, payload through the mapped pool.

The initiator maps the server's pool and does all copies, chunk by chunk. A chunk of a write passes the initiator's
lane, is copied, and is announced by a DATA frame; then it passes the server's lane. For a read the order is reversed:
the server's lane, DATA, the initiator's lane, the copy. A read ends with the initiator's DONE, because only then does
nobody copy from the server's pages any more.

A server cannot stop the copy of a peer that it disconnects. It stops sending and waits until the peer's end of the
socket closes. The peer closes it when none of its threads copies any more; the kernel closes it when the peer has died.
"""

import os
import socket
import time
from pathlib import Path

import numpy as np

from dualpath.core.vocabulary import TrafficClass
from dualpath.spec.private_files import is_dead_socket, runtime_directory
from dualpath.transfer.pool import BufferPool, Bytes
from dualpath.transfer.traffic import TrafficManager
from dualpath.transfer.transports.framed import FramedTransport
from dualpath.transfer.transports.framed.channel import FramedChannel
from dualpath.transfer.transports.framed.connection import Connection
from dualpath.transfer.transports.framed.frames import Frame, FrameKind, Stream
from dualpath.transfer.transports.framed.handshake import Welcome
from dualpath.transfer.transports.framed.operations import Cursor, Operation, cursor_over

PREFIX = "shm:"
BACKLOG_CONNECTIONS = 1024
MAX_PATH_BYTES = 107
"""Longest path that fits into ``sockaddr_un``."""


class SharedMemoryChannel(FramedChannel):
    """The initiator's side."""

    def __init__(
        self, stream: Stream, welcome: Welcome, traffic: TrafficManager, traffic_class: TrafficClass, max_ops: int
    ) -> None:
        self._pages = BufferPool.attach(welcome.where.decode())
        super().__init__(stream, welcome, traffic, traffic_class, max_ops)

    def _prepare(self, op: Operation) -> None:
        op.remote = cursor_over(self._pages, op.ranges)

    def _put(self, op: Operation, frame: Frame) -> None:
        _copy(op.local.take(frame.n_bytes), op.remote.take(frame.n_bytes))
        self._table.end_touch(op)
        self._stream.send(frame)

    def _get(self, op: Operation, n_bytes: int) -> None:
        if self._table.begin_touch(op):
            try:
                _copy(op.remote.take(n_bytes), op.local.take(n_bytes))
            finally:
                self._table.end_touch(op)

    def _read_over(self, op: Operation) -> None:
        self._stream.send(Frame(FrameKind.DONE, op.number))

    def _release(self) -> None:
        super()._release()
        self._pages.close()


class SharedMemoryConnection(Connection):
    """The server's side: it never touches a payload."""

    def hang_up(self) -> None:
        self._stream.shutdown(socket.SHUT_WR)

    def _pull(self, n_bytes: int, cursor: Cursor | None) -> None:
        pass

    def _push(self, frame: Frame, _slices: list[Bytes]) -> None:
        self._stream.send(frame)

    def _where(self) -> bytes:
        return str(self._server.pool.path).encode()

    def _pushed(self, op: int) -> None:
        """Do nothing: a read ends with the peer's DONE."""


class SharedMemoryTransport(FramedTransport):
    """Its addresses are ``shm:<path of a Unix socket>``."""

    channel = SharedMemoryChannel
    connection = SharedMemoryConnection

    def bind_address(self, host: str, name: str) -> str:  # noqa: ARG002
        """Returns a socket file in this user's directory; `host` is ignored, because all peers are on this host."""
        return f"{PREFIX}{runtime_directory()}/dualpath-{os.getpid()}-{name}.sock"

    def listen(self, address: str) -> tuple[socket.socket, str]:
        """Listen so that only this user can connect. Replaces a dead server's socket file."""
        path = _path(address)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if is_dead_socket(path):
                path.unlink()
            listener.bind(str(path))
            path.chmod(0o600)
            listener.listen(BACKLOG_CONNECTIONS)
        except OSError as error:
            listener.close()
            raise OSError(error.errno, f"cannot listen at {address}: {error.strerror}") from error
        return listener, address

    def unlisten(self, address: str) -> None:
        _path(address).unlink(missing_ok=True)

    def dial(self, address: str, traffic_class: TrafficClass, timeout_s: float) -> socket.socket:  # noqa: ARG002
        path = _path(address)
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connected.settimeout(timeout_s)
            _connect(connected, path, time.monotonic() + timeout_s)
        except OSError:
            connected.close()
            raise
        return connected

    def sweep(self) -> list[str]:
        dead = [path for path in sorted(runtime_directory().glob("dualpath-*.sock")) if is_dead_socket(path)]
        for path in dead:
            path.unlink(missing_ok=True)
        return [str(path) for path in dead]


def _connect(connected: socket.socket, path: Path, deadline_s: float) -> None:
    """Raises OSError. While too many others wait to be accepted, the kernel answers EAGAIN and does not queue us."""
    while True:
        try:
            connected.connect(str(path))
            return
        except BlockingIOError:
            if time.monotonic() >= deadline_s:
                raise TimeoutError("too many others wait to be accepted") from None
            time.sleep(0.002)


def _path(address: str) -> Path:
    path = address.removeprefix(PREFIX)
    if path in ("", address):
        raise ValueError(f"{address!r} is not an address of transport shm; give one like shm:/run/dualpath/pe0.sock")
    if len(path.encode()) > MAX_PATH_BYTES:
        raise ValueError(
            f"{address!r}: a Unix socket's path has at most {MAX_PATH_BYTES} bytes; use a shorter XDG_RUNTIME_DIR"
        )
    return Path(path)


def _copy(sources: list[Bytes], destinations: list[Bytes]) -> None:
    for source, destination in zip(sources, destinations, strict=True):
        np.copyto(destination, source)  # lets other threads run, unlike a memoryview's assignment
