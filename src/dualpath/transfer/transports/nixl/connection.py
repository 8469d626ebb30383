"""The server's side of one connection: an agent with the pool, and a peer that says when it must be driven."""

import socket
import threading
from typing import TYPE_CHECKING

import msgspec

from dualpath.transfer.pool import Bytes
from dualpath.transfer.transports.framed.frames import FrameKind, ProtocolError, StreamClosed
from dualpath.transfer.transports.framed.handshake import Session
from dualpath.transfer.transports.nixl.agent import Agent, Invitation, rest
from dualpath.transfer.transports.tcp import TcpConnection

if TYPE_CHECKING:
    from dualpath.transfer.transports.framed.server import FramedServer

_not_quiet: list[Bytes] = []
"""Pools that a peer may still write into: kept mapped until this process ends."""


class NixlConnection(TcpConnection):
    """It ends, and its peer is quiet, when the peer has closed its end and our agent is gone.

    The peer closes its end when its own agent is gone. The kernel does when the peer is dead, or when another host has
    been silent for half a minute. Our agent's end takes care of what was on its way: over TCP in our own kernel's
    buffers, over RDMA in the fabric. The peer's takes care of its kernel's copies (CMA), which only one host knows.
    """

    def __init__(self, number: int, connected: socket.socket, server: "FramedServer", session: Session) -> None:
        super().__init__(number, connected, server, session)
        self._busy = threading.Event()
        """The peer has something in flight, or is gone."""
        self._agent: Agent | None = None
        self._gone = False

    def hang_up(self) -> None:
        self._stream.shutdown(socket.SHUT_WR)

    def force(self) -> None:
        _not_quiet.append(self._server.pool.view(0))
        super().force()

    def _where(self) -> bytes:
        pool = self._server.pool
        first = pool.view(0)
        try:
            self._agent = Agent(self._class, self._stream.is_loopback, first, pool.pages * pool.stride_bytes)
            metadata = self._agent.metadata()
        except StreamClosed as error:  # who reads the log must know that it was not the peer
            raise RuntimeError(str(error)) from error
        return msgspec.msgpack.encode(Invitation(metadata, first.ctypes.data, pool.stride_bytes))

    def _has_let_go(self) -> bool:
        """Without proof the peer stays in flight."""
        return self._agent is None or self._agent.destroy()

    def _receive_all(self) -> None:
        try:
            while True:
                match self._stream.receive_frame().kind:
                    case FrameKind.BUSY:
                        self._busy.set()
                    case FrameKind.IDLE:
                        self._busy.clear()
                    case kind:
                        raise ProtocolError(f"a server is not sent {kind.name}")
        finally:
            self._gone = True
            self._busy.set()

    def _reply_all(self) -> None:
        """Drive the agent, asleep most of the time, and all of it while the peer wants nothing."""
        assert self._agent is not None
        try:
            while self._busy.wait() and not self._gone:
                self._agent.drive()
                rest()
        except StreamClosed:
            self.hang_up()
