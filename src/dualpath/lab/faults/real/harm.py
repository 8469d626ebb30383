"""What a fault does to processes, files and clients of a cluster on this host, and how it heals."""

import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Literal

from dualpath.lab.faults.matrix import PARTITIONS, Combination, Fault, Victim
from dualpath.lab.faults.real.asking import Asked
from dualpath.lab.faults.real.namespaces import cut
from dualpath.lab.faults.real.served import Resources, Served
from dualpath.lab.faults.real.store_server import StoreServer
from dualpath.lab.testbed.network import Testbed

Heal = Callable[[], None]
Place = Literal["folder", "disk", "server", "namespaces"]
"""Where the store is: a folder, a small disk, behind `store_server`; or each node, and nginx, in its namespace."""
BY_SERVER = (Fault.SLOW, Fault.LATE, Fault.WRONG, Fault.HUNG)
"""What a store is made to do by `store_server`; the rest is done to its files."""
DUTY_S = (0.09, 0.01)
"""A slow process is stopped, then runs, for so long."""
FILLER = "filler"


class Skip(Exception):  # noqa: N818 (a thing that happened)
    """The combination can't be brought about here; the message says why."""


class Scene:
    """What a fault may touch. `files` are the blocks that the request looked at reads."""

    def __init__(
        self,
        cluster: Served,
        store: Path,
        files: list[Path],
        server: StoreServer | None = None,
        testbed: Testbed | None = None,
    ) -> None:
        self.cluster = cluster
        self.store = store
        self.server = server
        self.testbed = testbed
        self.files = files
        self.random = random.Random(0)
        self.before: Resources
        self.look: Asked


def place_of(at: Combination) -> Place:
    """Returns the least that the combination takes."""
    if at.fault in PARTITIONS or at.victim is Victim.LINK:
        return "namespaces"
    if at.victim is not Victim.STORE:
        return "folder"
    return "server" if at.fault in BY_SERVER else "disk" if at.fault is Fault.FULL else "folder"


def harm(at: Combination, scene: Scene) -> Heal:
    """Do it. Returns what heals it. Raises Skip, and TestbedError where links are cut."""
    if place_of(at) == "namespaces":
        assert scene.testbed is not None
        return cut(at, scene.testbed)
    if at.victim is Victim.CLIENT:
        return _harm_client(at.fault, scene)
    if at.victim is Victim.STORE:
        return _harm_store(at.fault, scene)
    pids = scene.cluster.parts(at.victim)
    if not pids:
        raise Skip(f"this cluster has no {at.victim} process")
    return _harm_process(at.fault, scene.random.choice(pids))


def _harm_process(fault: Fault, pid: int) -> Heal:
    if fault is Fault.SLOW:
        healed = threading.Event()
        beating = threading.Thread(target=_beat, args=(pid, healed), daemon=True)
        beating.start()

        def heal() -> None:
            healed.set()
            beating.join()

        return heal
    _signal(pid, signal.SIGKILL if fault is Fault.KILL else signal.SIGSTOP)
    return lambda: _signal(pid, signal.SIGCONT)


def _beat(pid: int, healed: threading.Event) -> None:
    while not healed.is_set():
        _signal(pid, signal.SIGSTOP)
        time.sleep(DUTY_S[0])
        _signal(pid, signal.SIGCONT)
        time.sleep(DUTY_S[1])


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _harm_store(fault: Fault, scene: Scene) -> Heal:
    if (server := scene.server) is not None and fault in (*BY_SERVER, Fault.FULL):
        server.healed.clear()
        server.fault = fault

        def heal() -> None:
            server.fault = None
            server.healed.set()

        return heal
    if fault is Fault.KILL:
        away = scene.store.with_name(f"{scene.store.name}-away")
        scene.store.rename(away)
        return lambda: _bring_back(away, scene.store)
    if fault is Fault.FULL:
        filler = scene.store / FILLER
        with suppress(OSError), filler.open("wb", buffering=0) as disk:
            while disk.write(bytes(4096)):
                pass
        return filler.unlink
    for file in scene.files:
        with suppress(FileNotFoundError):  # it has been evicted
            damaged = bytearray(file.read_bytes())
            damaged[len(damaged) // 2] ^= 1
            file.write_bytes(damaged)
    return lambda: None


def _bring_back(away: Path, store: Path) -> None:
    """Put what is there again, and what is written meanwhile, together."""
    for _ in range(100):
        for file in files_in(store):
            there = away / file.relative_to(store)
            there.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # a draft
                file.replace(there)
        with suppress(OSError):  # somebody writes at this moment
            if store.exists():
                store.rename(store.with_name(f"{store.name}-meanwhile-{time.monotonic_ns()}"))
            away.rename(store)
            return
    raise OSError(f"{away} can't be brought back to {store}")


def files_in(store: Path) -> list[Path]:
    """Returns what is there while others write and delete."""
    return [Path(folder, name) for folder, _, names in os.walk(store) for name in names]


def _harm_client(fault: Fault, scene: Scene) -> Heal:
    look = scene.look
    if fault is Fault.KILL:
        look.hang_up()
    elif fault is Fault.STOP:
        look.may_read.clear()
        return look.may_read.set
    elif fault is Fault.SLOW:
        look.pace_s = 0.05

        def heal() -> None:
            look.pace_s = 0.0

        return heal
    else:
        host, _, port = scene.cluster.address.partition(":")
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 4000\r\n\r\n"
        speaker = socket.create_connection((host, int(port)), timeout=5.0)
        speaker.sendall(head + (b'{"prompt": ' if fault is Fault.LATE else os.urandom(4000)))

        def leave() -> None:
            with closing(speaker), suppress(OSError):
                assert fault is Fault.LATE or b" 400 " in speaker.recv(4000), "a wrong body is not refused"

        return leave
    return lambda: None


@contextmanager
def small_disk(path: Path) -> Iterator[None]:
    """A file system of 32 MiB. Raises Skip."""
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(path)], capture_output=True)
    if mounted.returncode:
        raise Skip(f"a small disk needs root: {mounted.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=False)
