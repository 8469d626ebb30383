"""How an agent and its engine processes carry their records (`attachment`) over Unix sockets.

A frame is its length (4 bytes, little-endian) and a msgpack record. When a connection ends, the other side is gone: the
kernel closes it however a process dies.
"""

import asyncio
import contextlib
import os
import select
import socket
import struct
import threading
from typing import Any, TypeVar

import msgspec

from dualpath.cluster.attachment import Attach, Beat, LayerThread
from dualpath.cluster.vllm_attachment import AttachWorker
from dualpath.spec.private_files import peer_user

MAX_FRAME_BYTES = 256 * 2**20
"""Longer than any batch of the longest prompts."""
_LENGTH = struct.Struct("<I")
HEADER_BYTES = _LENGTH.size


class NotAPeerError(Exception):
    """Bytes that are no frame of ours, or a process of another user."""


First = Attach | LayerThread | AttachWorker
"""What a process that connects to an agent says first."""
_encoder = msgspec.msgpack.Encoder()
_first = msgspec.msgpack.Decoder(First)
Record = TypeVar("Record")


def frame(message: msgspec.Struct) -> bytes:
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


def body_bytes(header: bytes | bytearray) -> int:
    """Returns the length of the frame that follows. Raises NotAPeerError."""
    n_bytes = int(_LENGTH.unpack(header)[0])
    if n_bytes > MAX_FRAME_BYTES:
        raise NotAPeerError(f"a frame of {n_bytes} bytes is no frame of ours")
    return n_bytes


def record(decoder: "msgspec.msgpack.Decoder[Record]", body: bytes | bytearray) -> Record:
    """Raises NotAPeerError for whatever is no record of the decoder's kind."""
    try:
        return decoder.decode(body)
    except Exception as error:  # of types, of UTF-8, of nesting: what a peer sends raises nothing else than this
        raise NotAPeerError(f"no record of ours: {type(error).__name__}: {error}") from None


class Connection:
    """One end of a connection, for threads: any thread may send, one receives. Raises ConnectionError at its end."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._sending = threading.Lock()

    @classmethod
    def to(cls, path: str) -> "Connection":
        """Connect to an agent. Raises OSError when nobody listens there."""
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connected.connect(path)
        except OSError:
            connected.close()
            raise
        return cls(connected)

    def send(self, message: msgspec.Struct) -> None:
        with self._sending:
            self._socket.sendall(frame(message))

    def send_beat(self, beat: Beat) -> None:
        """Send it unless much is unread at the other side, which tells it as much.

        Beats that pile up before a process that gets no processor would take all the room that a word of ours needs.
        """
        with self._sending:
            if self._has_room():
                self._socket.sendall(frame(beat))

    def _has_room(self) -> bool:
        """Returns whether the kernel calls the socket writable: Linux, while three quarters of its room are free."""
        descriptor = self._socket.fileno()
        if descriptor < 0:
            raise ConnectionError("this side has closed the connection")
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        return bool(poll.poll(0))

    def receive(self, decoder: "msgspec.msgpack.Decoder[Any]") -> Any:
        """Raises ConnectionError at the end, NotAPeerError for what is no frame or a record of another kind."""
        return record(decoder, self._exactly(body_bytes(self._exactly(_LENGTH.size))))

    def close(self) -> None:
        """End the connection; a thread that receives gets ConnectionError."""
        with contextlib.suppress(OSError):  # the other side was first
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _exactly(self, n_bytes: int) -> bytearray:
        buffer = bytearray(n_bytes)
        rest = memoryview(buffer)
        while rest:
            received = self._socket.recv_into(rest)
            if not received:
                raise ConnectionError("the other side has closed the connection")
            rest = rest[received:]
        return buffer


async def first_record(accepted: socket.socket) -> First:
    """Returns what a process that has connected says first. Raises NotAPeerError, ConnectionError."""
    if peer_user(accepted) != os.geteuid():
        raise NotAPeerError("a process of another user")
    header = await _exactly(accepted, _LENGTH.size)
    first: First = record(_first, await _exactly(accepted, body_bytes(header)))
    return first


async def _exactly(accepted: socket.socket, n_bytes: int) -> bytes:
    loop, parts = asyncio.get_running_loop(), bytearray()
    while len(parts) < n_bytes:
        part = await loop.sock_recv(accepted, n_bytes - len(parts))
        if not part:
            raise ConnectionError("the other side has closed the connection")
        parts += part
    return bytes(parts)
