"""TLS at the server's port: who shakes hands, and how many may at a time.

asyncio gives a connection a buffer of a quarter of a MiB as soon as it has been made, and a minute to shake hands, so
a thousand that say nothing would cost 300 MiB. Here handshakes have a few seconds and a bound. Clients that come
meanwhile wait in the kernel's queue.
"""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable

MAX_HANDSHAKES = 256
HANDSHAKE_S = 5.0
_PATIENCE_S = 1.0
"""When there is no room, and for so long not one handshake has ended, all who are there have to go."""


class TlsDoor:
    """Listens; makes a protocol for each connection once TLS is there. uvicorn closes it as one of its servers."""

    def __init__(self, listener: socket.socket, context: ssl.SSLContext, make: Callable[[], asyncio.Protocol]) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._context = context
        self._make = make
        self._handshakes: set[asyncio.Task[None]] = set()
        self._accepting = asyncio.create_task(self._accept())

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._room()
            try:
                connected, _ = await loop.sock_accept(self._listener)
            except OSError:  # no descriptor is left, or the client is gone already
                await asyncio.sleep(0.05)
                continue
            handshake = loop.create_task(self._shake_hands(connected))
            self._handshakes.add(handshake)
            handshake.add_done_callback(self._handshakes.discard)

    async def _room(self) -> None:
        while len(self._handshakes) >= MAX_HANDSHAKES:
            ended, strangers = await asyncio.wait(
                self._handshakes, timeout=_PATIENCE_S, return_when=asyncio.FIRST_COMPLETED
            )
            if not ended:
                await _cancelled(strangers)

    async def _shake_hands(self, connected: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError, asyncio.CancelledError):  # no TLS, no certificate, or too slow: it is closed
            await loop.connect_accepted_socket(
                self._make, connected, ssl=self._context, ssl_handshake_timeout=HANDSHAKE_S
            )

    def close(self) -> None:
        """Take no more connections; those that have shaken hands go on."""
        self._accepting.cancel()

    async def wait_closed(self) -> None:
        await _cancelled({self._accepting, *self._handshakes})


async def _cancelled(tasks: set[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
