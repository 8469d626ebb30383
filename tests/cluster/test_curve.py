"""The control port: who knows the cluster's secret is heard, nobody else is, and nobody else does any harm."""

import asyncio
import contextlib
import socket
import struct
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from dualpath.cluster import messages as m
from dualpath.cluster.cluster_secret import ClusterSecret
from dualpath.cluster.curve import secure_client
from dualpath.core.vocabulary import Role
from dualpath.spec.log import Seldom

from .fake_engine import SECRET, Head, head, join_message

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00"
"""Of ZMTP 3.0; the mechanism follows."""


def strangers(context: zmq.asyncio.Context, address: str) -> list[zmq.asyncio.Socket]:
    """Sockets that speak ZeroMQ without the secret: in the clear, with another secret, with a key of their own."""
    plain, other, half = (context.socket(zmq.DEALER) for _ in range(3))
    secure_client(other, ClusterSecret.random())
    secure_client(half, SECRET)
    public, private = zmq.curve_keypair()  # it knows the server's key, but is not a member
    half.setsockopt(zmq.CURVE_PUBLICKEY, public)
    half.setsockopt(zmq.CURVE_SECRETKEY, private)
    for one in (plain, other, half):
        one.setsockopt(zmq.LINGER, 0)
        one.connect(address)
    return [plain, other, half]


def test_without_the_secret_no_engine_joins_and_no_message_is_believed(tmp_path: Path) -> None:
    async def work(cluster: Head) -> None:
        context = zmq.asyncio.Context()
        for i, one in enumerate(strangers(context, cluster.coordinator.control_address), 1):
            with contextlib.suppress(zmq.Again):  # it may have been told already
                await one.send(m.encoder.encode(join_message(Role.PREFILL)), flags=zmq.NOBLOCK)
                await one.send_multipart([b"three", b"frames", b"and more"], flags=zmq.NOBLOCK)
            async with asyncio.timeout(10):
                while cluster.coordinator.gauges()["dualpath_control_refused_total"] < i:
                    await asyncio.sleep(0.01)
            with pytest.raises(zmq.Again):
                await one.recv(flags=zmq.NOBLOCK)  # no refusal either, which would tell the cluster's layout
            one.close()
        gauges = cluster.coordinator.gauges()
        assert gauges["dualpath_malformed_messages_total"] == gauges["dualpath_strange_messages_total"] == 0
        assert cluster.coordinator.health()["engines"] == []
        context.term()
        await cluster.new(Role.PREFILL).join()

    asyncio.run(_with_head(tmp_path, work))


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n" * 4,
        bytes(64),
        b"\xff" * 200,
        GREETING + b"NULL" + bytes(48),
        GREETING + b"PLAIN" + bytes(47),
        GREETING + b"CURVE" + bytes(47) + b"\x04\xc8\x05HELLO" + bytes(194),
        GREETING + b"CURVE" + bytes(47) + b"\x06" + struct.pack(">Q", 1 << 62) + b"\x05HELLO",
        b"\x01\x00\x05hello" * 20,
    ],
)
def test_what_is_no_member_is_cut_off_and_counted(tmp_path: Path, said: bytes) -> None:
    async def work(cluster: Head) -> None:
        await cluster.new(Role.PREFILL).join()
        host, _, port = cluster.coordinator.control_address.removeprefix("tcp://").rpartition(":")
        with socket.create_connection((host, int(port))) as stranger:
            stranger.sendall(said)
            await cluster.becomes("dualpath_control_refused_total", 1)
        await cluster.new(Role.DECODE).join()

    asyncio.run(_with_head(tmp_path, work))


def test_refused_connections_are_told_once_a_minute(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def work(cluster: Head) -> None:
        await cluster.new(Role.PREFILL).join()
        for i in range(20):
            with _stranger(cluster) as one:
                one.sendall(bytes(64))
                await cluster.becomes("dualpath_control_refused_total", i + 1)
        (line,) = [line for line in caplog.messages if "refused so far" in line]
        assert line.startswith(f"{cluster.coordinator.control_address}: 1 connections refused so far")

    asyncio.run(_with_head(tmp_path, work))


def test_a_refused_connection_is_told_with_its_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Seldom, "EVERY_S", 0.0)

    async def work(cluster: Head) -> None:
        with _stranger(cluster, "127.0.0.9") as early, _stranger(cluster) as late:
            late.sendall(bytes(64))
            await cluster.becomes("dualpath_control_refused_total", 1)  # so the door has seen the early one come
            early.sendall(bytes(64))
            await cluster.becomes("dualpath_control_refused_total", 2)
        assert "2 connections refused so far, the last from 127.0.0.9" in caplog.messages[-1]

    asyncio.run(_with_head(tmp_path, work))


def _stranger(cluster: Head, at: str = "127.0.0.1") -> socket.socket:
    host, _, port = cluster.coordinator.control_address.removeprefix("tcp://").rpartition(":")
    return socket.create_connection((host, int(port)), source_address=(at, 0))


async def _with_head(store: Path, work) -> None:  # type: ignore[no-untyped-def]
    async with head(store) as cluster:
        await work(cluster)
