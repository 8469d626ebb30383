"""Bytes between buffers: the runtime's own transfers, measured with and without a rate to keep.

A prompt's hit blocks are copied from a PE buffer, pulled from a DE buffer, and put into one, layer by layer, by
`runtime.layer_transfers`; the DE lives in this process too, so CPU time has both ends in it. Without a rate the time
from start to end gives the cost of a byte, and CPU time over it how many cores are busy meanwhile. With one, what CPU
time comes on top is the price of a chunk's pacing.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import numpy as np

from dualpath.core.load_plan import chunk_plan
from dualpath.core.vocabulary import BLOCK_TOKENS, Leg, Side, TrafficClass
from dualpath.kv.layout import KVLayout
from dualpath.prediction.machine import MoveCost, TransportCost
from dualpath.prediction.nic import Lane
from dualpath.runtime.layer_transfers import BatchTransfers, ItemTransfers
from dualpath.transfer import BufferPool, Channel, ChannelServer, TrafficManager, connect

HIT_BLOCKS = 32
FEW_BLOCKS = 1
NEW_TOKENS = 64
PACED_S = 0.25
"""A paced pass should take about this long."""
PASSES = 4


class Pass(msgspec.Struct, frozen=True):
    """One way of the bytes of all layers of a prompt."""

    n_bytes: int
    wall_ns: int
    cpu_ns: int


def measure_moves(layout: KVLayout, transport: str) -> tuple[MoveCost, TransportCost]:
    """The cost of a local copy, and of `transport`'s pull and put."""
    rate = max(1_000_000, round(layout.full_block_bytes * HIT_BLOCKS / PACED_S))
    few, free = (_passes(layout, transport, None, blocks) for blocks in (FEW_BLOCKS, HIT_BLOCKS))
    paced = _passes(layout, transport, rate, HIT_BLOCKS)
    copy, pull, put = (
        _cost(few[way], free[way], paced[way], layout.layers, Lane(rate)) for way in ("copy", "pull", "put")
    )
    return copy, TransportCost(pull=pull, put=put)


def _cost(few: Pass, free: Pass, paced: Pass, operations: int, lane: Lane) -> MoveCost:
    """A line through few and many bytes; what pacing adds. CPU time, spread over as many cores as were busy."""
    threads = min(2.0, max(0.1, free.cpu_ns / free.wall_ns))
    byte_ns = max(0.0, (free.cpu_ns - few.cpu_ns) / (free.n_bytes - few.n_bytes))
    operation_ns = max(0.0, few.cpu_ns - few.n_bytes * byte_ns) / operations
    chunk_ns = max(0.0, paced.cpu_ns - free.cpu_ns) / (operations * lane.paced_chunks(paced.n_bytes // operations))
    return MoveCost(
        byte_ns=byte_ns / threads, chunk_ns=chunk_ns / threads, operation_ns=operation_ns / threads, threads=threads
    )


def _passes(layout: KVLayout, transport: str, rate: int | None, blocks: int) -> dict[str, Pass]:
    """The best pass of each way, of a prompt of `blocks` hit blocks and a few new tokens."""
    with _pair(layout, transport, rate) as (pool, traffic, channel):
        pages = pool.allocate("prompt", blocks + 1)
        hit_tokens = blocks * BLOCK_TOKENS
        rows = np.zeros((hit_tokens + NEW_TOKENS) * layout.token_bytes, np.uint8)
        hit_rows = rows[: hit_tokens * layout.token_bytes]

        def transfers(side: Side) -> BatchTransfers:
            plan = chunk_plan((Leg(side, 0, blocks),), hit_tokens, hit_tokens, NEW_TOKENS)
            item = ItemTransfers(plan, pages, 0, list(range(blocks + 1)), channel, lambda: False)
            return BatchTransfers(layout, pool, traffic, [item])

        from_pe, from_de = transfers(Side.PE), transfers(Side.DE)
        return {
            "copy": _best(layout, hit_rows.nbytes, lambda layer: from_pe.load_layer(layer, [hit_rows]), rate),
            "pull": _best(layout, hit_rows.nbytes, lambda layer: from_de.load_layer(layer, [hit_rows]), rate),
            "put": _best(layout, rows.nbytes, lambda layer: from_pe.ship_layer(layer, [rows]), rate),
        }


def _best(layout: KVLayout, layer_bytes: int, move: Callable[[int], list[Exception | None]], rate: int | None) -> Pass:
    passes = []
    for _ in range(2 if rate else PASSES):
        wall_ns, cpu_ns = time.perf_counter_ns(), time.process_time_ns()
        for layer in range(layout.layers):
            for error in move(layer):
                if error is not None:
                    raise error
        wall_ns, cpu_ns = time.perf_counter_ns() - wall_ns, time.process_time_ns() - cpu_ns
        passes.append(Pass(layer_bytes * layout.layers, wall_ns, cpu_ns))
    return min(passes, key=lambda one: one.cpu_ns if rate else one.wall_ns)


@contextmanager
def _pair(layout: KVLayout, transport: str, rate: int | None) -> Iterator[tuple[BufferPool, TrafficManager, Channel]]:
    """A PE's buffer and NICs, and a channel to a DE with buffer and NICs of its own."""
    name = f"calibrate-{os.getpid()}"
    here, there = (TrafficManager(cnic_bytes_per_s=rate) for _ in range(2))
    with (
        BufferPool.create(f"{name}-pe", layout.full_block_bytes, HIT_BLOCKS + 1) as pool,
        BufferPool.create(f"{name}-de", layout.full_block_bytes, HIT_BLOCKS + 1) as remote,
        tempfile.TemporaryDirectory() as folder,
    ):
        address = f"shm:{folder}/de.sock" if transport == "shm" else "tcp://127.0.0.1:0"
        server = ChannelServer(remote, there, address)
        try:
            channel = connect(
                server.address, local_traffic=here, traffic_class=TrafficClass.LOW, peer_tag="calibration"
            )
            try:
                yield pool, here, channel
            finally:
                channel.close()
        finally:
            server.close()
