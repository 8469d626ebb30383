"""Testbeds on a real kernel."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bed import CNIC, SNIC, SUBNET

from dualpath.core.vocabulary import TrafficClass
from dualpath.lab.testbed import iproute, network
from dualpath.lab.testbed.failure import TestbedError
from dualpath.lab.testbed.network import Testbed, down, leftovers, load, set_rates, status, up
from dualpath.lab.testbed.plan import Rates, make_plan

pytestmark = [pytest.mark.privileged, pytest.mark.slow]
SEND = """
import socket, sys, time
target = socket.create_connection((sys.argv[1], 7777))
target.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, int(sys.argv[2]))
end = time.monotonic() + float(sys.argv[3])
while time.monotonic() < end:
    target.send(bytes(1 << 16))
"""
SINK = """
import socket, sys, threading
listener = socket.create_server((sys.argv[1], 7777))
print("listening", flush=True)
def drain(one):
    while one.recv(1 << 18):
        pass
while True:
    threading.Thread(target=drain, args=(listener.accept()[0],), daemon=True).start()
"""


def inside(testbed: Testbed, node: str, *command: str) -> subprocess.Popen:
    namespace = testbed.plan.node(node).namespace
    return subprocess.Popen([*iproute.inside(namespace), *command], stdout=subprocess.PIPE, text=True)


def send(testbed: Testbed, source: str, to: str, tos: int, seconds: float) -> None:
    """As much as goes."""
    sender = inside(testbed, source, sys.executable, "-c", SEND, to, str(tos), str(seconds))
    sender.communicate(timeout=60)
    assert sender.returncode == 0


@pytest.fixture
def sink(testbed: Testbed):
    """de0 takes what it is sent, on both networks."""
    process = inside(testbed, "de0", sys.executable, "-c", SINK, "0.0.0.0")
    assert process.stdout.readline() == "listening\n"
    yield testbed.plan.node("de0")
    process.kill()
    process.communicate()


def sent_by_class(testbed: Testbed, node: str, device: str) -> tuple[int, int]:
    found = next(one for one in status(testbed) if one.name == node)
    nic = next(one for one in found.devices if one.name == device)
    assert nic.sent_high_bytes is not None and nic.sent_low_bytes is not None
    return nic.sent_high_bytes, nic.sent_low_bytes


def test_up_is_found_again_and_down_leaves_nothing(testbed: Testbed) -> None:
    name = testbed.plan.name
    assert load(name) == testbed
    assert len(leftovers(name)) == 7, "five nodes, the switch and the host's link"
    with pytest.raises(TestbedError, match=f"is up, or was left over .*dualpath testbed down --name {name}"):
        up(testbed.plan, testbed.rates)
    assert len(leftovers(name)) == 7, "a refused `up` touches nothing"
    assert len(down(name)) == 7
    assert leftovers(name) == [] and down(name) == []
    with pytest.raises(TestbedError, match="there is no testbed"):
        load(name)


@pytest.mark.parametrize(
    ("source", "over", "rate", "space", "device"),
    [
        ("pe0", "compute", CNIC, "pe0", "cnic0"),
        ("pe0", "storage", SNIC, "pe0", "snic0"),
        ("storage", "storage", SNIC, "switch", "s.de0"),
    ],
)
def test_rates_hold_in_both_directions(
    testbed: Testbed, sink, source: str, over: str, rate: int, space: str, device: str
):
    """A NIC's rate where packets leave its node, and where they leave the switch for it."""
    namespace = f"{testbed.plan.prefix}{space}"

    def sent_bytes() -> int:
        return network.sent_bytes_by_class(namespace, device)["1:1"]

    before, began = sent_bytes(), time.monotonic()
    send(testbed, source, sink.address(over), 0, 1.0)
    after, elapsed_s = sent_bytes(), time.monotonic() - began
    assert 500_000 < after - before < 1.02 * rate * elapsed_s + 4 * 65_536


def test_rates_are_changed_while_it_is_up(testbed: Testbed) -> None:
    free = set_rates(testbed, Rates())
    assert load(testbed.plan.name) == free
    assert all(device.rate_bytes_per_s is None for node in status(free) for device in node.devices)
    assert network.sent_bytes_by_class(testbed.plan.switch, "c.pe0") == {}
    assert load(set_rates(free, Rates(snic=1_000_000)).plan.name).rates == Rates(snic=1_000_000)
    assert "1:1" in network.sent_bytes_by_class(testbed.plan.switch, "s.pe0")


def test_the_high_class_goes_first_and_the_low_one_is_not_starved(testbed: Testbed, sink) -> None:
    busy = inside(testbed, "pe0", sys.executable, "-c", SEND, sink.address("compute"), "0", "2.5")
    time.sleep(0.5)
    before = sent_by_class(testbed, "pe0", "cnic0")
    send(testbed, "pe0", sink.address("compute"), 0xB8, 1.5)
    after = sent_by_class(testbed, "pe0", "cnic0")
    busy.communicate(timeout=30)
    high_bytes, low_bytes = after[0] - before[0], after[1] - before[1]
    assert high_bytes > 3 * low_bytes > 0


def test_what_up_installs_is_what_qos_check_wants(testbed: Testbed) -> None:
    """Both follow `dualpath.lab.fabric.htb`; a storage NIC has one queue, as it carries KV alone."""

    def check(device: str) -> subprocess.CompletedProcess[str]:
        command = ("qos", "check", "--fabric", "linux", "--device", device, "--rate", f"{CNIC}B/s")
        space = iproute.inside(testbed.plan.node("pe0").namespace)
        command_line = [*space, sys.executable, "-m", "dualpath", *command]
        return subprocess.run(command_line, capture_output=True, text=True, timeout=60)

    assert check("cnic0").returncode == 0
    checked = check("snic0")
    assert checked.returncode == 1 and "cnic0" not in checked.stdout and "snic0: the high class" in checked.stdout


def test_our_channels_carry_their_class_on_both_ends(testbed: Testbed) -> None:
    """Reads: the peer sends, over a connection that only the initiator has asked to be of a class."""
    script = f"""
import sys, time
import numpy as np
from dualpath.core.vocabulary import TrafficClass
from dualpath.transfer.pool import BufferPool
from dualpath.transfer.traffic import TrafficManager
from dualpath.transfer.transport import PageRange
from dualpath.transfer.transports.tcp import TcpTransport
if sys.argv[1] == "serve":
    pool = BufferPool.create("testbed{os.getpid()}", 1 << 20, 1)
    server = TcpTransport().serve(pool, TrafficManager(), host=sys.argv[2], name="testbed", key=bytes(32))
    print(server.address, flush=True)
    sys.stdin.read()
    server.close(); pool.close()
else:
    traffic_class = TrafficClass[sys.argv[3]]
    options = dict(traffic_class=traffic_class, peer_tag="t", key=bytes(32))
    channel = TcpTransport().connect(sys.argv[2], TrafficManager(), **options)
    for _ in range(2):
        into = np.zeros(1 << 20, dtype=np.uint8)
        channel.read([PageRange(0, 0, 1 << 20)], [into], time.monotonic_ns() + 20_000_000_000).result()
    channel.close()
"""
    node = testbed.plan.node("de0")
    server = subprocess.Popen(
        [*iproute.inside(node.namespace), sys.executable, "-c", script, "serve", node.address("compute")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        address = server.stdout.readline().strip()
        for traffic_class in TrafficClass:
            before = sent_by_class(testbed, "de0", "cnic0")
            client = inside(testbed, "pe0", sys.executable, "-c", script, "read", address, traffic_class.name)
            client.communicate(timeout=60)
            assert client.returncode == 0
            after = sent_by_class(testbed, "de0", "cnic0")
            high_bytes, low_bytes = after[0] - before[0], after[1] - before[1]
            mine, other = (high_bytes, low_bytes) if traffic_class is TrafficClass.HIGH else (low_bytes, high_bytes)
            assert mine > 2 << 20 and other < 64 << 10
    finally:
        server.communicate(timeout=30)


def test_down_after_the_owner_was_killed(testbed_name: str, tmp_path: Path) -> None:
    """Processes inside included, one that ignores signals among them."""
    script = f"""
import subprocess, sys, time
from dualpath.lab.testbed import iproute, network
from dualpath.lab.testbed.plan import Rates, make_plan
testbed = network.up(make_plan({testbed_name!r}, 1, 1, {SUBNET!r}), Rates(1_000_000, 1_000_000))
stubborn = [*iproute.inside(testbed.plan.node("pe0").namespace), "sh", "-c", "trap '' TERM INT; echo up; sleep 600"]
started = subprocess.Popen(stubborn, stdout=subprocess.PIPE, start_new_session=True)
started.stdout.readline()
print("ready", flush=True)
time.sleep(600)
"""
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "ready\n"
    inhabitants = iproute.pids(load(testbed_name).plan.node("pe0").namespace)
    assert inhabitants
    owner.send_signal(signal.SIGKILL)
    owner.communicate(timeout=30)
    down(testbed_name)
    assert leftovers(testbed_name) == []
    assert not any(Path(f"/proc/{pid}/cmdline").exists() and _is_alive(pid) for pid in inhabitants)
    mounts = Path("/proc/mounts").read_text()
    assert f"dualpath-{testbed_name}-" not in mounts


def _is_alive(pid: int) -> bool:
    """A zombie waits for whoever inherited it, and holds nothing."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_down_after_an_up_that_was_cut_short(testbed_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    real = iproute.batch

    def breaks_off(tool: str, namespace: str, lines: list[str]) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise TestbedError("broken off")
        real(tool, namespace, lines)

    monkeypatch.setattr(network.iproute, "batch", breaks_off)
    plan = make_plan(testbed_name, 1, 1, SUBNET)
    with pytest.raises(TestbedError, match="broken off"):
        up(plan, Rates())
    assert leftovers(testbed_name) == [], "it clears up after itself"
    monkeypatch.setattr(network, "down", lambda name: [])  # as if killed
    calls = 0
    with pytest.raises(TestbedError, match="broken off"):
        up(plan, Rates())
    monkeypatch.undo()
    assert leftovers(testbed_name)
    with pytest.raises(TestbedError, match="there is no testbed"):
        load(testbed_name)
    assert load(up(plan, Rates(), replace=True).plan.name).plan == plan


def test_a_damaged_testbed_is_told(testbed: Testbed) -> None:
    name = testbed.plan.name
    iproute.run("ip", "netns", "delete", testbed.plan.node("de1").namespace)
    with pytest.raises(TestbedError, match=f"lacks dualpath-{name}-de1"):
        load(name)
    (network.STATE_DIRECTORY / f"{name}.json").write_bytes(b"{}")
    with pytest.raises(TestbedError, match="is damaged"):
        load(name)
    down(name)
    assert leftovers(name) == []


def test_networks_that_overlap_are_refused(testbed: Testbed) -> None:
    other = f"u{testbed.plan.name[1:]}"
    with pytest.raises(TestbedError, match=f"{testbed.plan.host_link} has .* which overlaps .* --subnet"):
        up(make_plan(other, 1, 1, SUBNET), Rates())
    assert leftovers(other) == []
