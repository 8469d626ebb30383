"""What is NIXL's alone: agents that are gone, peers and servers that stand still, and a library that is not there."""

import os
import signal
import subprocess
import sys
import threading
import tomllib
from concurrent.futures import wait
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest
from channel_pair import KEY, PAGE_BYTES, SLOW, WAIT_S, WHOLE, deadline_ns, random_bytes, until
from test_conformance import SERVER, WRITER, cause_of, child, works

from dualpath.core.vocabulary import TrafficClass
from dualpath.transfer import TRANSPORTS
from dualpath.transfer.traffic import TrafficManager
from dualpath.transfer.transport import PageRange, TransferCause, TransferError
from dualpath.transfer.transports.framed.frames import FrameKind, ProtocolError, Stream, StreamClosed
from dualpath.transfer.transports.framed.handshake import VERSION, Welcome
from dualpath.transfer.transports.nixl.agent import Agent, Invitation
from dualpath.transfer.transports.nixl.channel import read_invitation

pytestmark = pytest.mark.slow
TRANSPORT_NAMES = ("nixl", "nixl@tcp")


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_connections_leave_no_agent_behind(pair):
    """An agent has sockets, so descriptors tell; the first one loads libraries and keeps some."""
    pair.serve()
    works(pair, pair.connect())
    pair.channels.pop().close()
    until(lambda: pair.server.statistics().connections_open == 0, "the server has let go")
    before, threads = descriptors(), threading.active_count()
    for _ in range(3):
        channel = pair.connect()
        works(pair, channel)
        pending = channel.write([WHOLE], [random_bytes(PAGE_BYTES)], deadline_ns())
        channel.close()
        wait([pending], WAIT_S)
        until(lambda: pair.server.statistics().connections_open == 0, "the server has let go")
    until(
        lambda: (descriptors(), threading.active_count()) == (before, threads), "all descriptors and threads are gone"
    )


def test_on_loopback_ucx_listens_nowhere_else(pair):
    """UCX lets in whoever comes: a cluster of one host must not open ports to others."""
    pair.serve()
    works(pair, pair.connect())
    ports = [one for one in psutil.Process().net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    assert len(ports) > 1, "the server's door, and UCX's"
    assert {one.laddr.ip for one in ports} == {"127.0.0.1"}


@pytest.fixture
def unwelcome(monkeypatch):
    """Peers whose connection ends while they are welcomed."""
    send = Stream.send

    def torn(self, frame, *more):
        if frame.kind is FrameKind.WELCOME:
            raise StreamClosed("it is torn")
        return send(self, frame, *more)

    with monkeypatch.context() as patch:
        patch.setattr(Stream, "send", torn)
        yield


def test_peers_that_leave_while_they_are_welcomed_leave_no_agent(pair, unwelcome):
    pair.serve()

    def knock():
        with pytest.raises(TransferError):
            pair.connect(timeout_s=WAIT_S)
        until(lambda: pair.server.statistics().connections_open == 0, "the connection has ended")

    knock()
    before = descriptors()
    for _ in range(3):
        knock()
    assert descriptors() == before
    pair.server.quiesce("pe0").result(WAIT_S)


def test_a_peer_that_left_early_is_not_quiet_without_proof(pair, unwelcome, monkeypatch):
    monkeypatch.setattr(Agent, "destroy", lambda self: False)
    pair.serve()
    with pytest.raises(TransferError):
        pair.connect()
    until(lambda: pair.server.statistics().connections_open == 0, "the connection has ended")
    assert wait([pair.server.quiesce("pe0")], 0.2).not_done


@pytest.mark.parametrize("choice", ["UCX_TLS=rc", "UCX_TLS=self", "UCX_NET_DEVICES=mlx5_99:1"])
def test_where_ucx_can_t_start_nothing_is_served(choice):
    """Else a cluster would be up whose every prompt fails."""
    variable, value = choice.split("=")
    with pytest.raises(subprocess.CalledProcessError) as ended:
        subprocess.run(
            [sys.executable, "-c", SERVER, "nixl"], env=os.environ | {variable: value}, check=True, capture_output=True
        )
    assert f"OSError: transport nixl can't start here ({choice}): NIXL makes no agent" in ended.value.stderr.decode()


@pytest.mark.parametrize("lie", [{"stride_bytes": 1}, {"stride_bytes": (1 << 62) - 1}])
def test_a_pool_that_can_t_lie_where_the_server_says(lie):
    told = Invitation(b"", pool_at=1 << 40, stride_bytes=4096)
    assert read_invitation(Welcome(VERSION, 4096, 12, msgspec.msgpack.encode(told))) == told
    with pytest.raises(ProtocolError, match="can't lie where it says"):
        read_invitation(Welcome(VERSION, 4096, 12, msgspec.msgpack.encode(msgspec.structs.replace(told, **lie))))


def test_an_agent_that_something_keeps_is_not_proven_gone(transport):
    one = Agent(TrafficClass.LOW, True, np.zeros(4096, np.uint8), 4096)
    kept = one._agent
    assert not one.destroy()
    del kept
    assert Agent(TrafficClass.HIGH, True, np.zeros(4096, np.uint8), 4096).destroy()


def test_a_server_without_that_proof_calls_nobody_quiet(pair, monkeypatch):
    pair.serve()
    channel = pair.connect(peer_tag="pe7")
    works(pair, channel)
    destroy = Agent.destroy
    monkeypatch.setattr(Agent, "destroy", lambda self: destroy(self) and self._peer != "")  # the server's meets nobody
    quiet = pair.server.quiesce("pe7")
    until(lambda: pair.server.statistics().connections_open == 0, "the connection has ended")
    assert not quiet.done()
    pair.server.close()
    assert cause_of(quiet) is TransferCause.PEER_CLOSED


def test_a_peer_that_stands_still_is_not_quiet_until_it_is_dead(pair):
    pair.serve()
    with child(WRITER, "nixl", pair.server.address, str(SLOW), str(PAGE_BYTES)) as writer:
        assert writer.stdout.readline() == "posted\n"
        until(lambda: pair.pool.view(0)[0] == 0x11, "the first chunk has come")
        writer.send_signal(signal.SIGSTOP)
        quiet = pair.server.quiesce("victim")
        assert wait([quiet], 0.3).not_done
        writer.send_signal(signal.SIGKILL)
        quiet.result(WAIT_S)
    works(pair, pair.connect())


def test_a_server_sleeps_when_its_peer_has_nothing_in_flight(pair):
    """Small writes are often over before the poller has looked."""
    pair.serve()
    channel = pair.connect()
    (connection,) = pair.server._connections.values()
    for size in (1, 1, 4096, PAGE_BYTES):
        for _ in range(5):
            out = random_bytes(size)
            channel.write([PageRange(0, 0, size)], [out], deadline_ns()).result(WAIT_S)
            until(lambda: not connection._busy.is_set(), "the server need not drive its agent")


def test_a_deadline_holds_though_the_server_stands_still(transport):
    """The chunk in its slot can't be stopped; the caller's memory is the caller's at once."""
    with child(SERVER, "nixl") as server:
        address = server.stdout.readline().strip()
        channel = TRANSPORTS.get("nixl").connect(
            address, TrafficManager(), traffic_class=TrafficClass.LOW, peer_tag="pe0", key=KEY
        )
        memory = np.zeros(8 << 20, np.uint8)
        whole = [PageRange(0, 0, memory.size)]
        assert channel.read(whole, [memory], deadline_ns()).result(WAIT_S) == memory.size
        server.send_signal(signal.SIGSTOP)
        memory[:] = 0
        if os.environ.get("UCX_TLS") == "tcp":
            assert cause_of(channel.read(whole, [memory], deadline_ns(0.2))) is TransferCause.DEADLINE
            assert not memory.any()
        else:  # the kernel copies out of a process that stands still
            assert channel.read(whole, [memory], deadline_ns()).result(WAIT_S) == memory.size
        server.send_signal(signal.SIGCONT)
        memory[:] = 0
        assert channel.read(whole, [memory], deadline_ns()).result(WAIT_S) == memory.size
        assert (memory == 0x11).all()
        channel.close()


def test_without_the_library_the_name_says_which_extra_is_missing(monkeypatch):
    monkeypatch.setattr("dualpath.transfer.transports.nixl.agent.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError) as missing:
        TRANSPORTS.get("nixl")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (brings,) = project["optional-dependencies"]["nixl"]
    assert brings.startswith(missing.value.name.replace("_", "-"))
