"""ZeroMQ CURVE for the control plane: every message is encrypted, and only who knows the cluster's secret is heard.

Both key pairs follow from the secret: every 32 bytes are a Curve25519 secret key, and its public key is computed from
it. A peer without the secret does not know the server's public key, so its handshake fails before anything is
received from it; ZAP, which admits the clients' one public key alone, is the second lock on the same door.
"""

import errno
import logging
import os
import socket
import struct
import threading
import time
from typing import Any

import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator
from zmq.utils import z85

from dualpath.cluster.cluster_secret import ClusterSecret
from dualpath.spec.log import ROOT, Seldom

logger = logging.getLogger(f"{ROOT}.control")

HANDSHAKE_MS = 5_000
"""How long a connection may take to prove itself; then it is closed."""
MAX_MESSAGE_BYTES = 1 << 26
"""More than the longest prompt's token ids and a grammar; a peer that sends more is disconnected."""
_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_MONITOR_STOPPED
_CLIENT_EVENTS = (
    zmq.EVENT_CONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_MONITOR_STOPPED
)
_CUT_OFF = (errno.EPIPE, errno.ECONNRESET)
_REFUSALS = 5
_REFUSED_S = 2.0
_EVENT = struct.Struct("=Hi")
"""Its number; a descriptor or an error number, of events that have one."""
_DOMAIN = b"dualpath"


def secure_client(socket: "zmq.Socket[Any]", secret: ClusterSecret) -> None:
    """Let a socket, before it connects, speak only with the cluster's coordinator."""
    public, private = _pair(secret, "control client")
    socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, private)
    socket.setsockopt(zmq.CURVE_SERVERKEY, _pair(secret, "control server")[0])
    _bound(socket)


def handshakes(socket: zmq.asyncio.Socket) -> zmq.asyncio.Socket:
    """Returns what `refused` reads, of a client's socket that has yet to connect. The caller closes it."""
    return socket.get_monitor_socket(_CLIENT_EVENTS)


async def refused(events: zmq.asyncio.Socket) -> bool | None:
    """Wait until the server refuses us. True: ZeroMQ tries no more; False: it goes on; None: our socket is closed.

    A server with another secret cuts every handshake off, and says nothing. A coordinator that dies, or one that stands
    still, does so once or lets the handshake time out; so only refusals in a row count, which last for some time.
    """
    shaking, began_s, refusals = False, 0.0, 0
    while True:
        event, value = _EVENT.unpack((await events.recv_multipart())[0])
        if event == zmq.EVENT_MONITOR_STOPPED:
            return None
        if event == zmq.EVENT_CONNECTED:
            shaking = True
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            shaking, refusals = False, 0
        elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            shaking = False
            began_s, refusals = (began_s, refusals + 1) if refusals else (time.monotonic(), 1)
            if value not in _CUT_OFF:
                refusals = 0
            elif refusals >= _REFUSALS and time.monotonic() - began_s >= _REFUSED_S:
                return False
        elif shaking:  # it has said why, or what it speaks is not ZeroMQ
            return True


class ServerDoor:
    """Lets a socket, before it binds, hear only the cluster's members; counts all others. `close` it before the socket.

    One a context, as ZeroMQ asks one authenticator. Its socket stands in the running loop, its counter on a thread.
    """

    def __init__(self, socket: zmq.asyncio.Socket, secret: ClusterSecret) -> None:
        self.refused_connections = 0
        """Connections that were no member's, or sent what is not ZeroMQ."""
        _, private = _pair(secret, "control server")
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, private)
        socket.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN)
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        _bound(socket)
        self._client = _pair(secret, "control client")[0]
        self._authenticator = AsyncioAuthenticator(socket.context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(_DOMAIN.decode(), self)
        self._socket = socket
        events = f"inproc://door-{id(self)}"
        socket.monitor(events, _EVENTS)
        self._events: zmq.Socket[bytes] = zmq.Context(socket.context).socket(zmq.PAIR)
        self._events.connect(events)
        self._counter = threading.Thread(target=self._count, name="control door", daemon=True)
        self._counter.start()

    def callback(self, domain: str, key: bytes) -> bool:  # noqa: ARG002
        """The authenticator asks whether a client with this public key may come in."""
        return key == self._client

    def _count(self) -> None:
        """Events of success don't say of which connection they are, so their number must do: of the connections that
        have ended, as many were refused as were accepted without becoming a member's.
        """
        strangers, seldom = 0, Seldom()
        peers: dict[int, str] = {}
        """By descriptor, of all connections: a member's end is not told apart from a stranger's."""
        while True:
            told, at = self._events.recv_multipart()
            event, descriptor = _EVENT.unpack(told)
            if event == zmq.EVENT_ACCEPTED:
                strangers += 1
                peers[descriptor] = _peer(descriptor)
            elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                strangers -= 1
            elif event == zmq.EVENT_DISCONNECTED:
                peer = peers.pop(descriptor, "")
                if self.refused_connections < strangers:
                    self.refused_connections += 1
                    if seldom.due():
                        _tell(at.decode(), self.refused_connections, peer)
            elif event == zmq.EVENT_MONITOR_STOPPED:
                return

    def close(self) -> None:
        self._socket.disable_monitor()
        self._counter.join()
        self._events.close()
        self._authenticator.stop()


def _peer(descriptor: int) -> str:
    """Returns who has connected, for people; empty when he is gone already, or has come through a Unix socket."""
    try:
        with socket.socket(fileno=os.dup(descriptor)) as connected:
            return str(connected.getpeername()[0])
    except (OSError, IndexError):
        return ""


def _tell(address: str, refused_connections: int, peer: str) -> None:
    logger.warning(
        "%s: %d connections refused so far, the last from %s; an engine there has another cluster secret, and anything "
        "else has no business here",
        address,
        refused_connections,
        peer or "an unknown address",
    )


def _bound(socket: "zmq.Socket[Any]") -> None:
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)


def _pair(secret: ClusterSecret, whose: str) -> tuple[bytes, bytes]:
    """Returns the public and the secret key, in Z85."""
    private = z85.encode(secret.key(whose))
    return zmq.curve_public(private), private
