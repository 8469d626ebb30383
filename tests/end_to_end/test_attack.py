"""A real cluster under attack by who does not know its secret: no byte read or written, nobody joined, nobody ended.

``--garbage-frames 1000000`` sends as many to each port as the issue of trust asks for, and prints what changed.
"""

import contextlib
import json
import os
import random
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import zmq

from dualpath.cluster import messages as m
from dualpath.cluster.cluster_secret import ClusterSecret
from dualpath.cluster.curve import secure_client
from dualpath.core.vocabulary import Role, TrafficClass
from dualpath.transfer import TRANSPORTS
from dualpath.transfer.traffic import TrafficManager
from dualpath.transfer.transport import TransferError

from .test_serve import serving, wait_for

pytestmark = pytest.mark.slow

FRAME_BYTES = 32
FRAMES_A_CONNECTION = 100
REFUSED = ("dualpath_control_refused_total", "dualpath_data_refused_total")
OPENINGS = (
    b"",
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"DP\x01",
    b"DP\x03",
    b"\x16\x03\x01\x02\x00\x01",
    b"\xff" + bytes(8) + b"\x7f\x03\x00CURVE" + bytes(47),
    b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48),
)


class Target:
    """A cluster on this host, and what its attacker can find out about it."""

    def __init__(self, url: str, process: "subprocess.Popen[bytes]", where: Path) -> None:
        self.url = url
        self.where = where
        self.control = json.loads((where / "ready.json").read_bytes())["control_address"]
        self.name = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        top = psutil.Process(process.pid)
        self.processes = [top, *top.children(recursive=True)]

    def listening(self) -> list[tuple[str, int]]:
        own = int(self.url.rpartition(":")[2])
        found = [one.laddr for each in self.processes for one in each.net_connections("tcp") if one.status == "LISTEN"]
        return sorted({(address.ip, address.port) for address in found if address.port != own})

    def data_ports(self) -> list[int]:
        return [port for _, port in self.listening() if not self.control.endswith(f":{port}")]

    def ask(self) -> list[int]:
        body = {"model": self.name, "prompt": list(range(10, 140)), "max_tokens": 8, "temperature": 0}
        body |= {"return_token_ids": True, "ignore_eos": True}
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=60.0)
        return answer.json()["choices"][0]["token_ids"]

    def counted(self, name: str) -> int:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return sum(int(float(line.split()[-1])) for line in lines if line.split("{")[0].split()[0] == name)

    def threads(self) -> dict[int, int]:
        return {each.pid: each.num_threads() for each in self.processes}

    def files(self) -> int:
        return sum(each.num_fds() for each in self.processes)

    def memory(self) -> int:
        return sum(each.memory_info().rss for each in self.processes)


@pytest.fixture(scope="module")
def target(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    where = tmp_path_factory.mktemp("attacked")
    journal = where / "journal"
    with serving(model, where, "--transport", "tcp", "--journal", str(journal)) as (url, process):
        found = Target(url, process, where)
        found.ask()
        yield found
        assert {each.pid for each in found.processes if each.is_running()} == {each.pid for each in found.processes}


def flood(port: int, frames: int, seed: int) -> int:
    """Sends garbage; returns how many connections it took."""
    rng = random.Random(seed)
    connections = 0
    while frames > 0:
        n = min(frames, FRAMES_A_CONNECTION)
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=30) as stranger:
            stranger.sendall(rng.choice(OPENINGS) + rng.randbytes(n * FRAME_BYTES))
        connections += 1
        frames -= n
    return connections


def settled(target: Target) -> tuple[dict[int, int], int]:
    """Returns threads and files once they have stayed the same for a second: some may be about to end."""
    seen: list[tuple[dict[int, int], int]] = []

    def same() -> bool:
        seen.append((target.threads(), target.files()))
        time.sleep(0.25)
        return len(seen) > 4 and all(one == seen[-1] for one in seen[-5:])

    wait_for(same, 30)
    return seen[-1]


def test_nothing_but_loopback_is_listened_at(target: Target) -> None:
    assert len(target.listening()) >= 2
    assert {address for address, _ in target.listening()} == {"127.0.0.1"}


def test_garbage_at_each_port_changes_nothing_but_a_counter(target: Target, request: pytest.FixtureRequest) -> None:
    frames = request.config.getoption("--garbage-frames")
    expected, ports = target.ask(), [port for _, port in target.listening()]
    for _ in range(12):  # threads that are made when they are first needed are there
        target.ask()
    before = [*settled(target), target.memory(), sum(map(target.counted, REFUSED))]
    begun = time.monotonic()
    sent: list[int] = []
    floods = [
        threading.Thread(target=lambda port=port, i=i: sent.append(flood(port, frames, i)))
        for i, port in enumerate(ports)
    ]
    for one in floods:
        one.start()
    answers = 0
    while any(one.is_alive() for one in floods):
        assert target.ask() == expected
        answers += 1
    seconds = time.monotonic() - begun
    wait_for(lambda: sum(map(target.counted, REFUSED)) - before[3] >= sum(sent), 60)  # type: ignore[operator]
    assert target.ask() == expected
    wait_for(lambda: (target.threads(), target.files()) == (before[0], before[1]), 30)
    print(
        f"\n{frames} frames at each of {len(ports)} ports, {sum(sent)} connections, {seconds:.0f} s: "
        f"{sum(map(target.counted, REFUSED)) - before[3]} refused, {answers} answers meanwhile, all right, memory "  # type: ignore[operator]
        f"{(target.memory() - before[2]) / 2**20:+.1f} MiB, threads and files as before"  # type: ignore[operator]
    )


def test_a_thousand_idle_connections_cost_no_thread(target: Target) -> None:
    expected, threads = target.ask(), target.threads()
    for port in [port for _, port in target.listening()]:
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(1_000)]
        assert target.threads() == threads
        assert target.ask() == expected
        for one in idle:
            one.close()


def test_without_the_secret_no_engine_joins_and_no_byte_is_read(target: Target) -> None:
    before = httpx.get(f"{target.url}/health").json()["engines"]
    context = zmq.Context()
    forger = context.socket(zmq.DEALER)
    secure_client(forger, ClusterSecret.random())
    forger.connect(target.control)
    join = {"role": Role.PREFILL, "pid": os.getpid(), "buffer_blocks": 1, "hbm_blocks": 1}
    forger.send(m.encoder.encode({"type": "Join"} | {k: getattr(v, "value", v) for k, v in join.items()}))
    assert forger.poll(2_000) == 0, "not even a refusal, which would tell the cluster's layout"
    context.destroy(linger=0)
    for port in target.data_ports():
        options = {"traffic_class": TrafficClass.LOW, "peer_tag": "0", "key": secrets.token_bytes(32)}
        with pytest.raises(TransferError):
            TRANSPORTS.get("tcp").connect(f"tcp://127.0.0.1:{port}", TrafficManager(), **options)
    assert httpx.get(f"{target.url}/health").json()["engines"] == before


def test_the_secret_is_in_one_file_and_nowhere_else(target: Target) -> None:
    from dualpath.spec.private_files import runtime_directory

    pids = {each.pid for each in target.processes}
    files = [file for file in runtime_directory().glob("*.secret") if int(file.name.split("-")[1]) in pids]
    (file,) = files
    secret = file.read_text().strip()
    seen = [" ".join(each.cmdline()) for each in target.processes]
    seen += [(target.where / name).read_text() for name in ("ready.json", "journal")]
    seen += [httpx.get(f"{target.url}{path}").text for path in ("/metrics", "/health", "/v1/models")]
    assert secret and not any(secret in text for text in seen)
    made = [target.where / "ready.json", target.where / "journal", file]
    assert {path.stat().st_mode & 0o777 for path in made} == {0o600}


OTHER_USER = """
import glob, os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
pids, files = map(int, sys.argv[1].split(",")), sys.argv[2:]
for pid in pids:
    files += glob.glob(f"/dev/shm/dualpath-{pid}-*") + [f"/proc/{pid}/environ", f"/proc/{pid}/mem"]
    for number in (15, 9):
        try:
            os.kill(pid, number)
            print("killed", pid)
        except PermissionError:
            pass
for file in files:
    for mode in ("rb", "r+b"):
        try:
            open(file, mode)
            print("opened", file)
        except PermissionError:
            pass
print("tried", len(files))
"""


@pytest.mark.privileged
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_opens_and_ends_nothing(target: Target) -> None:
    from dualpath.spec.private_files import runtime_directory

    pids = ",".join(str(each.pid) for each in target.processes)
    files = [*runtime_directory().iterdir(), target.where / "journal", target.where / "ready.json"]
    said = subprocess.run(
        [sys.executable, "-c", OTHER_USER, pids, *map(str, files)], capture_output=True, text=True, check=True
    ).stdout
    tried = said.splitlines()[-1]
    assert said.splitlines() == [tried] and int(tried.split()[1]) >= 2 * len(target.processes) + 3


@pytest.mark.privileged
@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes namespaces")
def test_another_namespace_reaches_nothing(target: Target) -> None:
    script = (
        "import socket, sys; print([socket.socket().connect_ex(('127.0.0.1', int(port))) for port in sys.argv[1:]])"
    )
    ports = [str(port) for _, port in target.listening()]
    command = ["unshare", "--net", sys.executable, "-c", script, *ports]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert len(errors := json.loads(said)) == len(ports) and 0 not in errors
