"""The socket at which engines arrive stays, whichever coordinator listens there."""

import asyncio
import socket

import pytest
import zmq.asyncio

from dualpath.cluster import messages as m
from dualpath.cluster.cluster_secret import ClusterSecret
from dualpath.cluster.coordinator.links import EngineLinks
from dualpath.cluster.curve import secure_client
from dualpath.serving.control_listener import control_listener


async def say_again(member: zmq.asyncio.Socket) -> None:
    while True:
        await member.send(m.encoder.encode(m.Leave("bye")))
        await asyncio.sleep(0.1)


def test_one_coordinator_after_another_listens_at_the_same_address() -> None:
    async def run() -> None:
        address, held = control_listener("tcp://127.0.0.1:0")
        assert held is not None and not address.endswith(":0")
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


def test_an_address_without_a_port_is_left_to_the_coordinator() -> None:
    assert control_listener("ipc:///tmp/x") == ("ipc:///tmp/x", None)
    assert control_listener("nonsense") == ("nonsense", None)


def test_an_address_that_is_taken_or_not_here_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(OSError, match=f"can't listen for engines at '{address}'"):
            control_listener(address)
    with pytest.raises(OSError, match=r"can't listen for engines at 'tcp://no\.such\.host\.invalid:1'"):
        control_listener("tcp://no.such.host.invalid:1")
