"""Moving bytes: buffer pools, channels between engines, and the traffic manager that both pass through."""

from dualpath.transfer.channel import Channel, ChannelBusy, Span, TransferCause, TransferError
from dualpath.transfer.connect import connect
from dualpath.transfer.pool import BufferPool, MappedPages, PoolExhausted, sweep_dead_pools
from dualpath.transfer.server import ChannelServer
from dualpath.transfer.traffic import DeadlineExceeded, Lane, TrafficManager

__all__ = [
    "BufferPool",
    "Channel",
    "ChannelBusy",
    "ChannelServer",
    "DeadlineExceeded",
    "Lane",
    "MappedPages",
    "PoolExhausted",
    "Span",
    "TrafficManager",
    "TransferCause",
    "TransferError",
    "connect",
    "sweep_dead_pools",
]
