"""An engine's side and its peer's, over a transport found by name."""

import time
import uuid

import numpy as np

from dualpath.core.vocabulary import TrafficClass
from dualpath.transfer import TRANSPORTS
from dualpath.transfer.pool import BufferPool
from dualpath.transfer.traffic import TrafficManager
from dualpath.transfer.transport import PageRange, Server
from dualpath.transfer.transports.framed import FramedServer

PAGE_BYTES = 300_000
PAGES = 12
WAIT_S = 30
SLOW = 1_000_000
"""Bytes per second: a page takes a third of a second."""
KEY = bytes(range(32))
WHOLE = PageRange(0, 0, PAGE_BYTES)


def deadline_ns(seconds: float = 30.0) -> int:
    return time.monotonic_ns() + int(seconds * 1e9)


def until(condition, what: str) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError(f"still not: {what}")


def random_bytes(n_bytes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, n_bytes, dtype=np.uint8)


class Pair:
    """A server with its pool, and what is needed to connect to it; closes what it made."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.transport = TRANSPORTS.get(kind)
        self.name = f"test-{uuid.uuid4().hex[:12]}"
        self.pool = BufferPool.create(self.name, PAGE_BYTES, PAGES)
        self.server_traffic = TrafficManager()
        self.traffic = TrafficManager()
        self.server: Server | None = None
        self.channels = []

    def serve(self, address: str | None = None, **rates) -> Server:
        """An address is only for the transports that say frames."""
        if rates:
            self.server_traffic = TrafficManager(**rates)
        if address is None:
            self.server = self.transport.serve(
                self.pool, self.server_traffic, host="127.0.0.1", name=self.name, key=KEY
            )
        else:
            self.server = FramedServer(self.transport, self.pool, self.server_traffic, address, KEY)
        return self.server

    def connect(
        self, traffic_class: TrafficClass = TrafficClass.LOW, peer_tag: str = "pe0", key: bytes = KEY, **options
    ):
        channel = self.transport.connect(
            self.server.address, self.traffic, traffic_class=traffic_class, peer_tag=peer_tag, key=key, **options
        )
        self.channels.append(channel)
        return channel

    def close(self) -> None:
        for channel in self.channels:
            channel.close()
        if self.server is not None:
            self.server.close()
        self.pool.close()
