"""KV events in vLLM's format: they tell a router which prefixes this cluster's storage holds.

A ZeroMQ PUB socket sends a topic, a sequence number (8 bytes, big-endian), and a batch: msgpack of ``[time, events,
rank]``, where an event is a map with its ``type``. A subscriber that has missed some asks a ROUTER socket for all from
a sequence number on; the last answer has the number -1 and no batch. Both sockets drop what a peer does not take, and
neither ever waits.

What is announced is what storage holds, so the medium is ``STORAGE``: every prefill of this cluster can hit it. Blocks
that were stored before the start, or by a neighbour, are not announced, because nobody here knows their tokens; nor are
those of requests with a ``cache_salt``, whose owners keep to themselves.

Other programs read these sockets, in the clear and without a key. Who may reach them is the operator's to say: unless
an endpoint is given, nobody but this host.
"""

import asyncio
import contextlib
import logging
import time
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from dualpath.cluster.config import KVEventsConfig
from dualpath.cluster.messages import StoredBlock
from dualpath.core.vocabulary import BLOCK_TOKENS
from dualpath.kv import BlockKey, Namespace, PrefixIndex
from dualpath.spec import metrics
from dualpath.spec.metrics import Figures

logger = logging.getLogger(__name__)

LOOPBACK = "tcp://127.0.0.1:5557"
MEDIUM = "STORAGE"
"""vLLM's word for its file-system and object tiers."""
END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)
MAX_EXPECTED_BLOCKS = 65_536
"""Most prompt blocks whose tokens are kept until they are stored; 256 bytes each."""
_REPLAY_BATCHES = 100
"""Batches that are replayed before others get a turn."""


class BlockStored(msgspec.Struct, tag=True):
    """These blocks follow `parent_block_hash` (None: a prompt's start) and hold `token_ids`."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: None = None
    medium: str = MEDIUM
    lora_name: None = None


class BlockRemoved(msgspec.Struct, tag=True):
    """These blocks are in storage no more."""

    block_hashes: list[int]
    medium: str = MEDIUM


class AllBlocksCleared(msgspec.Struct, tag=True):
    """Nothing that was announced is matched any more."""


KVEvent = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(msgspec.Struct, array_like=True):
    ts: float
    events: list[KVEvent]
    data_parallel_rank: int = 0


class KVEvents:
    """Announces to subscribers, or to nobody when there is no configuration. Used from one asyncio thread."""

    def __init__(self, config: KVEventsConfig | None) -> None:
        """Raises OSError when it can't listen at an address."""
        self.published_events = 0
        self._on = config is not None
        self._expected: OrderedDict[BlockKey, array[int]] = OrderedDict()
        self._encoder = msgspec.msgpack.Encoder()
        self._sequence = 0
        if config is None:
            return
        self._topic = config.topic.encode()
        self._sent: deque[tuple[int, bytes]] = deque(maxlen=config.buffer_steps)
        self._context = zmq.asyncio.Context()
        self._publisher = zmq.Context(self._context).socket(zmq.PUB)
        self._replays = self._context.socket(zmq.ROUTER)
        self._publisher.set_hwm(config.hwm)
        self._replays.set_hwm(config.buffer_steps + 1)  # one whole replay, with its end
        for socket in (self._publisher, self._replays):
            socket.setsockopt(zmq.LINGER, 0)
        _open(self._publisher, config.endpoint or LOOPBACK, listen=config.endpoint is None)
        self._replaying: asyncio.Task[None] | None = None
        if config.replay_endpoint is not None:
            _open(self._replays, config.replay_endpoint, listen=True)
            self._replaying = asyncio.get_running_loop().create_task(self._replay())

    # ── what the prefix index says ──────────────────────────────────────────────────────────────────────────────────

    def expect(self, space: Namespace, keys: Sequence[BlockKey], token_ids: Sequence[int], stored: int) -> None:
        """Keep the tokens of a prompt's blocks that follow the first `stored`, until these blocks are stored."""
        if not self._on or space.salted:
            return
        for i in range(stored, len(keys)):
            self._expected[keys[i]] = array("I", token_ids[i * BLOCK_TOKENS : (i + 1) * BLOCK_TOKENS])
        while len(self._expected) > MAX_EXPECTED_BLOCKS:
            self._expected.popitem(last=False)

    def stored(self, blocks: Iterable[StoredBlock], index: PrefixIndex) -> None:
        """Announce blocks that have entered the index. One whose parent is not in it is a prompt's first."""
        if not self._on:
            return
        events: list[KVEvent] = []
        for block in blocks:
            tokens = self._expected.pop(block.key, None) or block.token_ids
            if tokens and not block.salted:
                parent = block_hash(block.parent) if block.parent in index else None
                events.append(BlockStored([block_hash(block.key)], parent, list(tokens), BLOCK_TOKENS))
        self._send(events)

    def removed(self, keys: Iterable[BlockKey]) -> None:
        hashes = [block_hash(key) for key in keys] if self._on else []
        self._send([BlockRemoved(hashes)] if hashes else [])

    def cleared(self) -> None:
        """Announce that earlier blocks are not matched any more; those still to be stored from before are not told."""
        self._expected.clear()
        self._send([AllBlocksCleared()] if self._on else [])

    def gauges(self) -> Figures:
        return {metrics.KV_EVENTS(): float(self.published_events)}

    # ── the sockets ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _send(self, events: Sequence[KVEvent]) -> None:
        if not events:
            return
        payload = self._encoder.encode(EventBatch(time.time(), list(events)))
        self._publisher.send_multipart([self._topic, self._sequence.to_bytes(8, "big"), payload], zmq.NOBLOCK)
        self._sent.append((self._sequence, payload))
        self._sequence += 1
        self.published_events += len(events)

    async def _replay(self) -> None:
        """Answer requests for what has been missed, one after another."""
        while True:
            frames = await self._replays.recv_multipart()
            if len(frames) != 3 or len(frames[2]) != 8:
                logger.warning("a request for missed KV events is not a sequence number of 8 bytes; it is ignored")
                continue
            client, first = frames[0], int.from_bytes(frames[2], "big")
            missed = [(number, payload) for number, payload in self._sent if number >= first]
            for i, (number, payload) in enumerate(missed):
                await self._answer(client, number.to_bytes(8, "big"), payload)
                if i % _REPLAY_BATCHES == 0:
                    await asyncio.sleep(0)
            await self._answer(client, END_OF_REPLAY, b"")

    async def _answer(self, client: bytes, number: bytes, payload: bytes) -> None:
        with contextlib.suppress(zmq.ZMQError):  # a ROUTER drops what a client does not take
            await self._replays.send_multipart([client, b"", number, payload], flags=zmq.NOBLOCK)

    async def close(self) -> None:
        if not self._on:
            return
        if self._replaying is not None:
            self._replaying.cancel()
            await asyncio.gather(self._replaying, return_exceptions=True)
        self._publisher.close()
        self._replays.close()
        self._context.term()


def block_hash(key: BlockKey) -> int:
    """Returns the number that stands for a block in events: the last 8 bytes of its key, as vLLM shortens its own."""
    return int.from_bytes(key[-8:], "big")


def _open(socket: zmq.Socket[Any], address: str, listen: bool = False) -> None:
    """Listen at an address with a ``*`` or of this host's own kinds; otherwise connect, as vLLM does."""
    listen = listen or "*" in address or "::" in address or address.startswith(("ipc://", "inproc://"))
    try:
        socket.bind(address) if listen else socket.connect(address)
    except zmq.ZMQError as error:
        raise OSError(error.errno, f"--kv-events-config: can't use {address!r}: {error}; try tcp://*:5557") from error
