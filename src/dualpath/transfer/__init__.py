"""Moves KV bytes: an engine's buffer, the transports that carry bytes between engines, the traffic manager.

Start with `transport.py`, the protocol. `transports/` has ours; docs/how-to/add-a-transport.md says how to add one.

These words are used here; the field's words are in brackets:

=============  =========================================================================================================
pool, page     an engine's DRAM buffer (registered memory), and its piece that holds one Full Block, numbered from 0
`PageRange`    consecutive bytes inside one page (descriptor); beside each stands a local array that it is copied to or
               from, and both lists together are one operation's (descriptor list, scatter/gather list)
operation      one `read` or `write` (work request): posted, in flight, ended; `chunk`: what of it passes a lane at once
server         the side that owns the pool (target); `initiator`: the side that posts
`Channel`      an initiator's connection to one server in one traffic class; `connection`: the same, seen by the server
transport      a way to connect initiators to servers, such as ``shm``; found by name in `TRANSPORTS`
NIC, lane      of an engine, and one direction of it (`rx` in, `tx` out), shared by traffic classes under core's arbiter
quiet          of a peer: nothing that it has posted can touch the pool any more
cursor         only in ``transports/framed``: how far a transfer has come in its list of arrays
=============  =========================================================================================================

Elsewhere: *rows* are an engine's own arrays, tokens of one layer; a *segment* (`core.load_plan`) is a run of a prompt's
tokens that one side reads; an *extent* (`model.paged`) is a run of device blocks.
"""

from typing import TYPE_CHECKING

from dualpath.spec.registry import Registry

if TYPE_CHECKING:
    from dualpath.transfer.transport import Transport


def _shm() -> "Transport":
    from dualpath.transfer.transports.shm import SharedMemoryTransport

    return SharedMemoryTransport()


def _tcp() -> "Transport":
    from dualpath.transfer.transports.tcp import TcpTransport

    return TcpTransport()


def _tcp_authenticated() -> "Transport":
    from dualpath.transfer.transports.tcp import AuthenticatedTcpTransport

    return AuthenticatedTcpTransport()


def _nixl() -> "Transport":
    from dualpath.transfer.transports.nixl import NixlTransport

    return NixlTransport()


def _protocol() -> type:
    from dualpath.transfer.transport import Transport

    return Transport


GUIDE = "docs/how-to/add-a-transport.md"
TRANSPORTS: "Registry[Transport]" = Registry(
    "transport",
    "dualpath.transports",
    {"shm": _shm, "tcp": _tcp, "tcp-authenticated": _tcp_authenticated, "nixl": _nixl},
    protocol=_protocol,
    guide=GUIDE,
)
"""``shm`` within a host, ``tcp`` anywhere, ``tcp-authenticated`` where somebody might change bytes on their way,
``nixl`` for RDMA (an extra); and other packages' transports. Importing this imports no numpy."""
