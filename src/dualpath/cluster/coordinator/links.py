"""The coordinator's end of the control plane: which engines have joined, their leases, and how to send to each.

It has one ZeroMQ ROUTER socket. An engine process draws a new identity each time it starts. A restarted engine is
therefore a new engine, and late messages under its old identity are dropped.
"""

import asyncio
import secrets
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from dualpath.cluster.cluster_secret import ClusterSecret
from dualpath.cluster.control_address import control_listener, stop_listening
from dualpath.cluster.curve import ServerDoor
from dualpath.cluster.generator import VllmServer
from dualpath.cluster.messages import (
    CONTROL_QUEUE_MESSAGES,
    BadMessageError,
    FromEngine,
    Heartbeat,
    HeartbeatAck,
    Join,
    NotMember,
    ToEngine,
    encoder,
    from_engine,
)
from dualpath.core.vocabulary import EngineId, Role
from dualpath.spec.metrics import Figures

_PREFIX = {Role.PREFILL: "PE", Role.DECODE: "DE"}


class UnencodableMessageError(ValueError):
    """A message has a value that no message can carry, such as an integer of more than 64 bits."""


class EngineLink(msgspec.Struct):
    """One engine that has joined, or that waits to be admitted (`engine` is None)."""

    identity: bytes
    join: Join
    last_heard_ns: int
    engine: EngineId | None = None
    name: str = ""
    """A name such as ``PE0``: engines of a role are numbered in the order of admission; no number is reused."""
    gauges: Figures = {}
    retired: bool = False
    """Whether it has been told to leave because another takes its place."""

    def for_people(self) -> dict[str, object]:
        join = self.join
        return {
            "engine": self.engine,
            "name": self.name,
            "role": join.role.value,
            "node": join.node,
            "pid": join.pid,
            "agent_pid": join.agent_pid,
            "host": join.host,
        }


class EngineLinks:
    """Engines by id and by ZeroMQ identity. Used from one asyncio thread."""

    def __init__(self, secret: ClusterSecret) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self.door = ServerDoor(self._socket, secret)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.LINGER, 500)
        self._socket.set_hwm(CONTROL_QUEUE_MESSAGES)
        self.epoch = secrets.randbits(62)
        """This coordinator's own: what belongs to another epoch is not about its engines or requests."""
        self._by_identity: dict[bytes, EngineLink] = {}
        self.by_engine: dict[EngineId, EngineLink] = {}
        self._next_engine: EngineId = 0
        self._admitted = dict.fromkeys(Role, 0)
        self.malformed_messages = 0
        self.unroutable_messages = 0
        self.sender_address = ""
        """The numeric address from which the `Join` came that `messages` has yielded last."""
        self._address = ""
        self._listener: socket.socket | None = None
        """Its own; None where somebody else holds the listener."""

    def bind(self, address: str, listener: socket.socket | None = None) -> str:
        """Listen, and return the address with its real port. Raises OSError that names the address.

        `listener`, if given, listens there already; it is used up.
        """
        if listener is None:
            address, self._listener = control_listener(address)
            listener = self._listener.dup()
        self._address = address
        self._socket.setsockopt(zmq.USE_FD, listener.detach())
        self._socket.bind(address)
        return address

    def expect(self, identity: bytes, join: Join) -> EngineLink:
        """Add an engine that waits to be admitted; until then it gets only answers to its heartbeats."""
        link = self._by_identity[identity] = EngineLink(identity, join, time.monotonic_ns())
        return link

    def admit(self, link: EngineLink) -> EngineId:
        """Give the engine its id; from now on `send` reaches it."""
        link.engine = self._next_engine
        self._next_engine += 1
        role = link.join.role
        link.name = f"{_PREFIX[role]}{self._admitted[role]}"
        self._admitted[role] += 1
        self.by_engine[link.engine] = link
        return link.engine

    def device_blocks(self) -> dict[EngineId, int]:
        """Returns each decode engine's device memory in Full Blocks."""
        links = self.by_engine.items()
        return {engine: link.join.hbm_blocks for engine, link in links if link.join.role is Role.DECODE}

    def vllm_servers(self) -> list[VllmServer]:
        joins = [link.join for link in self.by_engine.values() if link.join.url]
        return [VllmServer(url=join.url, model=join.model, dp_rank=join.dp_rank, role=join.role) for join in joins]

    def forget(self, link: EngineLink) -> None:
        self._by_identity.pop(link.identity, None)
        if link.engine is not None:
            self.by_engine.pop(link.engine, None)

    def link_of(self, identity: bytes) -> EngineLink | None:
        return self._by_identity.get(identity)

    def of_ticket(self, ticket: str) -> list[EngineLink]:
        """Returns the links of one member: more than one when it has come back. An empty ticket is nobody's."""
        return [link for link in self._by_identity.values() if ticket and link.join.ticket == ticket]

    def all(self) -> list[EngineLink]:
        return list(self._by_identity.values())

    def extend_leases(self, by_ns: int) -> None:
        """Extend every lease by the time in which this process did not listen."""
        now_ns = time.monotonic_ns()
        for link in self._by_identity.values():
            link.last_heard_ns = min(now_ns, link.last_heard_ns + by_ns)

    def expired(self, now_ns: int, lease_ns: int) -> list[EngineLink]:
        return [link for link in self._by_identity.values() if now_ns - link.last_heard_ns > lease_ns]

    async def messages(self) -> AsyncIterator[tuple[bytes, FromEngine]]:
        """Yields engines' messages. Answers heartbeats itself; counts and drops malformed messages."""
        while True:
            received = await self._socket.recv_multipart(copy=False)
            identity, *frames = [frame.bytes for frame in received]
            try:
                message = from_engine(frames)
            except BadMessageError:
                self.malformed_messages += 1
                continue
            link = self._by_identity.get(identity)
            if link is not None:
                link.last_heard_ns = time.monotonic_ns()
                if isinstance(message, Heartbeat):
                    link.gauges = message.gauges
                    self.send_to(identity, HeartbeatAck(self.epoch))
                    continue
            elif isinstance(message, Join):
                self.sender_address = _peer_address(received[-1])
            elif isinstance(message, Heartbeat):
                self.send_to(identity, NotMember("this coordinator does not know you"))
            yield identity, message

    def send(self, engine: EngineId, message: ToEngine) -> None:
        """Queue a message. It is dropped when it can't be routed: such an engine's lease will expire.

        Raises UnencodableMessageError.
        """
        link = self.by_engine.get(engine)
        if link is not None:
            self.send_to(link.identity, message)

    def send_to(self, identity: bytes, message: ToEngine) -> None:
        """As `send`. Raises UnencodableMessageError, and nothing was sent."""
        try:
            parts = [identity, encoder.encode(message)]
        except (OverflowError, TypeError, ValueError) as error:
            raise UnencodableMessageError(f"{type(message).__name__} can't be encoded: {error}") from error
        asyncio.ensure_future(self._socket.send_multipart(parts, flags=zmq.NOBLOCK)).add_done_callback(self._on_sent)

    def _on_sent(self, sent: "asyncio.Future[Any]") -> None:
        if sent.cancelled() or sent.exception() is not None:
            self.unroutable_messages += 1

    def close(self) -> None:
        self.door.close()
        self._socket.close()
        self._context.term()
        if self._listener is not None:
            stop_listening(self._address, self._listener)


def _peer_address(frame: zmq.Frame) -> str:
    """Returns the numeric address that the frame came from; something else when it came through a Unix socket."""
    try:
        return str(frame.get("Peer-Address"))
    except zmq.ZMQError:  # it was gone before ZeroMQ could ask
        return ""
