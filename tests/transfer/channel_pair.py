"""An engine's side and its peer's, over either kind of channel."""

import time
import uuid

from dualpath.core.vocabulary import TrafficClass
from dualpath.transfer import BufferPool, ChannelServer, TrafficManager, connect

PAGE_BYTES = 300_000
PAGES = 12


def deadline_ns(seconds: float = 30.0) -> int:
    return time.monotonic_ns() + int(seconds * 1e9)


class Pair:
    """A server with its pool, and what is needed to connect to it; closes what it made."""

    def __init__(self, kind: str, directory) -> None:
        self.kind = kind
        self.directory = directory
        self.pool = BufferPool.create(f"test-{uuid.uuid4().hex[:12]}", PAGE_BYTES, PAGES)
        self.server_traffic = TrafficManager()
        self.traffic = TrafficManager()
        self.server: ChannelServer | None = None
        self.channels = []

    def serve(self, address: str | None = None, **rates) -> ChannelServer:
        if rates:
            self.server_traffic = TrafficManager(**rates)
        address = address or {"shm": f"shm:{self.directory}/channel.sock", "tcp": "tcp://127.0.0.1:0"}[self.kind]
        self.server = ChannelServer(self.pool, self.server_traffic, address)
        return self.server

    def connect(self, traffic_class: TrafficClass = TrafficClass.LOW, peer_tag: str = "pe0", **options):
        channel = connect(
            self.server.address,
            local_traffic=options.pop("local_traffic", self.traffic),
            traffic_class=traffic_class,
            peer_tag=peer_tag,
            **options,
        )
        self.channels.append(channel)
        return channel

    def close(self) -> None:
        for channel in self.channels:
            channel.close()
        if self.server is not None:
            self.server.close()
        self.pool.close()
