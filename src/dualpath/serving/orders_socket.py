"""Where a running `dualpath serve` takes orders of its own user: a Unix socket without a file, told in the ready file.

An abstract socket leaves nothing behind when its process is killed, and has no permissions; so the caller's user is
asked of the kernel.
"""

import asyncio
import os
import secrets
import socket
from collections.abc import Awaitable, Callable

from dualpath.cluster.parts import ReplaceError
from dualpath.spec.private_files import peer_user

RESTART = "restart"
DONE = "done"
FAILED = "failed: "
_LINE_BYTES = 256
_FIRST_LINE_S = 5.0

Order = Callable[[Callable[[str], None]], Awaitable[None]]
"""Carries an order out, and says lines meanwhile. Raises ReplaceError that says why it failed."""


class OrdersSocket:
    """Listens; each connection gives one order by its name, and hears lines until `DONE` or `FAILED`."""

    def __init__(self, orders: dict[str, Order]) -> None:
        self.name = f"dualpath-{os.getpid()}-{secrets.token_hex(8)}"
        self._orders = orders
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, f"\0{self.name}", limit=_LINE_BYTES)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def say(line: str) -> None:
            if not writer.is_closing():
                writer.write(f"{line}\n".encode())

        try:
            if not _is_ours(writer.get_extra_info("socket")):
                say(f"{FAILED}only the user who runs it may give orders")
                return
            async with asyncio.timeout(_FIRST_LINE_S):
                asked = (await reader.readline()).decode(errors="replace").strip()
            if asked not in self._orders:
                say(f"{FAILED}there is no order {asked!r}")
                return
            await self._orders[asked](say)
            say(DONE)
        except ReplaceError as error:
            say(f"{FAILED}{error}")
        except (OSError, TimeoutError, ValueError):
            pass  # a caller that says nothing, or too much, or is gone
        finally:
            writer.close()


def _is_ours(connection: socket.socket) -> bool:
    return peer_user(connection) in (os.getuid(), 0)


def give_order(name: str, order: str, say: Callable[[str], None]) -> str:
    """Give an order and wait for its end. Returns why it failed, empty when it is done. Raises OSError."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(f"\0{name}")
        connection.sendall(f"{order}\n".encode())
        with connection.makefile(encoding="utf-8") as lines:
            for line in map(str.rstrip, lines):
                if line == DONE:
                    return ""
                if line.startswith(FAILED):
                    return line.removeprefix(FAILED)
                say(line)
    return "the server has ended meanwhile"
