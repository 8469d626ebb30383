"""ZeroMQ CURVE for the control plane: every message is encrypted, and only who knows the cluster's secret is heard.

Both key pairs follow from the secret: every 32 bytes are a Curve25519 secret key, and its public key is computed from
it. A peer without the secret does not know the server's public key, so its handshake fails before anything is
received from it; ZAP, which admits the clients' one public key alone, is the second lock on the same door.
"""

import sys
import threading
from typing import Any

import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator
from zmq.utils import z85

from dualpath.cluster.cluster_secret import ClusterSecret

HANDSHAKE_MS = 5_000
"""How long a connection may take to prove itself; then it is closed."""
MAX_MESSAGE_BYTES = 1 << 26
"""More than the longest prompt's token ids and a grammar; a peer that sends more is disconnected."""
_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_MONITOR_STOPPED
_DOMAIN = b"dualpath"


def secure_client(socket: "zmq.Socket[Any]", secret: ClusterSecret) -> None:
    """Let a socket, before it connects, speak only with the cluster's coordinator."""
    public, private = _pair(secret, "control client")
    socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, private)
    socket.setsockopt(zmq.CURVE_SERVERKEY, _pair(secret, "control server")[0])
    _bound(socket)


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
        strangers = 0
        while True:
            event = int.from_bytes(self._events.recv_multipart()[0][:2], sys.byteorder)
            if event == zmq.EVENT_ACCEPTED:
                strangers += 1
            elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                strangers -= 1
            elif event == zmq.EVENT_DISCONNECTED and self.refused_connections < strangers:
                self.refused_connections += 1
            elif event == zmq.EVENT_MONITOR_STOPPED:
                return

    def close(self) -> None:
        self._socket.disable_monitor()
        self._counter.join()
        self._events.close()
        self._authenticator.stop()


def _bound(socket: "zmq.Socket[Any]") -> None:
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)


def _pair(secret: ClusterSecret, whose: str) -> tuple[bytes, bytes]:
    """Returns the public and the secret key, in Z85."""
    private = z85.encode(secret.key(whose))
    return zmq.curve_public(private), private
