"""Channels between engines of one host: frames over a Unix socket, payload through the mapped pool.

The initiator maps the server's pool and copies itself, chunk by chunk. A chunk of a write passes the initiator's lane,
is copied, and its DATA frame then tells the server, whose lane it passes as well. For a read it is the other way round:
the server's lane, DATA, the initiator's lane, the copy. A read ends with the initiator's DONE, because only then are
the server's pages no longer being copied from.

A server cannot stop the copy of a peer that it disconnects. It stops talking and waits for the peer's end of the socket
to close, which the peer does when none of its threads copies any more, and the kernel when the peer has died.
"""

import contextlib
import socket
from pathlib import Path

import numpy as np

from dualpath.core.vocabulary import TrafficClass
from dualpath.transfer.channel import Address
from dualpath.transfer.cursor import Cursor
from dualpath.transfer.initiator import SocketChannel
from dualpath.transfer.operation import Operation
from dualpath.transfer.pool import BufferPool, Bytes
from dualpath.transfer.served import Host, ServedConnection
from dualpath.transfer.stream import Stream
from dualpath.transfer.traffic import TrafficManager
from dualpath.transfer.wire import Frame, FrameKind, Welcome


class SharedMemoryChannel(SocketChannel):
    """The initiator's side."""

    def __init__(
        self, stream: Stream, welcome: Welcome, traffic: TrafficManager, traffic_class: TrafficClass, max_ops: int
    ) -> None:
        self._pages = BufferPool.attach(welcome.pool_path)
        super().__init__(stream, welcome, traffic, traffic_class, max_ops)

    def _prepare(self, op: Operation) -> None:
        pages = self._pages
        op.remote = Cursor([pages.view(span.page)[span.offset : span.offset + span.n_bytes] for span in op.spans])

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


class Served(ServedConnection):
    """The server's side: it never touches a payload."""

    def __init__(self, number: int, stream: Stream, host: Host, _connected: socket.socket) -> None:
        super().__init__(number, stream, host)

    def hang_up(self) -> None:
        self._stream.shutdown(socket.SHUT_WR)

    def _pull(self, n_bytes: int, cursor: Cursor | None) -> None:
        pass

    def _push(self, frame: Frame, _slices: list[Bytes]) -> None:
        self._stream.send(frame)

    def _pool_path(self) -> str:
        return str(self._host.pool.path)

    def _pushed(self, op: int) -> None:
        """The peer has the last word on a read: DONE."""


def listen(address: Address) -> tuple[socket.socket, Address]:
    """A listening socket that only this user can connect to. A dead server's socket file is replaced."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if Path(address.path).is_socket() and not _answers(address.path):
            Path(address.path).unlink()
        listener.bind(address.path)
        Path(address.path).chmod(0o600)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"cannot listen at {address}: {error.strerror}") from error
    return listener, address


def unlisten(address: Address) -> None:
    Path(address.path).unlink(missing_ok=True)


def dial(address: Address, timeout_s: float) -> socket.socket:
    """A connected socket. Raises OSError."""
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connected.settimeout(timeout_s)
        connected.connect(address.path)
    except OSError:
        connected.close()
        raise
    return connected


def _answers(path: str) -> bool:
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        return probe.connect_ex(path) == 0


def _copy(sources: list[Bytes], destinations: list[Bytes]) -> None:
    for source, destination in zip(sources, destinations, strict=True):
        np.copyto(destination, source)  # lets other threads run, unlike a memoryview's assignment
