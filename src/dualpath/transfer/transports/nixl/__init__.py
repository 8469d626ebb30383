"""``nixl``: one-sided reads and writes by NVIDIA's NIXL over UCX, for fabrics with RDMA; an extra (``dualpath[nixl]``).

Read `agent.py` (an agent, and the proof that it is gone), then `channel.py` (the initiator) and `connection.py` (the
server). Both ends have an agent of their own for each connection. So the agent carries the connection's traffic class,
and the connection is proven quiet by its agents' ends.

Beside each pair of agents stands a TCP connection, with the handshake and the sealed frames of ``tcp-authenticated``.
It brings the server's agent's metadata to a peer that has the cluster's key, says when the server's agent must be
driven (UCX over TCP is not one-sided), and its end says that the other side has let go.

What the key protects is the metadata. UCX authenticates nothing: over RDMA a peer needs the pool's remote key, which is
in the metadata and in clear on the wire; over TCP, whoever reaches a port of UCX's can write into the process. It wants
a network of the cluster's own. UCX's variables (``UCX_TLS``, ``UCX_NET_DEVICES``) choose its devices.
"""

import os

from dualpath.core.vocabulary import TrafficClass
from dualpath.spec.loopback import is_loopback
from dualpath.transfer.pool import BufferPool
from dualpath.transfer.traffic import TrafficManager
from dualpath.transfer.transports.framed.frames import StreamClosed
from dualpath.transfer.transports.framed.server import FramedServer
from dualpath.transfer.transports.nixl.agent import LIBRARIES, Agent, installed_library
from dualpath.transfer.transports.nixl.channel import NixlChannel
from dualpath.transfer.transports.nixl.connection import NixlConnection
from dualpath.transfer.transports.tcp import AuthenticatedTcpTransport


class NixlTransport(AuthenticatedTcpTransport):
    """Its addresses are ``nixl://host:port``, of the TCP connection. Raises ModuleNotFoundError without the extra.

    `serve` raises OSError also where NIXL or UCX can't start: peers would only see that nobody welcomes them.
    """

    scheme = "nixl"
    channel = NixlChannel
    connection = NixlConnection

    def __init__(self) -> None:
        if installed_library() is None:
            raise ModuleNotFoundError(f"No module named {LIBRARIES[0]!r}", name=LIBRARIES[0])

    def serve(self, pool: BufferPool, traffic: TrafficManager, *, host: str, name: str, key: bytes) -> FramedServer:
        try:
            first = pool.view(0)
            Agent(TrafficClass.LOW, is_loopback(host) is True, first, first.nbytes).destroy()
        except StreamClosed as error:
            choices = sorted(one for one in os.environ if one.startswith("UCX_") and "_LOG_" not in one)
            chosen = ", ".join(f"{one}={os.environ[one]}" for one in choices)
            raise OSError(f"transport nixl can't start here ({chosen or 'no UCX variable is set'}): {error}") from error
        return super().serve(pool, traffic, host=host, name=name, key=key)
