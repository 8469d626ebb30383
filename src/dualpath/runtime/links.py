"""The coordinator's end of the control plane: who has joined, who still lives, and a way to send to each.

One ZeroMQ ROUTER socket. An engine's identity is drawn anew each time its process starts, so a restarted engine is a
new engine and whatever its former self still had to say is from a stranger, and dropped.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from dualpath.core.vocabulary import EngineId
from dualpath.runtime.messages import (
    FromEngine,
    Heartbeat,
    HeartbeatAck,
    Join,
    ToEngine,
    encoder,
    from_engine_decoder,
)

CONTROL_QUEUE_MESSAGES = 100_000
"""Bound of each control queue. A cluster that has this many messages under way to one engine has lost it already."""


class EngineLink(msgspec.Struct):
    """One joined engine."""

    engine: EngineId
    identity: bytes
    join: Join
    last_heard_ns: int
    gauges: dict[str, float] = {}


class EngineLinks:
    """Joined engines by id and by ZeroMQ identity. Used from one asyncio thread."""

    def __init__(self) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.LINGER, 500)
        self._socket.set_hwm(CONTROL_QUEUE_MESSAGES)
        self._by_identity: dict[bytes, EngineLink] = {}
        self.by_engine: dict[EngineId, EngineLink] = {}
        self._next_engine: EngineId = 0
        self.malformed_messages = 0
        self.unroutable_messages = 0

    def bind(self, address: str) -> str:
        """Listen; returns the address with its real port."""
        self._socket.bind(address)
        return str(self._socket.getsockopt(zmq.LAST_ENDPOINT), "utf-8")  # type: ignore[arg-type]

    def admit(self, identity: bytes, join: Join) -> EngineLink:
        link = EngineLink(self._next_engine, identity, join, time.monotonic_ns())
        self._next_engine += 1
        self._by_identity[identity] = self.by_engine[link.engine] = link
        return link

    def forget(self, engine: EngineId) -> EngineLink | None:
        link = self.by_engine.pop(engine, None)
        if link is not None:
            del self._by_identity[link.identity]
        return link

    def link_of(self, identity: bytes) -> EngineLink | None:
        return self._by_identity.get(identity)

    def extend_leases(self, by_ns: int) -> None:
        for link in self.by_engine.values():
            link.last_heard_ns += by_ns

    def expired(self, now_ns: int, lease_ns: int) -> list[EngineId]:
        return [link.engine for link in self.by_engine.values() if now_ns - link.last_heard_ns > lease_ns]

    async def messages(self) -> AsyncIterator[tuple[bytes, FromEngine]]:
        """What engines say; heartbeats are answered on the way, malformed messages counted and dropped."""
        while True:
            identity, payload = await self._socket.recv_multipart()
            try:
                message = from_engine_decoder.decode(payload)
            except msgspec.DecodeError:
                self.malformed_messages += 1
                continue
            link = self._by_identity.get(identity)
            if link is not None:
                link.last_heard_ns = time.monotonic_ns()
                if isinstance(message, Heartbeat):
                    link.gauges = message.gauges
                    self.send(link.engine, HeartbeatAck())
                    continue
            yield identity, message

    def send(self, engine: EngineId, message: ToEngine) -> None:
        """Queue a message. One that can't be routed is dropped: the engine's lease will tell."""
        link = self.by_engine.get(engine)
        if link is not None:
            self.send_to(link.identity, message)

    def send_to(self, identity: bytes, message: ToEngine) -> None:
        parts = [identity, encoder.encode(message)]
        asyncio.ensure_future(self._socket.send_multipart(parts, flags=zmq.NOBLOCK)).add_done_callback(self._on_sent)

    def _on_sent(self, sent: "asyncio.Future[Any]") -> None:
        if sent.cancelled() or sent.exception() is not None:
            self.unroutable_messages += 1

    def close(self) -> None:
        self._socket.close()
        self._context.term()
