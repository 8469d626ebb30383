"""`connect`: from an address to a channel."""

import msgspec

from dualpath.core.vocabulary import TrafficClass
from dualpath.transfer import local, tcp
from dualpath.transfer.channel import Address, Channel, TransferCause, TransferError
from dualpath.transfer.local import SharedMemoryChannel
from dualpath.transfer.stream import Stream, StreamClosed
from dualpath.transfer.tcp import TcpChannel
from dualpath.transfer.traffic import TrafficManager
from dualpath.transfer.wire import VERSION, Frame, FrameKind, Hello, ProtocolError, Welcome

MAX_OPS_IN_FLIGHT = 1_024
"""Bound of the bounds: a server keeps a record of each."""


def connect(
    address: str,
    *,
    local_traffic: TrafficManager,
    traffic_class: TrafficClass,
    peer_tag: str,
    max_ops_in_flight: int = 64,
    timeout_s: float = 5.0,
) -> Channel:
    """Connect to a `ChannelServer`; blocks for `timeout_s` at most.

    `peer_tag` is what the server is to call *us* (see `ChannelServer.quiesce`), for example our engine id. Raises
    ValueError for an address that is none or a bad bound, TransferError(PEER_CLOSED) when nobody answers in time, or
    refuses, and TransferError(PROTOCOL) when it is no server of ours.
    """
    parsed = Address.parse(address)
    if not 1 <= max_ops_in_flight <= MAX_OPS_IN_FLIGHT:
        raise ValueError(f"max_ops_in_flight is {max_ops_in_flight}; it must be 1 to {MAX_OPS_IN_FLIGHT}")
    deadline_ns = local_traffic.clock() + round(timeout_s * 1e9)
    try:
        connected = local.dial(parsed, timeout_s) if parsed.path else tcp.dial(parsed, traffic_class, timeout_s)
    except OSError as error:
        raise TransferError(TransferCause.PEER_CLOSED, f"cannot connect to {address}: {error}") from error
    stream = Stream(connected, local_traffic.clock)
    try:
        welcome = _shake_hands(stream, Hello(VERSION, peer_tag, traffic_class), deadline_ns)
        if parsed.path:
            return SharedMemoryChannel(stream, welcome, local_traffic, traffic_class, max_ops_in_flight)
        return TcpChannel(stream, welcome, local_traffic, traffic_class, max_ops_in_flight)
    except StreamClosed as error:
        stream.close()
        raise TransferError(TransferCause.PEER_CLOSED, f"{address} did not welcome us: {error}") from error
    except (ProtocolError, msgspec.DecodeError, OSError, ValueError) as error:
        stream.close()
        raise TransferError(TransferCause.PROTOCOL, f"{address} is no channel server of ours: {error}") from error


def _shake_hands(stream: Stream, hello: Hello, deadline_ns: int) -> Welcome:
    body = msgspec.msgpack.encode(hello)
    stream.send(Frame(FrameKind.HELLO, n_bytes=len(body)), [body])
    frame = stream.receive_frame(deadline_ns)
    if frame.kind is not FrameKind.WELCOME:
        raise ProtocolError(f"expected WELCOME: {frame}")
    welcome = msgspec.msgpack.decode(stream.receive_bytes(frame.n_bytes, deadline_ns), type=Welcome)
    if welcome.version != VERSION:
        raise ProtocolError(f"expected version {VERSION}: {welcome}")
    return welcome
