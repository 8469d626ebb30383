"""A prefill engine's connections to decode engines' buffers: one each, opened and closed off the main thread.

Connecting to a decode engine that hangs takes the whole time-out. Connections are therefore made on separate threads,
when an engine joins or before a prompt joins a batch. The compute thread only gets channels that are open.
"""

import asyncio

from dualpath.cluster.agent.host import EngineHost
from dualpath.core.vocabulary import TrafficClass
from dualpath.thread_names import named_threads
from dualpath.transfer.transport import Channel, TransferError

CONNECT_THREADS = 4
CONNECT_TIMEOUT_S = 5.0


class DataChannels:
    """Open channels by address. `get` may be called from any thread, the rest from the main thread."""

    def __init__(self, host: EngineHost) -> None:
        self._host = host
        self._channels: dict[str, Channel] = {}
        self._opening: dict[str, asyncio.Future[Channel]] = {}
        self._threads = named_threads(CONNECT_THREADS, "connect")

    def get(self, address: str) -> Channel | None:
        """Returns the open channel to an address; None when there is none."""
        channel = self._channels.get(address)
        return channel if channel is not None and channel.is_open else None

    async def open(self, address: str) -> Exception | None:
        """Open a channel unless one is open. Returns the error if that fails. Concurrent calls share one attempt."""
        if self.get(address) is not None:
            return None
        opening = self._opening.get(address)
        if opening is None:
            opening = asyncio.get_running_loop().run_in_executor(self._threads, self._connect, address)
            self._opening[address] = opening
            opening.add_done_callback(lambda opened: self._opened(address, opened))
        try:
            await asyncio.shield(opening)
        except (TransferError, ValueError) as error:
            return error
        return None

    def _opened(self, address: str, opened: "asyncio.Future[Channel]") -> None:
        """Store the new channel; runs before the callers of `open` continue."""
        del self._opening[address]
        if not opened.cancelled() and opened.exception() is None:
            self._channels[address] = opened.result()

    async def drop(self, address: str) -> None:
        """Close the channel to a lost engine, also one that is still being opened."""
        if address in self._opening:
            await asyncio.wait([self._opening[address]])
        channel = self._channels.pop(address, None)
        if channel is not None:
            await asyncio.get_running_loop().run_in_executor(self._threads, channel.close)

    async def drop_all(self) -> None:
        """Close every channel, also one that is still being opened: the next ones are of another epoch."""
        await asyncio.gather(*(self.drop(address) for address in [*self._opening, *self._channels]))

    def close(self) -> None:
        """Close every channel; their transfers in progress end."""
        for channel in self._channels.values():
            channel.close()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _connect(self, address: str) -> Channel:
        return self._host.transport.connect(
            address,
            self._host.traffic,
            traffic_class=TrafficClass.LOW,
            peer_tag=self._host.link.tag(self._host.link.engine),
            key=self._host.config.cluster.secret.data_key,
            timeout_s=CONNECT_TIMEOUT_S,
        )
