"""Who knocks at a data server, and who is let in: one thread accepts and shakes hands, whatever and how many come.

A connection has `HELLO_TIMEOUT_S` to prove itself, and costs a descriptor and a few hundred bytes until then. When too
many stand at the door the oldest has to go, so idle strangers shut nobody out.
"""

import contextlib
import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable

import msgspec

from dualpath.spec.log import Seldom
from dualpath.transfer.transports.framed.frames import HEADER_BYTES, FrameKind, ProtocolError, unpack
from dualpath.transfer.transports.framed.handshake import Session, challenge, check_hello, check_user, packed

MAX_AT_THE_DOOR = 256
HELLO_TIMEOUT_S = 5.0
_ACCEPTS_A_ROUND = 16
"""So that who has knocked is heard before so many more come that he would have to go."""
_log = logging.getLogger(__name__)


class _Knock:
    """A connection that has yet to prove itself."""

    def __init__(self, connected: socket.socket, authenticated: bool) -> None:
        self.socket = connected
        self.challenge = challenge(authenticated)
        self.deadline_s = time.monotonic() + HELLO_TIMEOUT_S
        self._said = bytearray()
        self._wanted_bytes = HEADER_BYTES

    def hear(self, key: bytes) -> Session | None:
        """Returns None while more of the HELLO is to come. Raises OSError, ProtocolError, msgspec.MsgspecError."""
        piece = self.socket.recv(self._wanted_bytes - len(self._said))
        if not piece:
            raise ProtocolError("it left without a word")
        self._said += piece
        if len(self._said) < self._wanted_bytes:
            return None
        if self._wanted_bytes > HEADER_BYTES:
            return check_hello(key, self.challenge, bytes(self._said[HEADER_BYTES:]))
        frame = unpack(self._said)
        if frame.kind is not FrameKind.HELLO or not frame.n_bytes:
            raise ProtocolError(f"expected HELLO: {frame}")
        self._wanted_bytes += frame.n_bytes
        return None


class Door:
    """Accepts at `listener` and calls `let_in` with every connection that has proved itself, on its thread."""

    def __init__(
        self,
        listener: socket.socket,
        address: str,
        key: bytes,
        authenticated: bool,
        let_in: Callable[[socket.socket, Session], None],
    ) -> None:
        self.refused_connections = 0
        self._listener = listener
        self._address = address
        self._key = key
        self._authenticated = authenticated
        self._let_in = let_in
        self._knocking: dict[int, _Knock] = {}
        """By descriptor, the oldest first."""
        self._seldom = Seldom()
        self._closing = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="channel acceptor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Let nobody in any more; the listener stays its owner's to close."""
        self._closing = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        self._selector.close()
        os.close(self._wake)

    def _run(self) -> None:
        while not self._closing:
            for key, _ in self._selector.select(self._patience_s()):
                if key.fileobj is self._listener:
                    self._accept_some()
                elif key.fd in self._knocking:
                    self._hear(self._knocking[key.fd])
            while self._patience_s() == 0:
                self._refuse(next(iter(self._knocking.values())), "it said nothing in time")
        for knock in self._knocking.values():
            knock.socket.close()

    def _patience_s(self) -> float | None:
        """Returns how long the oldest may still take; None when nobody is there."""
        for knock in self._knocking.values():
            return max(knock.deadline_s - time.monotonic(), 0)
        return None

    def _accept_some(self) -> None:
        for n in range(_ACCEPTS_A_ROUND):
            try:
                connected, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:  # no descriptor is left, most likely
                if n > 0:  # nobody may be there: the kernel looks for a descriptor first
                    return
                if self._knocking:
                    self._refuse(next(iter(self._knocking.values())), error)
                else:
                    self._tell(error)
                    time.sleep(0.05)
                return
            self._answer(_Knock(connected, self._authenticated))

    def _answer(self, knock: _Knock) -> None:
        knock.socket.setblocking(False)
        self._knocking[knock.socket.fileno()] = knock
        self._selector.register(knock.socket, selectors.EVENT_READ)
        try:
            check_user(knock.socket)
            knock.socket.send(packed(FrameKind.CHALLENGE, knock.challenge))  # an empty buffer takes it whole
        except (OSError, ProtocolError) as error:
            self._refuse(knock, error)
        if len(self._knocking) > MAX_AT_THE_DOOR:
            self._refuse(next(iter(self._knocking.values())), "too many knock")

    def _hear(self, knock: _Knock) -> None:
        try:
            session = knock.hear(self._key)
        except BlockingIOError:
            return
        except (OSError, ProtocolError, msgspec.MsgspecError, ValueError, RecursionError) as error:
            self._refuse(knock, error)
            return
        if session is not None:
            self._forget(knock)
            self._let_in(knock.socket, session)

    def _refuse(self, knock: _Knock, why: object) -> None:
        self._forget(knock)
        self.refused_connections += 1
        with contextlib.suppress(OSError):
            knock.socket.close()
        self._tell(why)

    def _tell(self, why: object) -> None:
        if self._seldom.due():
            _log.warning("%s: %d connections refused so far; now: %s", self._address, self.refused_connections, why)

    def _forget(self, knock: _Knock) -> None:
        del self._knocking[knock.socket.fileno()]
        self._selector.unregister(knock.socket)
