"""A cluster as a child process: started, waited for, watched, and ended whatever happens.

The child leads a process group of its own. Ctrl-C therefore reaches only us, and one signal to the group ends the
cluster's engines too, also those whose leader died first.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import msgspec

Result = TypeVar("Result")
STOP_GRACE_S = 15.0
POLL_S = 0.05
REAP_S = 1.0
TAIL_LINES = 20


class ClusterError(Exception):
    """A cluster that did not start, or ended by itself. The message has the tail of its log."""


class _Ready(msgspec.Struct):
    url: str
    pid: int


class ClusterProcess:
    """``async with ClusterProcess(…) as cluster``: entered once every engine has joined; `cluster.url` serves."""

    def __init__(self, name: str, command: Sequence[str], ready_file: Path, log: Path, start_timeout_s: float) -> None:
        self.name = name
        self.url = ""
        self._command = [*command, "--ready-file", str(ready_file)]
        self._ready_file = ready_file
        self._log = log
        self._start_timeout_s = start_timeout_s
        self._process: asyncio.subprocess.Process

    async def __aenter__(self) -> "ClusterProcess":
        self._ready_file.unlink(missing_ok=True)
        with self._log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
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
        """`work`'s result. Raises ClusterError, cancelling `work`, if the cluster ends before it."""
        working = asyncio.ensure_future(work)
        ended = asyncio.ensure_future(self._process.wait())
        try:
            await asyncio.wait({working, ended}, return_when=asyncio.FIRST_COMPLETED)
            if working.done() and not working.cancelled() and working.exception() is not None:
                # A cluster that dies breaks connections first and is reaped a moment later.
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
                raise ClusterError(
                    f"{self.name}: the cluster was not ready within {self._start_timeout_s:g} s.{log_tail(self._log)}"
                )
            await asyncio.sleep(POLL_S)
        try:
            return msgspec.json.decode(self._ready_file.read_bytes(), type=_Ready)
        except msgspec.MsgspecError as error:
            raise ClusterError(f"{self.name}: {self._ready_file} is not what serve writes: {error}") from error

    async def _stop(self) -> None:
        """SIGTERM, then SIGKILL after STOP_GRACE_S or when cancelled; nothing of the group survives."""
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

    def _died(self) -> ClusterError:
        code = self._process.returncode
        return ClusterError(f"{self.name}: the cluster ended by itself, exit code {code}.{log_tail(self._log)}")


def log_tail(log: Path) -> str:
    """A sentence with the last lines of `log`, to end an error message with."""
    lines = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
    return f" The end of {log}:\n" + "\n".join(f"  {line}" for line in lines)
