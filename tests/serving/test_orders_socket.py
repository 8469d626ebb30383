"""The socket at which a running server takes orders: of its own user, one a connection, whatever is sent."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable

import pytest

from dualpath.cluster.parts import ReplaceError
from dualpath.serving.orders_socket import FAILED, OrdersSocket, give_order

AS_NOBODY = """
import contextlib, os, socket, sys
os.setuid(65534)
connection = socket.socket(socket.AF_UNIX)
connection.connect(chr(0) + sys.argv[1])
with contextlib.suppress(BrokenPipeError):  # it may have been refused before it has said a word
    connection.sendall(b"works")
print(connection.recv(1000).decode())
"""


def with_socket(work: Callable[[OrdersSocket, list[str]], Awaitable[None]]) -> None:
    obeyed: list[str] = []

    async def works(say: Callable[[str], None]) -> None:
        say("one")
        say("two")
        obeyed.append("works")

    async def fails(_say: Callable[[str], None]) -> None:
        raise ReplaceError("decode-0 stays")

    async def run() -> None:
        orders = OrdersSocket({"works": works, "fails": fails})
        await orders.open()
        try:
            await work(orders, obeyed)
        finally:
            orders.close()

    asyncio.run(run())


def test_an_order_is_obeyed_and_its_steps_are_heard() -> None:
    async def work(orders: OrdersSocket, obeyed: list[str]) -> None:
        heard: list[str] = []
        assert await asyncio.to_thread(give_order, orders.name, "works", heard.append) == ""
        assert (heard, obeyed) == (["one", "two"], ["works"])
        assert await asyncio.to_thread(give_order, orders.name, "fails", heard.append) == "decode-0 stays"
        assert "no order 'dance'" in await asyncio.to_thread(give_order, orders.name, "dance", heard.append)

    with_socket(work)


@pytest.mark.parametrize("sent", [b"", b"\xff\xfe\n", b"x" * 10_000 + b"\n", b"works"])
def test_what_is_no_order_is_none(sent: bytes) -> None:
    async def work(orders: OrdersSocket, obeyed: list[str]) -> None:
        reader, writer = await asyncio.open_unix_connection(f"\0{orders.name}")
        writer.write(sent)
        writer.write_eof()
        answer = await asyncio.wait_for(reader.read(), 10.0)
        writer.close()
        assert obeyed == (["works"] if sent == b"works" else [])
        assert answer.startswith(FAILED.encode()) or not answer or sent == b"works"
        assert await asyncio.to_thread(give_order, orders.name, "works", obeyed.append) == ""

    with_socket(work)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
def test_another_user_is_refused() -> None:
    async def work(orders: OrdersSocket, obeyed: list[str]) -> None:
        ran = await asyncio.to_thread(
            subprocess.run, [sys.executable, "-c", AS_NOBODY, orders.name], capture_output=True, text=True, timeout=30
        )
        assert "only the user who runs it" in ran.stdout
        assert obeyed == []

    with_socket(work)
