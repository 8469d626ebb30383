"""The socket at which engines arrive stays, whichever coordinator listens there."""

import asyncio
import socket
import stat
from pathlib import Path

import pytest
import zmq.asyncio

from dualpath.cluster import messages as m
from dualpath.cluster.cluster_secret import ClusterSecret
from dualpath.cluster.control_address import address_to_join, control_listener, control_place
from dualpath.cluster.coordinator.links import EngineLinks
from dualpath.cluster.curve import secure_client


async def say_again(member: zmq.asyncio.Socket) -> None:
    while True:
        await member.send(m.encoder.encode(m.Leave("bye")))
        await asyncio.sleep(0.1)


def test_one_coordinator_after_another_listens_at_the_same_address() -> None:
    async def run() -> None:
        address, held = control_listener("tcp://127.0.0.1:0")
        assert not address.endswith(":0")
        context = zmq.asyncio.Context()
        member, secret = context.socket(zmq.DEALER), ClusterSecret.random()
        secure_client(member, secret)
        member.connect(address)
        try:
            for _ in range(2):
                links = EngineLinks(secret)
                assert links.bind(address, held.dup()) == address
                saying = asyncio.create_task(say_again(member))  # one that was sent to the former may be lost
                _, heard = await asyncio.wait_for(anext(links.messages()), 20.0)
                assert heard == m.Leave("bye")
                saying.cancel()
                links.close()
                await asyncio.sleep(0.05)  # the authenticator's task ends a turn of the loop later
                with socket.socket() as other, pytest.raises(OSError):
                    other.bind(held.getsockname())  # nobody else gets it meanwhile
        finally:
            member.close(0)
            context.term()
            held.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("tcp://10.0.0.1:5555", ("10.0.0.1", 5555)),
        ("tcp://*:65535", ("0.0.0.0", 65535)),
        ("tcp://[::1]:0", ("::1", 0)),
        ("ipc:///run/join", Path("/run/join")),
    ],
)
def test_addresses(address: str, place: object) -> None:
    assert control_place(address) == place


@pytest.mark.parametrize(
    "address",
    [
        *("nonsense", "", "5555", "tcp://127.0.0.1", "tcp://127.0.0.1:65536", "tcp://127.0.0.1:99999", "tcp://:5"),
        *("tcp://a:-1", "ipc://", "ipc://join", "ipc://@join", "ipc://*", "inproc://x", "http://10.0.0.1:5555"),
    ],
)
def test_what_is_no_address_is_refused_and_nobody_listens_elsewhere(address: str) -> None:
    with pytest.raises(ValueError, match="is not an address; give one such as"):
        control_place(address)
    with pytest.raises(OSError, match="can't listen for engines at"):
        control_listener(address)


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:5555", "tcp://*:5555", "tcp://[::]:5555", "tcp://10.0.0.1:0"])
def test_where_to_listen_is_not_where_to_join(address: str) -> None:
    with pytest.raises(ValueError, match="is where to listen"):
        address_to_join(address)


def test_a_unix_socket_is_its_users_alone_and_goes_at_the_end(tmp_path: Path) -> None:
    """One that a killed coordinator has left is replaced; one that somebody listens at, or another file, is not."""

    async def run() -> None:
        path = tmp_path / "join"
        with socket.socket(socket.AF_UNIX) as killed:
            killed.bind(str(path))
        secret = ClusterSecret.random()
        links, second = EngineLinks(secret), EngineLinks(secret)
        assert links.bind(f"ipc://{path}") == f"ipc://{path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(OSError, match="in use"):
            second.bind(f"ipc://{path}")
        second.close()
        context = zmq.asyncio.Context()
        member = context.socket(zmq.DEALER)
        secure_client(member, secret)
        member.connect(f"ipc://{path}")
        await member.send(m.encoder.encode(m.Leave("bye")))
        _, heard = await asyncio.wait_for(anext(links.messages()), 20.0)
        assert heard == m.Leave("bye")
        member.close(0)
        context.term()
        links.close()
        assert not path.exists()
        path.write_text("not a socket")
        with pytest.raises(OSError, match="in use"):
            control_listener(f"ipc://{path}")
        assert path.read_text() == "not a socket"

    asyncio.run(run())


def test_an_address_that_is_taken_or_not_here_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(OSError, match=f"can't listen for engines at '{address}'"):
            control_listener(address)
    with pytest.raises(OSError, match=r"can't listen for engines at 'tcp://no\.such\.host\.invalid:1'"):
        control_listener("tcp://no.such.host.invalid:1")
