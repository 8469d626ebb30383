"""A `dualpath serve` as a child process, and where its parts, its figures and its resources are found."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import msgspec

from dualpath.lab.faults.matrix import Victim
from dualpath.lab.faults.real.asking import WAITS, until

STOP_S = 20.0
HELD = re.compile(
    r"^(dualpath_(?:scheduler_requests|scheduler_draining_\w+|scheduler_overdue_releases|buffer_held_blocks|"
    r"buffer_quarantined_blocks|store_pinned_blocks|store_pin_owners|engine_attempts|decode_running_requests|"
    r"requests_live|store_file_jobs_waiting)(?:\{[^}]*\})?) (\S+)$",
    re.MULTILINE,
)
"""Series that are 0 while nobody asks for anything."""


class StartError(Exception):
    """The cluster did not start."""


class Resources(msgspec.Struct, frozen=True):
    """Of a process, or of all of the cluster."""

    processes: int
    threads: int
    descriptors: int
    resident_mib: int
    shared_memory: int
    """Names in /dev/shm."""
    temporary_files: int = 0
    """Of the cluster: sockets, folders, secrets."""


class Served:
    """Use as a context manager: entered once it serves, left when nothing of it runs."""

    def __init__(self, options: Sequence[str], work: Path, inside: Sequence[str] = ()) -> None:
        self._ready = work / "ready.json"
        self.log = work / "serve.log"
        self._command = [*inside, sys.executable, "-m", "dualpath", "serve", *options, "--port", "0"]
        self._command += ["--ready-file", str(self._ready)]
        self.address = ""
        """Host and port."""
        self._process: subprocess.Popen[bytes]
        self._temporary = tempfile.TemporaryDirectory(prefix="dualpath-t")
        names = ("TMPDIR", "XDG_RUNTIME_DIR")
        self._environment = {**os.environ, **dict.fromkeys(names, self._temporary.name)}

    def __enter__(self) -> "Served":
        self._ready.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )
        try:
            until(lambda: self._ready.exists() or self._process.poll() is not None, WAITS.start_s)
        except BaseException:
            self.__exit__()
            raise
        if not self._ready.exists():
            self.__exit__()
            raise StartError(f"{' '.join(self._command)} did not start; {self.log} says why")
        self.address = str(self._facts()["url"]).removeprefix("http://")
        return self

    def __exit__(self, *_: object) -> None:
        pids = self.pids()
        if self.runs:
            self._process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_S)
        for pid in pids:  # a stopped process hears no SIGTERM
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._temporary.cleanup()

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def _facts(self) -> dict[str, object]:
        facts: dict[str, object] = json.loads(self._ready.read_bytes())
        return facts

    def parts(self, victim: Victim) -> list[int]:
        """Returns the pids of a victim's processes: the only place that knows where they are told."""
        agents = [pid for pid in self.pids() if _has_pool(pid) and not _names(pid) & {"compute"}]
        if victim is Victim.AGENT:
            return agents
        if victim is Victim.COORDINATOR:  # it speaks ZeroMQ and has no pool; the supervisor does not
            talks = [pid for pid in self.pids() if "ZMQbg/Reaper" in _names(pid) and not _has_pool(pid)]
            return talks or [int(str(self._facts()["pid"]))]
        health = self.health()
        role = {Victim.PE: "prefill", Victim.DE: "decode"}[victim]
        return [int(engine["pid"]) for engine in health.get("engines", ()) if engine["role"] == role]

    @property
    def is_ok(self) -> bool:
        return str(self.health().get("status")) == "ok"

    def health(self) -> dict[str, list[dict[str, str]]]:
        """Returns an empty record when nobody answers."""
        with suppress(ValueError):
            found: dict[str, list[dict[str, str]]] = json.loads(self._get("/health"))
            return found
        return {}

    def metrics(self) -> str:
        return self._get("/metrics").decode()

    def _get(self, path: str) -> bytes:
        with suppress(HTTPException, OSError), closing(HTTPConnection(self.address, timeout=5.0)) as connection:
            connection.request("GET", path)
            return connection.getresponse().read()
        return b""

    def in_state(self, state: str) -> float:
        found = re.search(rf'^dualpath_scheduler_requests{{state="{state}"}} (\S+)$', self.metrics(), re.MULTILINE)
        return float(found[1]) if found else 0.0

    def held(self) -> list[str]:
        """Returns what somebody holds, as ``series value``; also when there are no figures."""
        found: list[tuple[str, str]] = HELD.findall(self.metrics())
        return [f"{series} {value}" for series, value in found if float(value)] if found else ["no figures"]

    def pids(self) -> list[int]:
        """Returns the process and its descendants, and what their deaths have left: all have inherited its folder."""
        mark, found = f"XDG_RUNTIME_DIR={self._temporary.name}\0".encode(), []
        for entry in Path("/proc").iterdir():
            with suppress(OSError, ValueError):
                pid = int(entry.name)
                if os.getsid(pid) == self._process.pid or mark in (entry / "environ").read_bytes():
                    found.append(pid)
        return found

    def resources(self) -> Resources:
        each = self.each().values()
        sums = {name: sum(getattr(one, name) for one in each) for name in Resources.__struct_fields__}
        return Resources(**sums | {"temporary_files": sum(1 for _ in Path(self._temporary.name).rglob("*"))})

    def each(self) -> dict[int, Resources]:
        """Returns what each process has, by pid."""
        return {pid: _resources_of(pid) for pid in self.pids()}


def _resources_of(pid: int) -> Resources:
    names = sum(1 for _ in Path("/dev/shm").glob(f"dualpath-{pid}-*"))
    return Resources(1, _of(pid, "threads"), _of(pid, "fd"), _of(pid, "rss"), names)


def _has_pool(pid: int) -> bool:
    return any("rows" not in path.name for path in Path("/dev/shm").glob(f"dualpath-{pid}-*"))


def _names(pid: int) -> set[str]:
    """Names of a process's threads, as `top -H` shows them."""
    found = set()
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found.add((task / "comm").read_text().strip())
    return found


def _of(pid: int, what: str) -> int:
    with suppress(OSError):
        if what == "fd":
            return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
        status = Path(f"/proc/{pid}/status").read_text()
        name = {"threads": "Threads", "rss": "RssAnon"}[what]
        found = re.search(rf"^{name}:\s+(\d+)", status, re.MULTILINE)
        return 0 if found is None else int(found[1]) // (1024 if what == "rss" else 1)
    return 0
