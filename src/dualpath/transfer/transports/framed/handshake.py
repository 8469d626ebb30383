"""How the two ends of a connection prove that they know the cluster's key, before anything of a pool is told.

::

    initiator                         server
                             <──      CHALLENGE(version, nonce)
    HELLO(tag, class, nonce, proof) ──>
                             <──      WELCOME(shape of the pool, proof)

A proof is a MAC over all that both have said so far, in words that only one of the two roles uses; nonces make each
connection's its own. So nothing that was recorded, or reflected, is a proof. Over Unix sockets both also ask the kernel
who the other is: only the same user's processes speak to each other.
"""

import hmac
import os
import secrets
import socket
from hashlib import blake2b
from typing import Annotated, TypeVar

import msgspec

from dualpath.core.vocabulary import TrafficClass
from dualpath.spec.private_files import peer_user
from dualpath.transfer.transports.framed.frames import (
    MAX_CHUNK_BYTES,
    Frame,
    FrameKind,
    ProtocolError,
    Stream,
    StreamClosed,
)
from dualpath.transfer.transports.framed.sealed import Seal

VERSION = 3
NONCE_BYTES = PROOF_BYTES = 32
MAX_TAG = 256
Record = TypeVar("Record")

_Version = Annotated[int, msgspec.Meta(ge=0, le=1 << 16)]
_Nonce = Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
_Proof = Annotated[bytes, msgspec.Meta(min_length=PROOF_BYTES, max_length=PROOF_BYTES)]
_Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 48)]


class Challenge(msgspec.Struct, frozen=True):
    """The server speaks first. `authenticated`: whether every later frame carries a MAC (`sealed`)."""

    version: _Version
    nonce: _Nonce
    authenticated: bool = False


class Hello(msgspec.Struct, frozen=True):
    """The initiator's tag and traffic class."""

    version: _Version
    tag: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_TAG)]
    traffic_class: TrafficClass
    nonce: _Nonce
    proof: _Proof = bytes(PROOF_BYTES)


class Welcome(msgspec.Struct, frozen=True):
    """The pool that the ranges of this connection are in; `where`, in words that only its transport reads."""

    version: _Version
    page_bytes: _Count
    pages: _Count
    where: Annotated[bytes, msgspec.Meta(max_length=MAX_CHUNK_BYTES // 2)] = b""
    proof: _Proof = bytes(PROOF_BYTES)


class Session:
    """What two ends know of each other after the HELLO, and the keys that follow from it."""

    def __init__(self, key: bytes, challenge: Challenge, hello: Hello) -> None:
        self._key = key
        self._said = msgspec.msgpack.encode((challenge, msgspec.structs.replace(hello, proof=bytes(PROOF_BYTES))))
        self.hello = hello

    def initiator_proof(self) -> bytes:
        return self._mac(b"dualpath hello", b"")

    def server_proof(self, welcome: Welcome) -> bytes:
        return self._mac(b"dualpath welcome", msgspec.msgpack.encode(msgspec.structs.replace(welcome, proof=bytes(32))))

    def frame_keys(self) -> tuple[bytes, bytes]:
        """Returns the keys of the initiator's frames and of the server's."""
        return self._mac(b"dualpath frame i", b""), self._mac(b"dualpath frame s", b"")

    def _mac(self, role: bytes, more: bytes) -> bytes:
        return blake2b(self._said + more, digest_size=PROOF_BYTES, key=self._key, person=role).digest()


_challenges = msgspec.msgpack.Decoder(Challenge)
_hellos = msgspec.msgpack.Decoder(Hello)
_welcomes = msgspec.msgpack.Decoder(Welcome)


def challenge(authenticated: bool) -> Challenge:
    return Challenge(VERSION, secrets.token_bytes(NONCE_BYTES), authenticated)


def packed(kind: FrameKind, record: msgspec.Struct) -> bytes:
    """Returns a frame of the handshake."""
    body = msgspec.msgpack.encode(record)
    return Frame(kind, n_bytes=len(body)).pack() + body


def check_hello(key: bytes, given: Challenge, body: bytes) -> Session:
    """The server's check. Raises ProtocolError, msgspec.MsgspecError."""
    hello = _hellos.decode(body)
    if hello.version != VERSION:
        raise ProtocolError(f"expected version {VERSION} of the handshake, not {hello.version}")
    session = Session(key, given, hello)
    if not hmac.compare_digest(hello.proof, session.initiator_proof()):
        raise ProtocolError("it does not know the cluster's secret")
    return session


def shake_hands(
    stream: Stream, key: bytes, tag: str, traffic_class: TrafficClass, authenticated: bool, deadline_ns: int
) -> Welcome:
    """The initiator's part. Raises StreamClosed, ProtocolError, msgspec.MsgspecError."""
    given = _expect(stream, FrameKind.CHALLENGE, _challenges, deadline_ns)
    if given.version != VERSION:
        raise ProtocolError(f"expected version {VERSION} of the handshake, not {given.version}")
    if given.authenticated != authenticated:
        raise ProtocolError("one side authenticates frames and the other does not; give both the same --transport")
    hello = Hello(VERSION, tag, traffic_class, secrets.token_bytes(NONCE_BYTES))
    session = Session(key, given, hello)
    body = msgspec.msgpack.encode(msgspec.structs.replace(hello, proof=session.initiator_proof()))
    stream.send(Frame(FrameKind.HELLO, n_bytes=len(body)), [body])
    if authenticated:
        stream.seal = Seal(*session.frame_keys())
    try:
        welcome = _expect(stream, FrameKind.WELCOME, _welcomes, deadline_ns)
    except StreamClosed as error:  # a server does not tell a stranger why
        raise StreamClosed(f"{error}, when it had seen our proof; has it the same cluster secret?") from error
    if not hmac.compare_digest(welcome.proof, session.server_proof(welcome)):
        raise ProtocolError("it does not know the cluster's secret")
    return welcome


def check_user(connected: socket.socket) -> None:
    """Raises ProtocolError when a Unix socket's other end is another user's; other sockets have no users."""
    if connected.family == socket.AF_UNIX:
        user = peer_user(connected)
        if user != os.geteuid():
            raise ProtocolError(f"it is user {user}'s, not this user's")


def _expect(stream: Stream, kind: FrameKind, decoder: "msgspec.msgpack.Decoder[Record]", deadline_ns: int) -> Record:
    frame = stream.receive_frame(deadline_ns)
    if frame.kind is not kind:
        raise ProtocolError(f"expected {kind.name}: {frame}")
    return decoder.decode(stream.receive_bytes(frame.n_bytes, deadline_ns))
