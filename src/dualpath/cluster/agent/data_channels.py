"""A prefill engine's connections to decode engines' buffers: one each, opened and closed off the main thread.

Connecting to a decode engine that hangs takes the whole time-out. Connections are therefore made on separate threads,
when an engine joins or before a prompt joins a batch. The compute thread only gets channels that are open.
"""

import asyncio
from functools import partial

from dualpath.cluster.agent.host import EngineHost
from dualpath.cluster.deadline_threads import AbandonedError, Call, DeadlineThreads, LateError
from dualpath.core.vocabulary import TrafficClass
from dualpath.thread_names import named_threads
from dualpath.transfer.transport import Channel, TransferCause, TransferError

CONNECT_THREADS = 4
MOST_HUNG = 4
"""Threads in which a transport's `connect` hangs that are replaced."""
CONNECT_TIMEOUT_S = 5.0
LATE_S = 1.0
"""A transport may see its time-out so much late; from then on its `connect` counts as hung."""


class DataChannels:
    """Open channels by address. `get` may be called from any thread, the rest from the main thread."""

    def __init__(self, host: EngineHost) -> None:
        self._host = host
        self._channels: dict[str, Channel] = {}
        self._opening: dict[str, asyncio.Future[None]] = {}
        self._closed = False
        deadline_s = CONNECT_TIMEOUT_S + LATE_S
        self._threads = DeadlineThreads(CONNECT_THREADS, "connect", deadline_s, most_hung=MOST_HUNG)
        self._closing = named_threads(CONNECT_THREADS, "disconnect")

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
            opening = self._threads.submit(partial(self._connect, address)).future
            self._opening[address] = opening
            opening.add_done_callback(partial(self._opened, address))
        try:
            await asyncio.shield(opening)
        except (TransferError, ValueError) as error:
            return error
        except LateError as error:
            what = f"hangs ({error}; it was given {CONNECT_TIMEOUT_S:g} s)"
            return TransferError(TransferCause.PEER_CLOSED, self._host.transport.complaint("connect", what))
        return None

    def _opened(self, address: str, opened: "asyncio.Future[None]") -> None:
        """Runs before the callers of `open` continue."""
        del self._opening[address]
        opened.exception()  # mark it as seen: the callers may have been cancelled

    async def drop(self, address: str) -> None:
        """Close the channel to a lost engine, also one that is still being opened."""
        if address in self._opening:
            await asyncio.wait([self._opening[address]])
        channel = self._channels.pop(address, None)
        if channel is not None:
            await asyncio.get_running_loop().run_in_executor(self._closing, channel.close)

    async def drop_all(self) -> None:
        """Close every channel, also one that is still being opened: the next ones are of another epoch."""
        await asyncio.gather(*(self.drop(address) for address in [*self._opening, *self._channels]))

    def close(self) -> None:
        """Close every channel; their transfers in progress end. One that is still being opened is closed once it is."""
        self._threads.close(CONNECT_TIMEOUT_S)
        self._closed = True
        for channel in self._channels.values():
            channel.close()
        self._closing.shutdown(wait=True, cancel_futures=True)

    def _connect(self, address: str, call: Call[None]) -> None:
        """On a thread of its own."""
        channel = self._host.transport.connect(
            address,
            self._host.traffic,
            traffic_class=TrafficClass.LOW,
            peer_tag=self._host.link.tag(self._host.link.engine),
            key=self._host.config.cluster.secret.data_key,
            timeout_s=CONNECT_TIMEOUT_S,
        )
        try:
            call.hand_over(lambda: self._keep(address, channel))
        except AbandonedError:
            channel.close()
            raise

    def _keep(self, address: str, channel: Channel) -> None:
        if self._closed:
            raise AbandonedError
        self._channels[address] = channel
