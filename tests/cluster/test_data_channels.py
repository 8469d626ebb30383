"""Connections to decode engines over a transport that hangs, or that makes mistakes."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from dualpath.cluster.agent import data_channels
from dualpath.cluster.agent.data_channels import CONNECT_THREADS, MOST_HUNG, DataChannels
from dualpath.transfer.guarded_transport import GuardedTransport
from dualpath.transfer.transport import TransferCause, TransferError


class Channel:
    """Moves nothing."""

    def __init__(self) -> None:
        self.is_open = True
        self.closed = threading.Event()

    def read(self, remote: Any, local: Any, deadline_ns: int) -> None: ...

    def write(self, remote: Any, local: Any, deadline_ns: int) -> None: ...

    def close(self) -> None:
        self.is_open = False
        self.closed.set()


class Hanging:
    """A transport whose `connect` hangs until it is let go."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.connecting = threading.Semaphore(0)
        self.channels: list[Channel] = []

    def serve(self, *_: Any, **__: Any) -> None: ...

    def sweep(self) -> None: ...

    def connect(self, *_: Any, **__: Any) -> Channel:
        self.connecting.release()
        self.go_on.wait()
        self.channels.append(Channel())
        return self.channels[-1]


def with_channels(transport: Any, work: Callable[[DataChannels], Awaitable[None]]) -> None:
    config = SimpleNamespace(cluster=SimpleNamespace(secret=SimpleNamespace(data_key=b"")))
    link = SimpleNamespace(tag=str, engine=1)
    host: Any = SimpleNamespace(transport=GuardedTransport("odd", transport), traffic=None, link=link, config=config)

    async def run() -> None:
        channels = DataChannels(host)
        try:
            await work(channels)
        finally:
            await asyncio.to_thread(channels.close)

    asyncio.run(run())


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_channels, "CONNECT_TIMEOUT_S", 0.05)
    monkeypatch.setattr(data_channels, "LATE_S", 0.05)


@pytest.mark.usefixtures("hasty")
def test_a_connect_that_hangs_is_an_error_and_its_late_channel_is_closed() -> None:
    transport = Hanging()

    async def work(channels: DataChannels) -> None:
        error = await channels.open("odd:1")
        assert isinstance(error, TransferError)
        assert error.cause is TransferCause.PEER_CLOSED
        said = "transport 'odd': its connect hangs (no answer by the deadline; it was given 0.05 s); see docs/how-to/"
        assert said in str(error)
        assert channels.get("odd:1") is None
        transport.go_on.set()
        assert await channels.open("odd:1") is None, "it answers again"
        (late, new) = transport.channels
        assert await asyncio.to_thread(late.closed.wait, 10.0)
        assert channels.get("odd:1") is new

    with_channels(transport, work)
    assert all(channel.closed.is_set() for channel in transport.channels)


@pytest.mark.usefixtures("hasty")
def test_as_many_threads_hang_as_may_and_then_it_is_told_at_once() -> None:
    transport = Hanging()

    async def work(channels: DataChannels) -> None:
        most = CONNECT_THREADS + MOST_HUNG
        for address in range(most + 3):
            assert "its connect hangs" in str(await channels.open(f"odd:{address}"))
        taken = 0
        while transport.connecting.acquire(blocking=False):
            taken += 1
        assert taken == most
        transport.go_on.set()

    with_channels(transport, work)


def test_what_comes_after_the_end_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_channels, "CONNECT_TIMEOUT_S", 0.05)  # LATE_S is long: nobody gives it up
    transport = Hanging()

    async def work(channels: DataChannels) -> None:
        opening = asyncio.ensure_future(channels.open("odd:1"))
        await asyncio.to_thread(transport.connecting.acquire)
        await asyncio.to_thread(channels.close)
        transport.go_on.set()
        await asyncio.wait([opening])
        (channel,) = transport.channels
        assert await asyncio.to_thread(channel.closed.wait, 10.0)
        opening.exception()

    with_channels(transport, work)


def test_a_connect_that_makes_mistakes_is_an_error() -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such luck")

    async def work(channels: DataChannels) -> None:
        error = await channels.open("odd:1")
        assert "protocol: transport 'odd': its connect raised RuntimeError: no such luck" in str(error)
        assert channels.get("odd:1") is None

    with_channels(SimpleNamespace(connect=fails), work)
