"""What a run needs of a cluster, and clusters of `dualpath serve` on this host.

A cluster is a child process, which leads a process group of its own. Ctrl-C therefore reaches only us, and one signal
to the group ends the cluster's engines too, even if the leader died first.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, TypeVar

import msgspec

from dualpath.lab.experiments.conditions import Bench, Conditions

Result = TypeVar("Result")
STOP_GRACE_S = 15.0
POLL_S = 0.05
REAP_S = 1.0
TAIL_LINES = 20


class LaunchError(Exception):
    """Something that a run needs did not start, or ended by itself. The message has the tail of its log."""


class LaunchedCluster(Protocol):
    """A cluster whose engines have all joined."""

    @property
    def url(self) -> str:
        """URL of the OpenAI server, ``http://host:port/v1``; ``/metrics`` is at the same host and port."""
        ...

    async def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Returns `work`'s result. If the cluster ends first, cancels `work` and raises LaunchError."""
        ...


class ClusterLauncher(Protocol):
    """Use as ``async with launcher.cluster(…) as cluster``. One cluster is up at a time, and is gone afterwards."""

    @property
    def links(self) -> Literal["emulated", "kernel"]:
        """Who keeps the NICs' rates: the engines' traffic manager, or the kernel."""
        ...

    def cluster(
        self, name: str, topology: str, system: str, store: Path, limited: bool
    ) -> AbstractAsyncContextManager[LaunchedCluster]:
        """Returns a cluster; entering it raises LaunchError if it does not start.

        `name` is for messages and log files, `topology` like ``1P2D``, `store` the directory of its blocks. `limited`
        says whether the NICs have the conditions' rates, or none.
        """
        ...


MakeLauncher = Callable[[Conditions, Bench, Path, Path], ClusterLauncher]
"""Makes a launcher from the conditions, the bench, the directory of logs and a working directory of its own."""


class LocalLauncher:
    """Starts clusters of `dualpath serve` on this host, whose engines keep their NICs' rates themselves."""

    links: Literal["emulated", "kernel"] = "emulated"

    def __init__(self, conditions: Conditions, bench: Bench, logs: Path, work: Path) -> None:
        self._rates = (conditions.snic_bytes_per_s, conditions.cnic_bytes_per_s)
        self._bench = bench
        self._logs = logs
        self._ready_file = work / "ready.json"

    def cluster(self, name: str, topology: str, system: str, store: Path, limited: bool) -> "ClusterProcess":
        """See `ClusterLauncher.cluster`. The log is ``NAME.log``, with dashes."""
        snic, cnic = self._rates if limited else (None, None)
        command = [
            *self._bench.serve_command,
            *self._bench.engine_options,
            *(("--transport", self._bench.transport) if self._bench.transport is not None else ()),
            *("--topology", topology),
            *("--model", str(self._bench.model)),
            *("--store", str(store)),
            *("--system", system),
            *("--snic-rate", _rate(snic)),
            *("--cnic-rate", _rate(cnic)),
            *("--port", "0"),
        ]
        log = log_path(self._logs, name)
        command += ["--ready-file", str(self._ready_file), *self._bench.engine_arguments]
        return ClusterProcess(name, command, self._ready_file, log, self._bench.start_timeout_s)


class _Ready(msgspec.Struct):
    url: str


class ClusterProcess:
    """Use as ``async with ClusterProcess(…) as cluster``. It is entered once every engine has joined.

    `command` is told of `ready_file`.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        ready_file: Path,
        log: Path,
        start_timeout_s: float,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self._environment = environment
        self.url = ""
        self._command = command
        self._ready_file = ready_file
        self._log = log
        self._start_timeout_s = start_timeout_s
        self._process: asyncio.subprocess.Process

    async def __aenter__(self) -> "ClusterProcess":
        self._ready_file.unlink(missing_ok=True)
        with self._log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=self._environment,
            )
        try:
            self.url = (await self._ready()).url
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    async def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Returns `work`'s result. If the cluster ends first, cancels `work` and raises LaunchError."""
        working = asyncio.ensure_future(work)
        ended = asyncio.ensure_future(self._process.wait())
        try:
            await asyncio.wait({working, ended}, return_when=asyncio.FIRST_COMPLETED)
            if working.done() and not working.cancelled() and working.exception() is not None:
                # A cluster that dies breaks its connections first and is reaped a moment later.
                await asyncio.wait({ended}, timeout=REAP_S)
            if ended.done():
                raise self._died()
            return working.result()
        finally:
            for task in (working, ended):
                task.cancel()
            await asyncio.gather(working, ended, return_exceptions=True)

    async def _ready(self) -> _Ready:
        deadline = time.monotonic() + self._start_timeout_s
        while not self._ready_file.exists():
            if self._process.returncode is not None:
                raise self._died()
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"{self.name}: the cluster was not ready within {self._start_timeout_s:g} s.{log_tail(self._log)}"
                )
            await asyncio.sleep(POLL_S)
        try:
            return msgspec.json.decode(self._ready_file.read_bytes(), type=_Ready)
        except msgspec.MsgspecError as error:
            raise LaunchError(f"{self.name}: {self._ready_file} has an unknown form: {error}") from error

    async def _stop(self) -> None:
        """Sends SIGTERM, then SIGKILL after STOP_GRACE_S or when cancelled; nothing of the group survives."""
        try:
            if self._process.returncode is None:
                self._process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(STOP_GRACE_S):
                await self._process.wait()
        except TimeoutError:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()

    def _died(self) -> LaunchError:
        code = self._process.returncode
        return LaunchError(f"{self.name}: the cluster ended by itself, exit code {code}.{log_tail(self._log)}")


def log_tail(log: Path) -> str:
    """Returns a sentence with the last lines of `log`, to end an error message with."""
    lines = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
    return f" The end of {log}:\n" + "\n".join(f"  {line}" for line in lines)


def log_path(logs: Path, name: str) -> Path:
    """Returns the log file of the cluster `name` (``1P1D basic #2``)."""
    return logs / f"{name.replace(' ', '-').replace('#', '').replace('/', '-')}.log"


def _rate(bytes_per_s: int | None) -> str:
    return "unlimited" if bytes_per_s is None else f"{bytes_per_s}B/s"
